"""What models are for, one entry for each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["embed", "embed_all", "embed_sparse", "rerank", "classify", "generate", "ocr", "layout", "picture"]
"""A task, as in `--task` and the catalog's `tasks`."""


@dataclass(frozen=True)
class Result:
    """What a model of a task gives."""

    gives: str
    """In words, for the catalog's table."""
    output: str
    """The tensor by which a served model of the task is known."""


TASKS: dict[Task, Result] = {
    "embed": Result("embeddings", "embeddings"),
    "embed_all": Result("vectors of tokens", "token_embeddings"),
    "embed_sparse": Result("sparse vectors", "indices"),
    "rerank": Result("reranker", "score"),
    "classify": Result("classifier", "probabilities"),
    "generate": Result("answers", "text_output"),
}
"""Tasks of models of texts."""

DOCUMENT_TASKS: dict[Task, Result] = {
    "ocr": Result("text of pages", "txts"),
    "layout": Result("layout of pages", "labels"),
    "picture": Result("kinds of pictures", "logits"),
}
"""Tasks of models that read documents. Callers ask Triton for them; the gateway loads and unloads the models."""
