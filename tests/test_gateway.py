"""The gateway: order and count, health, and what happens to calls that are large, many or abandoned."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import Reference, Stack
from hypothesis import given
from hypothesis import strategies as st

from tools.shim import schedule
from tools.shim.body import MAX_ITEMS


def test_order_and_count_of_a_large_call(stack: Stack, reference: Reference) -> None:
    texts = [f"{reference.texts[i % 20][:40]} {i % 97}" for i in range(MAX_ITEMS)]
    embeddings = stack.embed(texts)
    assert embeddings.shape == (MAX_ITEMS, 384)
    some = range(0, MAX_ITEMS, 211)
    assert (embeddings[some] == np.concatenate([stack.embed([texts[i]]) for i in some])).all()


def test_numbers_are_exact(stack: Stack) -> None:
    """Every number of the JSON reads back as the very float32 that Triton sent."""
    body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["exactly"]}]}
    outputs = stack.post("http", "/v2/models/minilm/infer", body).json()["outputs"]
    (direct,) = (output["data"] for output in outputs if output["name"] == "embeddings")
    assert stack.embed(["exactly"])[0].tolist() == np.array(direct, np.float32).tolist()


def test_both_ports_serve_both_routes(stack: Stack) -> None:
    assert stack.post("rerank", "/embed", {"texts": ["a"]}).status == 200
    assert stack.post("embed", "/rerank", {"query": "a", "documents": ["b"]}).status == 200


def test_models_are_named_with_their_limits(stack: Stack) -> None:
    listed = stack.get("embed", "/models").json()["models"]
    assert [{fact: model[fact] for fact in list(model)[:5]} for model in listed] == [
        {"name": "minilm", "task": "embed", "max_batch_size": 64, "dimensions": 384, "max_tokens": 256},
        {"name": "minilm-rerank", "task": "rerank", "max_batch_size": 64, "dimensions": None, "max_tokens": 256},
    ]


def test_a_model_can_be_named(stack: Stack) -> None:
    assert (stack.embed(["a"], "minilm") == stack.embed(["a"])).all()


def test_healthy(stack: Stack) -> None:
    answer = stack.get("embed", "/health")
    assert (answer.status, answer.json()) == (200, {"status": "ready", "models": ["minilm", "minilm-rerank"]})


def test_a_deadline(tmp_path: Path, reference: Reference) -> None:
    stack = Stack(tmp_path, ["--timeout", "0.05"]).start()
    try:
        answer = stack.post("embed", "/embed", {"texts": reference.texts})
        assert (answer.status, answer.json()["type"]) == (504, "timeout")
    finally:
        assert stack.stop() == 0


def test_the_work_of_a_client_that_goes_away_is_dropped(own_stack: Stack) -> None:
    body = json.dumps({"texts": [f"{'seven ' * 250}{i}" for i in range(MAX_ITEMS)]}).encode()
    head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", own_stack.ports["embed"])) as connection:
        connection.sendall(head + body)
        while own_stack.metric("encoder_tokens_total", state="received") == 0:
            time.sleep(0.05)
    own_stack.embed(["the next in the queue"])
    computed = own_stack.metric("encoder_tokens_total", state="computed")
    assert computed < MAX_ITEMS * 250 / 10
    time.sleep(2)
    assert own_stack.metric("encoder_tokens_total", state="computed") == computed


@given(st.lists(st.text(max_size=50), min_size=1), st.integers(1, 64))
def test_splitting_keeps_every_text_once(texts: list[str], max_texts: int) -> None:
    requests = schedule.split([len(text.encode()) for text in texts], max_texts)
    assert sorted(i for request in requests for i in request) == list(range(len(texts)))
    assert all(0 < len(request) <= max_texts for request in requests)


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=60))
def test_requests_stay_within_their_size(sizes: list[int]) -> None:
    for request in schedule.split(sizes, 64):
        assert len(request) == 1 or sum(sizes[i] for i in request) <= schedule.REQUEST_BYTES


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=200), st.integers(1, 64), st.integers(1, 8))
def test_answers_come_back_in_order(sizes: list[int], max_texts: int, at_once: int) -> None:
    """Whatever order the requests are answered in."""
    under_way = most = 0

    async def infer(indices: list[int]) -> schedule.Tensors:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(len(indices) % 5):
            await asyncio.sleep(0)
        under_way -= 1
        return {"index": np.array(indices)[:, None]}

    tensors = asyncio.run(schedule.run(schedule.split(sizes, max_texts), infer, at_once))
    assert tensors["index"][:, 0].tolist() == list(range(len(sizes)))
    assert most <= at_once


@given(st.lists(st.integers(1, 20_000), min_size=9, max_size=60), st.integers(0, 8))
def test_a_call_is_answered_whole_or_not_at_all(sizes: list[int], failing: int) -> None:
    """The first request that fails ends the rest."""
    ended: list[bool] = []

    async def infer(indices: list[int]) -> schedule.Tensors:
        try:
            await asyncio.sleep(0 if failing in indices else 60)
            raise ValueError("it fails")
        finally:
            ended.append(True)

    async def main() -> None:
        requests = [[i] for i in range(len(sizes))]
        with pytest.raises(ValueError, match="it fails"):
            await schedule.run(requests, infer, len(requests))

    asyncio.run(main())
    assert len(ended) == len(sizes)
