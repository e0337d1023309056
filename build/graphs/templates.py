"""Chat templates of rerankers that are asked a question: the text around query and passage, as published."""

from __future__ import annotations

QWEN3_RERANKER = {
    "prefix": (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
        'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    ),
    "body": "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {passage}",
    "suffix": "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "instruction": "Given a web search query, retrieve relevant passages that answer the query",
}
"""Qwen3-Reranker's model card; truncation leaves prefix and suffix whole."""

MXBAI_RERANKER = {
    "prefix": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
    ),
    "query": "query: {query}",
    "instructed": "instruction: {instruction}\nquery: {query}",
    "passage": "\ndocument: {passage}",
    "suffix": (
        "\nYou are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:<|im_end|>\n<|im_start|>assistant\n"
    ),
    "room": "8192",
}
"""mxbai-rerank-v2's package; the query is tokenized apart from what follows, has three quarters of the room."""

NEMOTRON_RERANKER = {"body": "question:{query} \n \n passage:{passage}"}
"""What NVIDIA's guide to fine-tuning rerankers asks; there is no instruction."""
