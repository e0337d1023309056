from langchain_core.documents import Document
from langchain_nvidia_ai_endpoints import NVIDIAEmbeddings, NVIDIARerank
from truth import DOCUMENTS, GATEWAY, KEY, QUERY, TEXTS, embeddings, order, same

url = f"{GATEWAY}/v1"
model = NVIDIAEmbeddings(base_url=url, model="minilm", api_key=KEY)
assert same(model.embed_documents(TEXTS), embeddings(TEXTS))
assert same(model.embed_query(TEXTS[0]), embeddings(TEXTS[:1])[0])
reranker = NVIDIARerank(base_url=url, model="minilm-rerank", api_key=KEY)
ranked = reranker.compress_documents([Document(page_content=document) for document in DOCUMENTS], QUERY)
assert [document.page_content for document in ranked] == [DOCUMENTS[i] for i in order()]
