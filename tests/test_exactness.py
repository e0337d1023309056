"""Vectors equal sentence-transformers', and are the same bits whatever they are batched with."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from conftest import Precision, Reference, Stack, cosines


def test_vectors_equal_the_reference(precise: Precision, reference: Reference) -> None:
    embeddings = precise.stack.embed(reference.texts)
    assert embeddings.shape == reference.embeddings.shape
    assert cosines(embeddings, reference.embeddings).min() >= precise.minimum_cosine


def test_what_is_computed_in_is_told(precise: Precision) -> None:
    wanted = precise.stack.environment["ENCODER_PRECISION"]
    models = precise.stack.get("embed", "/v1/models").json()["data"]
    assert {model["id"]: model["computes_in"] for model in models} == {"minilm": wanted, "minilm-rerank": wanted}
    assert f"  computed in          {wanted} (" in precise.stack.greeting()


def test_what_is_computed_in_follows_the_cpu(stack: Stack) -> None:
    words = Path("/proc/cpuinfo").read_text().split()
    by_cpu = "bf16" if {"avx512_bf16", "amx_bf16"}.intersection(words) else "fp32"
    told = stack.get("embed", "/v1/models/minilm").json()["computes_in"]
    assert told == os.environ.get("ENCODER_PRECISION", by_cpu)


def test_vectors_have_unit_length(precise: Precision, reference: Reference) -> None:
    lengths = np.linalg.norm(precise.stack.embed(reference.texts).astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)


def test_a_text_alone_equals_itself_in_a_batch(precise: Precision, reference: Reference) -> None:
    together = precise.stack.embed(reference.texts)
    alone = np.concatenate([precise.stack.embed([text]) for text in reference.texts])
    assert (alone == together).all()


def test_order_of_the_batch_does_not_matter(precise: Precision, reference: Reference) -> None:
    together = precise.stack.embed(reference.texts)
    order = np.random.default_rng(0).permutation(len(reference.texts))
    shuffled = precise.stack.embed([reference.texts[i] for i in order])
    assert (shuffled == together[order]).all()


def test_concurrent_clients_get_the_same_vectors(precise: Precision, reference: Reference) -> None:
    together = precise.stack.embed(reference.texts)
    with ThreadPoolExecutor(32) as clients:
        alone = np.concatenate(list(clients.map(lambda text: precise.stack.embed([text]), reference.texts)))
    assert (alone == together).all()


def test_the_same_request_gives_the_same_bytes(precise: Precision, reference: Reference) -> None:
    first, second = (precise.stack.post("embed", "/embed", {"texts": reference.texts}).body for _ in range(2))
    assert first == second


def test_token_ids_equal_the_reference(stack: Stack, reference: Reference) -> None:
    for start in range(0, len(reference.texts), 64):
        texts = reference.texts[start : start + 64]
        inputs = [{"name": "text", "datatype": "BYTES", "shape": [len(texts), 1], "data": texts}]
        answer = stack.post("http", "/v2/models/minilm-tokenizer/infer", {"inputs": inputs}).json()
        outputs = {output["name"]: output for output in answer["outputs"]}
        rows = np.array(outputs["input_ids"]["data"]).reshape(outputs["input_ids"]["shape"])
        expected = reference.token_ids[start : start + 64]
        assert [row[row >= 0].tolist() for row in rows] == expected
        assert outputs["token_count"]["data"] == [len(ids) for ids in expected]
        assert outputs["truncated"]["data"] == reference.truncated[start : start + 64]
