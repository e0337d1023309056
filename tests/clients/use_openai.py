import openai
from truth import GATEWAY, KEY, TEXTS, embeddings, raises, same

client = openai.OpenAI(base_url=f"{GATEWAY}/v1", api_key=KEY)
expected = embeddings(TEXTS)
# By default the client asks for base64.
for options in ({}, {"encoding_format": "float"}, {"extra_body": {"input_type": "passage"}}):
    answer = client.embeddings.create(model="minilm", input=TEXTS, **options)
    assert same([item.embedding for item in answer.data], expected)
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > len(TEXTS)
assert same(client.embeddings.create(model="minilm", input=TEXTS[0]).data[0].embedding, expected[0])
options = {"encoding_format": "float", "extra_body": {"embedding_type": "int8"}}
answer = client.embeddings.create(model="minilm", input=TEXTS, **options)
assert [item.embedding for item in answer.data] == [[round(one * 127) for one in row] for row in expected]

first, second = client.models.list()
assert (first.id, first.dimensions, first.max_tokens, first.pooling) == ("minilm", 384, 256, "mean")
assert second.task == "rerank"

for kind, words, call in (
    (openai.BadRequestError, "check_embedding_ctx_length", {"input": [101, 102]}),
    (openai.BadRequestError, "check_embedding_ctx_length", {"input": [[101], [102]]}),
    (openai.BadRequestError, "was not trained to give fewer", {"dimensions": 8}),
    (openai.BadRequestError, "send it with encoding_format 'float'", {"extra_body": {"embedding_type": "int8"}}),
    (openai.BadRequestError, "input[1] is empty", {"input": ["a", ""]}),
    (openai.NotFoundError, "this server has: minilm", {"model": "text-embedding-3-small"}),
):
    with raises(kind, words):
        client.embeddings.create(**{"model": "minilm", "input": "a"} | call)
with raises(openai.AuthenticationError, "with a key"):
    openai.OpenAI(base_url=f"{GATEWAY}/v1", api_key="wrong").models.list()
