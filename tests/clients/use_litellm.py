import litellm
from truth import DOCUMENTS, GATEWAY, KEY, QUERY, TEXTS, embeddings, order, same

answer = litellm.embedding(model="openai/minilm", input=TEXTS, api_base=f"{GATEWAY}/v1", api_key=KEY)
assert same([item["embedding"] for item in answer.data], embeddings(TEXTS))
for provider in ("cohere", "jina_ai", "huggingface", "nvidia_nim/ranking"):
    answer = litellm.rerank(
        model=f"{provider}/minilm-rerank",
        query=QUERY,
        documents=DOCUMENTS,
        top_n=2,
        api_base=GATEWAY,
        api_key=KEY,
    )
    assert [item["index"] for item in answer.results] == order()[:2], provider
