"""Batching happens inside Triton: requests of any length are merged, and equal rows are computed once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

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
    before = stack.metric("encoder_tokens_total", state="computed")
    embeddings = stack.embed(["the very same words again"] * 20)
    assert (embeddings == embeddings[0]).all()
    assert stack.metric("encoder_tokens_total", state="computed") - before == 7
