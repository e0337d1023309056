"""Batching happens inside Triton: requests of any length are merged, and equal rows are computed once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Event

import numpy as np
from conftest import Reference, Stack
from load import until


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


def long_texts(reference: Reference, name: str) -> list[str]:
    """A request full of texts that are longer than the model reads, each another."""
    words = " ".join(reference.texts)
    return [f"{name} {i} {words[100 * i : 100 * i + 4000]}" for i in range(64)]


def test_a_short_text_does_not_wait_behind_long_ones(stack: Stack, reference: Reference) -> None:
    alone = stack.embed(["a short one"])
    before = stack.statistics("minilm-tokenizer")["inference_count"]
    was = {state: stack.metric("encoder_request_us_total", state=state) for state in ("waited", "computed")}
    with ThreadPoolExecutor(4) as clients:
        calls = [clients.submit(stack.infer, "minilm", text=long_texts(reference, f"call {i}")) for i in range(4)]
        until(lambda: stack.statistics("minilm-tokenizer")["inference_count"] - before >= 4 * 64)
        short = stack.embed(["a short one"])
        assert not all(call.done() for call in calls)
        assert (short == alone).all()
        assert {call.result()["embeddings"].shape for call in calls} == {(64, 384)}
    # Triton's own durations end when the step has taken them.
    for state in ("waited", "computed"):
        until(lambda state=state: stack.metric("encoder_request_us_total", state=state) > was[state])


def test_long_texts_do_not_wait_for_ever_behind_short_ones(stack: Stack, reference: Reference) -> None:
    texts, ended = long_texts(reference, "among short ones"), Event()
    with ThreadPoolExecutor(16) as clients:

        def ask(client: int) -> int:
            for i in count():
                if ended.is_set():
                    return i
                stack.embed([f"question {i} of {client}"])
            raise AssertionError

        asked = [clients.submit(ask, i) for i in range(15)]
        try:
            among = clients.submit(stack.infer, "minilm", text=texts).result(60)["embeddings"]
        finally:
            ended.set()
        assert min(one.result() for one in asked) > 0
    assert (among == stack.embed(texts)).all()


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
    many = [f"many at once, and some of them {'long ' * (i % 9) ** 2}: {i}" for i in range(96)]
    with ThreadPoolExecutor(48) as clients:
        for vectors in (list(clients.map(lambda text: cached.embed([text]), many)) for _ in range(2)):
            assert (np.concatenate(vectors) == stack.embed(many)).all()
    assert cached.metric("nv_cache_num_hits_per_model", model="minilm-encoder") == len(many)
    texts = [f"a question that many ask, number {i}" for i in range(8)]
    first, second = ([cached.embed([text]) for text in texts] for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert all((a == stack.embed([text])).all() for a, text in zip(first, texts, strict=True))
    assert cached.metric("nv_cache_num_hits_per_model", model="minilm-encoder") == len(many) + len(texts)
    # The one key is what the encoder reads, so neither parameters nor the choice of outputs are mixed up.
    named = cached.infer("minilm", text=texts[:1])
    assert set(named) == {"embeddings", "token_count", "truncated"}
    assert cached.stop() == 0
