from langchain_openai import OpenAIEmbeddings
from truth import GATEWAY, KEY, TEXTS, embeddings, same

model = OpenAIEmbeddings(model="minilm", base_url=f"{GATEWAY}/v1", api_key=KEY, check_embedding_ctx_length=False)
assert same(model.embed_documents(TEXTS), embeddings(TEXTS))
assert same(model.embed_query(TEXTS[0]), embeddings(TEXTS[:1])[0])
