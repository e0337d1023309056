"""Embeddings, by sentence-transformers, or by model2vec of its own static ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from build.verification.references.jina_v3 import with_adapter
from build.verification.references.loading import (
    BATCH,
    Embedder,
    Expected,
    check_class,
    content,
    load,
    loaded,
    package,
)


def embedder(checkpoint: str, prompts: Mapping[str, str], adapter: str | None = None) -> Embedder:
    """The embedding model in the folder or of the Hub's name `checkpoint`, with a task's adapter if one is named.

    `prompts` are the family's, for names of which the checkpoint itself says nothing.
    """
    if content(checkpoint, "config.json").get("model_type") == "model2vec":
        return _model2vec(checkpoint, prompts)
    if adapter is not None:
        return _sentence_transformer(with_adapter(checkpoint, adapter), prompts)
    check_class(checkpoint, "AutoModel")
    return _sentence_transformer(loaded("SentenceTransformer", checkpoint), prompts)


def _sentence_transformer(model: Any, prompts: Mapping[str, str]) -> Embedder:
    def embed(texts: Sequence[str], prompt_name: str) -> Expected:
        prompt = prompt_of(model, prompts, prompt_name)
        # One at a time, so that none is padded; static embeddings lay texts end to end.
        ids = [model.preprocess([prompt + text])["input_ids"].flatten().tolist() for text in texts]
        values = model.encode(list(texts), prompt=prompt, batch_size=BATCH, show_progress_bar=False)
        return Expected(np.asarray(values, np.float32), ids)

    return embed


def prompt_of(model: Any, prompts: Mapping[str, str], name: str) -> str:
    """What sentence-transformers' `model` puts before a text, or a family's own `prompts` where it has no word."""
    own: dict[str, str] = model.prompts
    # Nomic's names for the two; an empty one beside them is only sentence-transformers' default.
    names = (name, f"search_{name}") if name else (model.default_prompt_name,)
    return next((own[one] for one in names if own.get(one)), prompts.get(name, "") if name else "")


def _model2vec(checkpoint: str, prompts: Mapping[str, str]) -> Embedder:
    """By its own library: sentence-transformers keeps the tokens that it drops, and cuts no text."""
    model = load(package("model2vec").StaticModel.from_pretrained, checkpoint)

    def embed(texts: Sequence[str], prompt_name: str) -> Expected:
        read = [prompts.get(prompt_name, "") + text for text in texts]
        values = model.encode(read, show_progress_bar=False)
        if (most := model.max_length) is not None:
            read = [text[: most * model.median_token_length] for text in read]
        return Expected(np.asarray(values, np.float32), model.tokenize(read))

    return embed
