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

NEMOTRON_RERANKER = {"body": "question:{query} \n \n passage:{passage}"}
"""What NVIDIA's guide to fine-tuning rerankers asks; there is no instruction."""
