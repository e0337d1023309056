"""What models are for, one entry for each task."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A task, by what it gives."""

    gives: str
    """In words, for the catalog's table."""
    output: str
    """The tensor by which a served model of the task is known."""


TASKS = {
    "embed": Task("embeddings", "embeddings"),
    "embed_all": Task("vectors of tokens", "token_embeddings"),
    "embed_sparse": Task("sparse vectors", "indices"),
    "rerank": Task("reranker", "score"),
    "classify": Task("classifier", "probabilities"),
    "generate": Task("answers", "text_output"),
}
"""Name, as in `--task` and the catalog's `tasks` -> task of a model of texts."""

DOCUMENT_TASKS = {
    "ocr": Task("text of pages", "txts"),
    "layout": Task("layout of pages", "labels"),
    "picture": Task("kinds of pictures", "logits"),
}
"""Name -> task of a model that reads documents: docling calls it in Triton itself."""
