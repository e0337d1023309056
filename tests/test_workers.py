"""Several processes of the gateway on the same ports: `--workers`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from conftest import ROOT, Reference, Stack
from test_lifecycle import assert_nothing_left
from tritonclient.grpc.service_pb2 import ModelConfigRequest, ModelConfigResponse, ModelInferRequest
from tritonclient.grpc.service_pb2 import ModelInferResponse as Answer
from tritonclient.grpc.service_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

from build.config import read_config
from tools.bench.server import free_ports


class Front:
    """A gateway of two processes before a Triton that runs elsewhere."""

    def __init__(self, triton: int, *options: str) -> None:
        self.port, other = free_ports(2)
        words = ["--triton", f"127.0.0.1:{triton}", "--embed-port", str(self.port), "--rerank-port", str(other)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.shim", "--workers", "2", *words, *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert "Triton at" in self.process.stdout.readline()

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def connect(self) -> HTTPConnection:
        """A connection that is open."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.connect()
        return connection

    def metrics(self) -> dict[str, float]:
        connection = self.connect()
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return {name: float(number) for name, number in (x.rsplit(" ", 1) for x in lines if x[0] != "#")}

    def embed(self, texts: list[str], connection: HTTPConnection | None = None) -> np.ndarray:
        own = connection or self.connect()
        own.request("POST", "/embed", json.dumps({"texts": texts}))
        answer = own.getresponse()
        body = answer.read()
        if connection is None:
            own.close()
        assert answer.status == 200, body
        return np.array(json.loads(body)["embeddings"], np.float32)

    def stop(self) -> tuple[int, str]:
        """Ends it; its exit status and what it said on stderr."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


def callers(worker: psutil.Process, port: int) -> int:
    """How many connections to a port a process has let in."""
    found = worker.net_connections("tcp")
    return sum(one.status == psutil.CONN_ESTABLISHED and one.laddr[1] == port for one in found)


@pytest.fixture
def front(stack: Stack) -> Iterator[Front]:
    running = Front(stack.ports["grpc"])
    yield running
    running.stop()


def test_the_metrics_of_any_are_those_of_all(front: Front, stack: Stack) -> None:
    expected = stack.embed(["a text"])
    with ExitStack() as opened:
        connections = [front.connect() for _ in range(32)]
        for connection in connections:
            opened.callback(connection.close)
        for connection in connections:  # which has been let in by one or the other
            assert (front.embed(["a text"], connection) == expected).all()
        held = [callers(worker, front.port) for worker in front.workers()]
        assert len(held) == 2
        assert all(held)
        assert sum(held) == 32
        for _ in range(16):
            seen = front.metrics()
            assert seen['gateway_texts_total{model="minilm"}'] == 32
            assert seen['gateway_call_seconds_count{route="/embed"}'] == 32
            assert seen['gateway_model_ready{model="minilm"}'] == 1
            assert seen["gateway_calls_in_flight"] == 0
        # Every page of memory but those that both have of the same libraries.
        own = sum(worker.memory_info().rss for worker in front.workers())
        assert front.metrics()["process_resident_memory_bytes"] == pytest.approx(own, rel=0.1)


def test_a_killed_worker_loses_no_later_call(front: Front) -> None:
    for i in range(20):
        front.embed([f"before {i}"])
    victim, other = front.workers()
    victim.kill()
    psutil.wait_procs([victim], timeout=10)
    for i in range(40):
        front.embed([f"after {i}"])
    assert front.metrics()['gateway_texts_total{model="minilm"}'] == 60
    until = time.monotonic() + 60
    while len(front.workers()) < 2 or not all(one.net_connections("tcp") for one in front.workers()):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert victim.pid not in (one.pid for one in front.workers())
    other.kill()
    psutil.wait_procs([other], timeout=10)
    for i in range(40):
        front.embed([f"by the new one {i}"])
    assert front.metrics()['gateway_texts_total{model="minilm"}'] == 100
    status, errors = front.stop()
    assert status == 0
    assert f"worker {victim.pid} of the gateway was killed (SIGKILL" in errors


def test_workers_end_with_the_command(front: Front) -> None:
    workers = front.workers()
    front.process.kill()
    front.process.communicate(timeout=10)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


class Slow(GRPCInferenceServiceServicer):  # type: ignore[misc]
    """A Triton that has minilm, and answers when it is let to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.under_way = self.most = 0
        self._lock = threading.Lock()

    def ModelConfig(self, request: ModelConfigRequest, _: Any) -> ModelConfigResponse:  # noqa: N802
        return ModelConfigResponse(config=read_config(ROOT / "model_repository", request.name))

    def ModelInfer(self, request: ModelInferRequest, _: Any) -> Answer:  # noqa: N802
        with self._lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        self.go.wait(100)
        with self._lock:
            self.under_way -= 1
        answer = Answer(model_name="minilm")
        (count, _one) = request.inputs[0].shape
        for name, kind, array in (
            ("embeddings", "FP32", np.ones((count, 384), np.float32)),
            ("token_count", "INT32", np.ones((count, 1), np.int32)),
            ("truncated", "BOOL", np.zeros((count, 1), np.bool_)),
        ):
            answer.outputs.add(name=name, datatype=kind, shape=array.shape)
            answer.raw_output_contents.append(array.tobytes())
        return answer


@pytest.mark.parametrize(("texts", "limit"), [(1, 64), (200, 4)])
def test_all_together_have_no_more_under_way_than_one(texts: int, limit: int) -> None:
    slow = Slow()
    with ThreadPoolExecutor(128) as pool, ThreadPoolExecutor(160) as clients:
        triton = grpc.server(pool)
        add_GRPCInferenceServiceServicer_to_server(slow, triton)
        port = triton.add_insecure_port("127.0.0.1:0")
        triton.start()
        front = Front(port, "--models", "minilm")
        try:
            connections = [front.connect() for _ in range(160)]
            bodies = [[f"{i} of {j}" for i in range(texts)] for j in range(160)]
            calls = [clients.submit(front.embed, *call) for call in zip(bodies, connections, strict=True)]
            until = time.monotonic() + 60
            while slow.under_way < limit:  # both have more callers than their share
                assert time.monotonic() < until, slow.under_way
                time.sleep(0.05)
            time.sleep(1)
            assert slow.under_way == slow.most == limit
            slow.go.set()
            assert all(call.result().shape == (texts, 384) for call in calls)
            assert slow.most == limit
        finally:
            slow.go.set()
            for connection in connections:
                connection.close()
            front.stop()
            triton.stop(None).wait()


def test_sigterm_answers_what_is_under_way(tmp_path: Path, reference: Reference) -> None:
    stack = Stack(tmp_path / "stack", ["--workers", "2"]).start()
    processes = stack.tree()
    expected = stack.embed(reference.texts)
    workers = [one for one in psutil.Process(stack.process.pid).children() if one.name() != "tritonserver"]
    with ThreadPoolExecutor(32) as clients:
        list(clients.map(stack.embed, [["that each of them knows Triton"]] * 64))
        stack.triton().send_signal(signal.SIGSTOP)  # or the first would be answered before the last one comes
        calls = [clients.submit(stack.embed, reference.texts[i::32]) for i in range(32)]
        port = stack.ports["embed"]
        while sum(callers(worker, port) for worker in workers) < 32:
            time.sleep(0.01)
        time.sleep(2)  # the gateway has read them all
        stack.process.send_signal(signal.SIGTERM)
        stack.triton().send_signal(signal.SIGCONT)
        vectors = [call.result() for call in calls]
    assert all((vectors[i] == expected[i::32]).all() for i in range(32))
    assert stack.process.wait(60) == 0
    assert_nothing_left(stack, processes)


def test_of_several_none_loads_models(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "stack", ["--workers", "2", "--preload", "minilm"]).start()
    try:
        served = stack.get("embed", "/models").json()["models"]
        assert [one["name"] for one in served] == ["minilm", "minilm-rerank"]
        answer = stack.post("embed", "/models/minilm/unload", {})
        assert (answer.status, answer.json()["error"]) == (
            400,
            "this server's models are loaded when it starts, and stay: start it again to load others",
        )
    finally:
        assert stack.stop() == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--workers", "0"], "'0' is no number of processes from 1 to 64"),
        (["--workers", "two"], "'two' is no number of processes from 1 to 64"),
        (["--workers", "65"], "'65' is no number of processes from 1 to 64"),
        (["--workers", "2", "--keep-alive", "60"], "several --workers unload nothing: leave --keep-alive out"),
    ],
)
def test_what_cannot_be_is_said(options: list[str], sentence: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.serve", *options], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
