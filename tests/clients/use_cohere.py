import base64
import struct

import cohere
from truth import DOCUMENTS, GATEWAY, KEY, QUERY, TEXTS, embeddings, order, raises, same, scores

expected = [scores()[i] for i in order()]
for client in (cohere.Client(api_key=KEY, base_url=GATEWAY), cohere.ClientV2(api_key=KEY, base_url=GATEWAY)):
    answer = client.rerank(model="minilm-rerank", query=QUERY, documents=DOCUMENTS)
    assert [item.index for item in answer.results] == order()
    assert same([item.relevance_score for item in answer.results], expected)
    assert len(client.rerank(model="minilm-rerank", query=QUERY, documents=DOCUMENTS, top_n=2).results) == 2
    with raises(cohere.NotFoundError, "this server has: minilm-rerank"):
        client.rerank(model="none", query=QUERY, documents=DOCUMENTS)
client = cohere.Client(api_key=KEY, base_url=GATEWAY)
answer = client.rerank(model="minilm-rerank", query=QUERY, documents=DOCUMENTS, return_documents=True, top_n=1)
assert answer.results[0].document.text == DOCUMENTS[1]
for client in (cohere.Client(api_key=KEY, base_url=GATEWAY), cohere.ClientV2(api_key=KEY, base_url=GATEWAY)):
    call = {
        "model": "minilm",
        "texts": TEXTS,
        "input_type": "search_document",
        "embedding_types": ["float", "int8", "uint8", "binary", "ubinary", "base64"],
    }
    answer = client.embed(**call).embeddings
    assert same(answer.float_, embeddings(TEXTS))
    assert len(answer.ubinary[0]) == len(answer.binary[0]) == 384 / 8
    for floats, int8, uint8, text in zip(answer.float_, answer.int8, answer.uint8, answer.base64, strict=True):
        assert int8 == [round(number * 127) for number in floats]
        assert uint8 == [number + 128 for number in int8]
        assert same(struct.unpack("<384f", base64.b64decode(text)), floats)
    with raises(cohere.BadRequestError, "must be one of"):
        client.embed(**call | {"embedding_types": ["int4"]})
inputs = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
answer = cohere.ClientV2(api_key=KEY, base_url=GATEWAY).embed(
    model="minilm", inputs=inputs, input_type="search_document", embedding_types=["float"]
)
assert same(answer.embeddings.float_, embeddings(TEXTS))
client = cohere.Client(api_key=KEY, base_url=GATEWAY)
assert same(client.embed(model="minilm", texts=TEXTS).embeddings, embeddings(TEXTS))
