from langchain_cohere import CohereRerank
from truth import DOCUMENTS, GATEWAY, KEY, QUERY, order, same, scores

answer = CohereRerank(model="minilm-rerank", base_url=GATEWAY, cohere_api_key=KEY).rerank(DOCUMENTS, QUERY)
assert [item["index"] for item in answer] == order()
assert same([item["relevance_score"] for item in answer], [scores()[i] for i in order()])
