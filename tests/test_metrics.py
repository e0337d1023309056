"""What the gateway counts: `/metrics`, and what `/health` says of GPUs."""

from __future__ import annotations

import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, Reference, Stack
from load import Split

from tools.shim import gpu
from tools.shim.metrics import WATCHED_ERRORS


@pytest.fixture
def change(stack: Stack) -> Callable[..., float]:
    """By how much a counter of the gateway has grown since the test began; one that was not there counts as 0."""
    before = samples(stack)
    return lambda series: samples(stack).get(series, 0) - before.get(series, 0)


def samples(stack: Stack) -> dict[str, float]:
    """Series -> value, as the gateway shows them."""
    lines = stack.get("embed", "/metrics").body.decode().splitlines()
    return {series: float(value) for series, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}


def test_a_call_is_counted(stack: Stack, reference: Reference, change: Callable[..., float]) -> None:
    texts = reference.texts[:40]
    answer = stack.post("embed", "/embed", {"texts": texts})
    assert change('gateway_requests_total{route="/embed",status="200"}') == 1
    assert change('gateway_call_seconds_count{route="/embed"}') == 1
    assert change('gateway_texts_total{model="minilm"}') == 40
    assert change('gateway_tokens_total{model="minilm"}') == int(answer.headers["X-Token-Count"])
    assert change('gateway_tokens_total{model="minilm"}') == sum(map(len, reference.token_ids[:40]))
    assert change('gateway_truncated_texts_total{model="minilm"}') == sum(reference.truncated[:40]) > 0
    assert samples(stack)["gateway_calls_in_flight"] == 0


def test_the_page_names_every_metric(stack: Stack) -> None:
    stack.embed(["a"])
    families = re.findall(r"^# TYPE (gateway_\w+)", stack.get("embed", "/metrics").body.decode(), re.MULTILINE)
    assert set(re.findall(r"`(gateway_\w+)`", (ROOT / "docs" / "operations.md").read_text())) == set(families)


def test_stages_are_those_of_server_timing(stack: Stack, change: Callable[..., float]) -> None:
    timing = dict(
        re.findall(r"(\w+);dur=([\d.]+)", stack.post("embed", "/embed", {"texts": ["a"]}).headers["Server-Timing"])
    )
    assert list(timing) == ["parse", "queue", "triton", "render"]
    for stage, milliseconds in timing.items():
        assert change(f'gateway_stage_seconds_count{{stage="{stage}"}}') == 1
        seconds = change(f'gateway_stage_seconds_sum{{stage="{stage}"}}')
        assert seconds == pytest.approx(float(milliseconds) / 1000, abs=6e-6)
    total = change('gateway_call_seconds_sum{route="/embed"}')
    assert total >= sum(map(float, timing.values())) / 1000 - 2e-5


@pytest.mark.parametrize(
    ("path", "body", "route", "status", "kind"),
    [
        ("/embed", b'{"texts": []}', "/embed", 400, "bad_request"),
        ("/v1/embeddings", b'{"input": "a", "model": "nonsense"}', "/v1/embeddings", 404, "unknown_model"),
        ("/made/up", b"{}", "none", 404, "not_found"),
        ("/health", b"{}", "none", 405, "method_not_allowed"),
    ],
)
def test_a_refusal_is_counted(
    stack: Stack, change: Callable[..., float], path: str, body: bytes, route: str, status: int, kind: str
) -> None:
    assert stack.post("embed", path, body).status == status
    assert change(f'gateway_requests_total{{route="{route}",status="{status}"}}') == 1
    assert change(f'gateway_errors_total{{type="{kind}"}}') == 1
    assert change(f'gateway_call_seconds_count{{route="{route}"}}') == 1


def test_what_callers_make_up_becomes_no_series(stack: Stack) -> None:
    before = len(samples(stack))
    for i in range(20):
        stack.post("embed", f"/path/{i}", {})
        stack.post("embed", "/embed", {"texts": ["a"], "model": f"model-{i}"})
    assert len(samples(stack)) <= before + 50  # the buckets of two histograms, and a few counters


def test_errors_are_there_before_the_first(stack: Stack) -> None:
    assert {f'gateway_errors_total{{type="{kind}"}}' for kind in WATCHED_ERRORS} <= set(samples(stack))


def test_a_caller_that_goes_away_is_counted(stack: Stack, change: Callable[..., float]) -> None:
    body = b'{"texts": [%s]}' % b", ".join(b'"%d %s"' % (i, b"many words " * 100) for i in range(500))
    with socket.create_connection(("127.0.0.1", stack.ports["embed"])) as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        while not samples(stack)["gateway_calls_in_flight"]:
            time.sleep(0.02)
    while not change('gateway_requests_total{route="/embed",status="499"}'):
        time.sleep(0.02)
    assert samples(stack)["gateway_calls_in_flight"] == 0


def test_a_dead_process_is_seen_without_a_caller(tmp_path: Path) -> None:
    """With the supervisor stopped, which would not let Triton survive the death of a step."""
    own = Split(tmp_path).start()
    supervisor, triton = own.commands["triton"], own.tritonserver()

    def ready() -> dict[str, float]:
        names = {name: f'gateway_model_ready{{model="{name}"}}' for name in ("minilm", "minilm-rerank")}
        found = samples(own)
        return {name: found[series] for name, series in names.items()}

    try:
        assert ready() == {"minilm": 1, "minilm-rerank": 1}
        supervisor.send_signal(signal.SIGSTOP)
        next(step for step in triton.children() if "minilm-rerank-scoring" in " ".join(step.cmdline())).kill()
        time.sleep(5)  # as long as the last good answer counts
        assert ready() == {"minilm": 1, "minilm-rerank": 0}
        assert own.get("http", "/v2/health/ready").status == 200
        triton.suspend()  # nothing answers any more, and nothing refuses either
        time.sleep(5)
        started = time.monotonic()
        assert ready() == {"minilm": 0, "minilm-rerank": 0}
        assert time.monotonic() - started < 9  # Prometheus waits ten seconds
    finally:
        triton.resume()
        supervisor.send_signal(signal.SIGCONT)
        own.end()


def test_gpus(stack: Stack) -> None:
    """Where there are none: what is asked of NVML is tested below."""
    answer = stack.get("embed", "/health?verbose=1")
    assert (answer.status, answer.json()["status"]) == (200, "ready")
    assert [one["uuid"] for one in answer.json()["gpus"]] == [one["uuid"] for one in gpu.snapshot()]
    assert "gpus" not in stack.get("embed", "/health?verbose=0").json()
    refused = stack.get("embed", "/health?verbose=yes")
    assert (refused.status, refused.json()["error"]) == (400, "verbose is 0 or 1, not 'yes'")


def test_a_gpu_that_does_not_say_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nvidia-ml-py's names and units, over a driver that is not there."""
    import pynvml

    def refuses(*_: Any) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    answers = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetName": "NVIDIA X",
        "nvmlDeviceGetUUID": "GPU-0",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80, used=0),
        "nvmlDeviceGetPowerUsage": 71_500,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, lambda *_, answer=answer: answer)
    for name in ("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetTemperature"):
        monkeypatch.setattr(pynvml, name, refuses)
    assert gpu.snapshot() == [
        {
            "name": "NVIDIA X",
            "uuid": "GPU-0",
            "utilization_percent": None,
            "memory_used_bytes": 0,
            "memory_total_bytes": 80,
            "temperature_celsius": None,
            "power_watts": 71.5,
        }
    ]
    monkeypatch.setattr(pynvml, "nvmlInit", refuses)
    assert gpu.snapshot() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu.snapshot() == []
