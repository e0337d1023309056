"""How a family's answers are compared with its reference's: one row for each text or pair, and what follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from build.verification.references.loading import (
    Array,
    Classifier,
    Embedder,
    Expected,
    MultiEmbedder,
    Pair,
    Scorer,
    cosines,
)
from build.verification.served import Served

T = TypeVar("T")

PROMPTS = ("", "query", "document")
WORST = 10
LENGTHS = 0.99
"""What the shorter of two vectors must have of the longer one's length."""
MEASURES = {
    "embed": "cosine",
    "embed_sparse": "cosine",
    "embed_all": "lowest cosine",
    "classify": "1 - difference",
    "rerank": "1 - difference",
}
"""What a family does -> how its agreement is measured."""


@dataclass(frozen=True)
class Row:
    """One text, or one pair, as the family and as the reference see it."""

    prompt: str
    """The name of the prompt before the text, "plain" for none and "pairs" for pairs."""
    text: str
    """A pair is joined by a line break."""
    tokens: int
    truncated: bool
    agreement: float
    """The cosine of two embeddings, or the share of one's length in the other's where these differ by more than
    LENGTHS allows; or 1 less the difference of two scores, in 0..1."""
    served: float
    """The norm of the family's embedding, or its score."""
    reference: float
    """That of the reference."""
    same_ids: bool | None
    """Whether the token ids are equal, None where they cannot be asked for."""


def compare_embeddings(served: Served, embed: Embedder, texts: Sequence[str]) -> list[Row]:
    """Every text, plain and with each prompt."""
    rows = []
    for prompt, answer, ids, expected in _asked(served, embed, texts):
        embeddings = answer["embeddings"]
        # A family may be cut to its first dimensions, and a cosine is the same before the norm.
        values = expected.values[:, : embeddings.shape[1]]
        sizes = [np.linalg.norm(vectors, axis=1) for vectors in (embeddings, values)]
        whole = np.linalg.norm(expected.values, axis=1)
        if np.allclose(whole, 1, atol=1e-3):  # which a cut is brought to again
            sizes[1] = whole
        agreement = _agreement(embeddings, values, sizes)
        rows += _rows(prompt, texts, answer, agreement, sizes, ids, expected.token_ids)
    return rows


def compare_sparse(served: Served, embed: Embedder, texts: Sequence[str]) -> list[Row]:
    """Every text, plain and with each prompt; its weights are a vector of the vocabulary's size."""
    rows = []
    for prompt, answer, ids, expected in _asked(served, embed, texts):
        found = np.zeros_like(expected.values)
        for row, places, values in zip(found, answer["indices"], answer["values"], strict=True):
            row[places[places >= 0]] = values[places >= 0]
        sizes = [np.linalg.norm(vectors, axis=1) for vectors in (found, expected.values)]
        agreement = _agreement(found, expected.values, sizes)
        rows += _rows(prompt, texts, answer, agreement, sizes, ids, expected.token_ids)
    return rows


def compare_vectors(served: Served, embed: MultiEmbedder, texts: Sequence[str]) -> list[Row]:
    """Every text, plain and with each prompt: the lowest agreement of its vectors, -1 where counts differ."""
    rows = []
    for prompt, answer, ids, expected in _asked(served, embed, texts):
        if ids is not None:  # of tokens that are seen by none they come raised
            ids = [[token % expected.vocabulary for token in row] for row in ids]
        counts = [answer["vector_count"][:, 0], np.array([len(vectors) for vectors in expected.values])]
        agreement = np.full(len(texts), -1.0)
        for i, vectors in enumerate(expected.values):
            if counts[0][i] == counts[1][i]:
                own = answer["token_embeddings"][i, : len(vectors)]
                sizes = [np.linalg.norm(one, axis=1) for one in (own, vectors)]
                agreement[i] = _agreement(own, vectors, sizes).min(initial=1)
        rows += _rows(prompt, texts, answer, agreement, counts, ids, expected.token_ids)
    return rows


def compare_classes(served: Served, classify: Classifier, pairs: Sequence[Pair]) -> list[Row]:
    """The first text of each pair, and every pair: the largest difference of a label's probability."""
    rows = []
    for name, inputs in (("plain", [pair[:1] for pair in pairs]), ("pairs", [tuple(pair) for pair in pairs])):
        columns = dict(zip(("text", "text_pair"), zip(*inputs, strict=True), strict=False))
        answer, ids, expected = served.answer(**columns), served.token_ids(**columns), classify(inputs)
        found = answer["probabilities"]
        agreement = 1 - np.abs(found.astype(np.float64) - expected.values).max(axis=1)
        sizes = [values.max(axis=1) for values in (found, expected.values)]
        texts = ["\n".join(one) for one in inputs]
        rows += _rows(name, texts, answer, agreement, sizes, ids, _raised(served, expected))
    return rows


def compare_scores(served: Served, score: Scorer, pairs: Sequence[Pair]) -> list[Row]:
    """Every pair."""
    columns = {"query": [query for query, _ in pairs], "passage": [passage for _, passage in pairs]}
    answer, ids, expected = served.answer(**columns), served.token_ids(**columns), score(pairs)
    scores = answer["score"][:, 0]
    both = [values.astype(np.float64) for values in (scores, expected.values)]
    if both[1].min() < 0 or both[1].max() > 1:  # logits, of which a difference says little
        both = [1 / (1 + np.exp(-values)) for values in both]
    agreement = 1 - np.abs(both[0] - both[1])
    texts = ["\n".join(pair) for pair in pairs]
    return _rows("pairs", texts, answer, agreement, [scores, expected.values], ids, _raised(served, expected))


def _asked(
    served: Served, embed: Callable[[Sequence[str], str], T], texts: Sequence[str]
) -> Iterator[tuple[str, dict[str, npt.NDArray[Any]], list[list[int]] | None, T]]:
    """What a row is headed by, the family's answer and token ids, and the reference's: plain, by each prompt."""
    for prompt in PROMPTS:
        columns = {"text": texts} | ({"prompt_name": [prompt] * len(texts)} if prompt else {})
        yield prompt or "plain", served.answer(**columns), served.token_ids(**columns), embed(texts, prompt)


def _raised(served: Served, expected: Expected) -> list[list[int]] | None:
    """The reference's ids; a family's of a second text come raised, to tell it from the first."""
    offset = served.parameter("segment_offset")
    if not offset or not expected.token_ids or not expected.token_types:
        return expected.token_ids
    return [
        [token + offset * kind for token, kind in zip(*row, strict=True)]
        for row in zip(expected.token_ids, expected.token_types, strict=True)
    ]


def _agreement(a: Array, b: Array, sizes: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
    """The cosine of rows of these lengths, or what one has of the other's length; two of zeros agree."""
    longer = np.minimum(*sizes) / np.maximum(np.maximum(*sizes), 1e-12)
    found = np.where(longer >= LENGTHS, cosines(a, b), np.minimum(cosines(a, b), longer))
    return np.where((sizes[0] == 0) & (sizes[1] == 0), 1.0, found)


def _rows(
    prompt: str,
    texts: Sequence[str],
    answer: dict[str, npt.NDArray[Any]],
    agreement: npt.NDArray[np.float64],
    sizes: Sequence[npt.NDArray[Any]],
    ids: list[list[int]] | None,
    expected_ids: list[list[int]] | None,
) -> list[Row]:
    agreement = np.nan_to_num(agreement, nan=-1)
    return [
        Row(
            prompt=prompt,
            text=text,
            tokens=int(answer["token_count"][i, 0]),
            truncated=bool(answer["truncated"][i, 0]),
            agreement=float(agreement[i]),
            served=float(sizes[0][i]),
            reference=float(sizes[1][i]),
            same_ids=None if ids is None or expected_ids is None else ids[i] == expected_ids[i],
        )
        for i, text in enumerate(texts)
    ]


def summarise(rows: Sequence[Row], tolerance: float) -> dict[str, Any]:
    """The part of a report that follows from the rows; `passed` wants every row within `tolerance` and its ids."""
    worst = sorted(rows, key=lambda row: row.agreement)[:WORST]
    compared = [row for row in rows if row.same_ids is not None]
    different = [row for row in compared if not row.same_ids]
    return {
        "texts": len(rows),
        "tokens": sum(row.tokens for row in rows),
        "truncated": sum(row.truncated for row in rows),
        "agreement": {
            prompt: percentiles([row.agreement for row in rows if row.prompt == prompt])
            for prompt in dict.fromkeys(row.prompt for row in rows)
        },
        "token_ids": {
            "compared": len(compared),
            "different": len(different),
            "examples": [{"prompt": row.prompt, "text": row.text} for row in different[:WORST]],
        },
        "worst": [{name: _finite(value) for name, value in vars(row).items()} for row in worst],
        "tolerance": tolerance,
        "passed": not different and worst[0].agreement >= tolerance,
    }


def _finite(value: object) -> object:
    """JSON has no word for what is not a number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Count, minimum, mean and percentiles of `values`."""
    found = np.percentile(values, [1, 5, 50])
    return {
        "count": len(values),
        "min": min(values),
        "mean": float(np.mean(values)),
        **{name: float(value) for name, value in zip(("p1", "p5", "p50"), found, strict=True)},
    }


def table(report: dict[str, Any]) -> list[str]:
    """The report in a few lines."""
    measure = MEASURES[report["task"]]
    ids, worst = report["token_ids"], report["worst"][0]
    equal = f"{ids['compared'] - ids['different']} of {ids['compared']} equal" if ids["compared"] else "not asked"
    text = " ".join(worst["text"].split())
    lines = [
        f"{report['family']} on {report['server']} against {report['reference']}",
        f"{'':10} {'count':>5}  {measure + ': min':>20} {'mean':>11} {'p1':>11} {'p50':>11}",
    ]
    for prompt, numbers in report["agreement"].items():
        shown = " ".join(f"{numbers[name]:11.8f}" for name in ("mean", "p1", "p50"))
        lines.append(f"{prompt:10} {numbers['count']:5}  {numbers['min']:20.8f} {shown}")
    lines.append(f"token ids  {equal}; {report['tokens']} tokens, {report['truncated']} texts cut")
    lines.append(f"worst      {1 - worst['agreement']:.1e} off, {worst['tokens']} tokens: {text[:60]!r}")
    lines.append(f"{'passed' if report['passed'] else 'FAILED'}     tolerance {report['tolerance']}")
    return lines
