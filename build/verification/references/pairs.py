"""Scores of pairs: cross-encoders, language models that are asked, and embedding models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from build.errors import BuildError
from build.graphs.templates import MXBAI_RERANKER, QWEN3_RERANKER
from build.verification.references.embeddings import embedder
from build.verification.references.loading import (
    BATCH,
    FP32,
    Expected,
    Pair,
    Scorer,
    architecture,
    check_class,
    cosines,
    find,
    loaded,
    package,
    pretrained,
)

ASKED = {
    "Qwen3ForCausalLM": ("AutoModelForCausalLM", "yes", "no"),
    "Qwen3ForSequenceClassification": ("AutoModelForSequenceClassification", "", ""),
    "Qwen2ForCausalLM": ("AutoModelForCausalLM", "1", "0"),
}
"""Class -> what loads it, and the tokens whose logits are compared; a classifier has the difference of both."""

Words: TypeAlias = Callable[[Pair], list[int]]
"""(query, passage) -> the token ids of all that a language model is asked."""


def scorer(checkpoint: str, max_tokens: int) -> Scorer:
    """The reranker in the folder or of the Hub's name `checkpoint`, of whichever kind its configuration says."""
    kind = architecture(checkpoint)
    if kind in ASKED and find(checkpoint, "modules.json") is None:
        return _asked(checkpoint, kind, max_tokens)
    if kind.endswith("ForSequenceClassification"):
        check_class(checkpoint, "AutoModelForSequenceClassification")
    elif not kind.endswith(("ForCausalLM", "VLForConditionalGeneration")):
        raise BuildError(f"the reference {checkpoint} is of {kind or 'no class'}, which gives no score of a pair")
    return _cross_encoder(checkpoint)


def cosine_scorer(checkpoint: str, adapter: str | None = None) -> Scorer:
    """What an embedding model's vectors make of pairs, without prompts: (1 + cosine) / 2."""
    embed = embedder(checkpoint, {}, adapter)

    def score(pairs: Sequence[Pair]) -> Expected:
        queries, passages = (embed([pair[side] for pair in pairs], "").values for side in (0, 1))
        return Expected(((1 + cosines(queries, passages)) / 2).astype(np.float32))

    return score


def _cross_encoder(checkpoint: str) -> Scorer:
    model = loaded("CrossEncoder", checkpoint)

    def score(pairs: Sequence[Pair]) -> Expected:
        features = [model.preprocess([pair]) for pair in pairs]
        ids, types = (
            [feature[name][0].tolist() for feature in features] if name in features[0] else None
            for name in ("input_ids", "token_type_ids")
        )
        values = model.predict(list(pairs), batch_size=BATCH, show_progress_bar=False)
        return Expected(np.asarray(values, np.float32), ids, types)

    return score


def _asked(checkpoint: str, kind: str, max_tokens: int) -> Scorer:
    """The share of one token's probability in that of two, at the last position."""
    torch = package("torch")
    loader, yes, no = ASKED[kind]
    tokenizer = pretrained("AutoTokenizer", checkpoint)
    model = pretrained(loader, checkpoint, **FP32).eval()
    words = (_mxbai if kind == "Qwen2ForCausalLM" else _qwen3)(tokenizer, max_tokens)
    both = tokenizer.convert_tokens_to_ids([yes, no]) if yes else []

    def logit(ids: list[int]) -> Any:
        logits = model(torch.tensor([ids], device=model.device)).logits[0]
        return logits[-1, both[0]] - logits[-1, both[1]] if both else logits[0]

    def score(pairs: Sequence[Pair]) -> Expected:
        fed = [words(pair) for pair in pairs]
        with torch.inference_mode():
            values = torch.stack([logit(ids) for ids in fed]).sigmoid()
        return Expected(values.cpu().numpy(), fed)

    return score


def _qwen3(tokenizer: Any, max_tokens: int) -> Words:
    """As the sample for transformers on Qwen3-Reranker's model card lays a pair out, and cuts it."""
    template = QWEN3_RERANKER
    prefix, suffix = (tokenizer.encode(template[end], add_special_tokens=False) for end in ("prefix", "suffix"))
    room = max_tokens - len(prefix) - len(suffix)

    def words(pair: Pair) -> list[int]:
        body = template["body"].format(instruction=template["instruction"], query=pair[0], passage=pair[1])
        return [*prefix, *tokenizer(body, truncation=True, max_length=room)["input_ids"], *suffix]

    return words


def _mxbai(tokenizer: Any, max_tokens: int) -> Words:
    """As the package mxbai-rerank does: parts are tokenized apart, and the query has 3/4 of the room."""
    template = MXBAI_RERANKER

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    prefix, suffix = ids(template["prefix"]), ids(template["suffix"])
    room = min(int(template["room"]), max_tokens - len(prefix) - len(suffix))

    def words(pair: Pair) -> list[int]:
        query = ids(template["query"].format(query=pair[0]))[: room * 3 // 4]
        passage = ids(template["passage"].format(passage=pair[1]))[: room - len(query)]
        return [*prefix, *query, *passage, *suffix]

    return words
