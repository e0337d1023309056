from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker
from truth import DOCUMENTS, GATEWAY, KEY, QUERY, order, same, scores

ranker = HuggingFaceTEIRanker(url=GATEWAY, top_k=2, token=Secret.from_token(KEY))
ranked = ranker.run(query=QUERY, documents=[Document(content=document) for document in DOCUMENTS])["documents"]
assert [document.content for document in ranked] == [DOCUMENTS[i] for i in order()[:2]]
assert same([document.score for document in ranked], [scores()[i] for i in order()[:2]])
