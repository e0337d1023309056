"""Reranking puts the relevant document first and orders by score."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from conftest import REFERENCE, Precision, Stack

SETS: list[dict[str, Any]] = json.loads((REFERENCE / "rerank.json").read_text())


@pytest.mark.parametrize("case", SETS, ids=[case["query"] for case in SETS])
def test_the_relevant_document_comes_first(stack: Stack, case: dict[str, Any]) -> None:
    answer = stack.rerank(case["query"], case["documents"])
    assert answer["order"][0] == case["relevant"]
    assert answer["model"] == "minilm-rerank"


def test_order_is_the_stable_descending_order_of_scores(stack: Stack) -> None:
    documents = ["Paris is in France.", "Cheese is made of milk.", "Paris is in France.", "A dog barked."]
    answer = stack.rerank("Where is Paris?", documents)
    scores = answer["scores"]
    assert scores[0] == scores[2]
    assert answer["order"] == sorted(range(4), key=lambda i: -scores[i])
    assert all(0 <= score <= 1 for score in scores)


def test_scores_are_the_reference_cosines(precise: Precision) -> None:
    """Score is (1 + cosine) / 2."""
    expected = np.load(REFERENCE / "minilm.npz")["rerank_scores"]
    scores = [s for case in SETS for s in precise.stack.rerank(case["query"], case["documents"])["scores"]]
    tolerance = {0.99999: 1e-5, 0.9995: 5e-3}[precise.minimum_cosine]
    np.testing.assert_allclose(2 * np.array(scores) - 1, expected, atol=tolerance)
