"""Batching happens inside Triton: requests of any length are merged, and equal rows are computed once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conftest import Reference, Stack


def test_requests_of_different_lengths_are_merged(stack: Stack, reference: Reference) -> None:
    # No two of these texts have the same number of tokens, so every merged batch is of mixed lengths.
    by_length = {len(ids): text for ids, text in zip(reference.token_ids, reference.texts, strict=True)}
    texts = list(by_length.values())
    before = stack.statistics("minilm-encoder")
    with ThreadPoolExecutor(32) as clients:
        list(clients.map(lambda text: stack.embed([text]), texts))
    after = stack.statistics("minilm-encoder")
    served = after["inference_count"] - before["inference_count"]
    batches = after["execution_count"] - before["execution_count"]
    assert served == len(texts) > 100
    assert served / batches > 2
    assert max(item["batch_size"] for item in after["batch_stats"]) > 4


def test_a_query_is_encoded_once_for_all_its_passages(stack: Stack, reference: Reference) -> None:
    query = reference.texts[max(range(240), key=lambda i: len(reference.token_ids[i]))]
    passages = [f"passage number {i}" for i in range(32)]
    before = {state: stack.metric("encoder_tokens_total", state=state) for state in ("received", "computed")}
    stack.rerank(query, passages)
    received, computed = (
        stack.metric("encoder_tokens_total", state=state) - before[state] for state in ("received", "computed")
    )
    of_passages = received - 32 * 256
    assert 32 * 4 <= of_passages <= 32 * 8
    # Query and passages reach the encoder as two batches or as one; the query costs its 256 tokens once.
    assert computed == 256 + of_passages


def test_equal_texts_of_a_call_are_computed_once(stack: Stack) -> None:
    """Also where they would be spread over many requests."""
    before = stack.metric("encoder_tokens_total", state="received")
    embeddings = stack.embed(["the very same words again", "other words"] * 500)
    assert (embeddings[::2] == embeddings[0]).all()
    assert (embeddings[1::2] == embeddings[1]).all()
    assert (embeddings[0] != embeddings[1]).any()
    assert stack.metric("encoder_tokens_total", state="received") - before == 7 + 4


def test_a_cache_answers_what_comes_again(tmp_path: Path, stack: Stack) -> None:
    cached = Stack(tmp_path, ["--cache-mb", "16"]).start()
    texts = [f"a question that many ask, number {i}" for i in range(8)]
    first, second = ([cached.embed([text]) for text in texts] for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert all((a == stack.embed([text])).all() for a, text in zip(first, texts, strict=True))
    assert cached.metric("nv_cache_num_hits_per_model", model="minilm-encoder") == len(texts)
    # The one key is what the encoder reads, so neither parameters nor the choice of outputs are mixed up.
    named = cached.infer("minilm", text=texts[:1])
    assert set(named) == {"embeddings", "token_count", "truncated"}
    assert cached.stop() == 0
