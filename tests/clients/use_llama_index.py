from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference
from truth import DOCUMENTS, GATEWAY, KEY, QUERY, TEXTS, embeddings, order, same, scores

model = TextEmbeddingsInference(model_name="minilm", base_url=GATEWAY, auth_token=KEY)
assert same(model.get_text_embedding_batch(TEXTS), embeddings(TEXTS))
assert same(model.get_query_embedding(TEXTS[0]), embeddings(TEXTS[:1])[0])
reranker = TextEmbeddingInference(base_url=GATEWAY, top_n=2, auth_token=f"Bearer {KEY}")
nodes = [NodeWithScore(node=TextNode(text=document)) for document in DOCUMENTS]
ranked = reranker.postprocess_nodes(nodes, query_str=QUERY)
assert [node.text for node in ranked] == [DOCUMENTS[i] for i in order()[:2]]
assert same([node.score for node in ranked], [scores()[i] for i in order()[:2]])
