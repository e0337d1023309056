"""Request ids, and the spans that Triton sends to an OpenTelemetry collector."""

from __future__ import annotations

import http.server
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import containers
import pytest
from aiohttp.test_utils import make_mocked_request
from conftest import Answer, Stack, free_ports, send
from tritonclient.utils import InferenceServerException

from tools.shim import tracing
from tools.shim.app import failed
from tools.shim.errors import own_error

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


def embed(stack: Stack, text: str, headers: dict[str, str]) -> Answer:
    body = json.dumps({"texts": [text]}).encode()
    return send(urllib.request.Request(stack.url("embed", "/embed"), body, headers))


@pytest.mark.parametrize("path", ["/embed", "/health", "/nothing"])
def test_a_request_id_comes_back(stack: Stack, path: str) -> None:
    request = urllib.request.Request(stack.url("embed", path), headers={"X-Request-Id": "order-66:a/b"})
    assert send(request).headers["X-Request-Id"] == "order-66:a/b"


@pytest.mark.parametrize("sent", ["", "two words", "[id]", "x" * 129, "\xe9"])
def test_an_id_that_would_spoil_a_log_is_replaced(stack: Stack, sent: str) -> None:
    first, second = (embed(stack, "a", {"X-Request-Id": sent}).headers["X-Request-Id"] for _ in range(2))
    assert len(first) == len(second) == 32
    assert first != second


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ValueError("a mistake of ours"),
            "500 internal, request id order-66: the gateway failed; see its log\nTrace",
        ),
        (InferenceServerException("it broke"), "502 upstream, request id order-66: Triton failed: it broke"),
        (TimeoutError(), "504 timeout, request id order-66: the deadline passed"),
    ],
)
def test_errors_are_logged_with_the_id(caplog: pytest.LogCaptureFixture, error: Exception, said: str) -> None:
    tracing.current.set(tracing.origin_of({"X-Request-Id": "order-66"}))
    try:
        raise error
    except Exception as raised:
        failed(make_mocked_request("POST", "/embed"), raised, own_error)
    assert said in caplog.text


Spans = Callable[[], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[str, Spans]]:
    """The URL of a collector that speaks OTLP over HTTP, and what it has received."""
    received: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in content["resourceSpans"]:
                names = {item["key"]: item["value"]["stringValue"] for item in resource["resource"]["attributes"]}
                for scope in resource["scopeSpans"]:
                    received.extend(span | {"service": names["service.name"]} for span in scope["spans"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    (port,) = free_ports(1)
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{port}/v1/traces", lambda: list(received)
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def traced_stack(collector: tuple[str, Spans], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "200"}
    running = Stack(tmp_path_factory.mktemp("traced"), ["--trace-url", collector[0]], environment).start()
    yield running
    assert running.stop() == 0


def parents(spans: list[dict[str, Any]]) -> dict[str, str]:
    """Each span's name and that of the one it belongs to; an id where that is none of them."""
    by_id = {span["spanId"]: span["name"] for span in spans}
    return {span["name"]: by_id.get(span["parentSpanId"], span["parentSpanId"]) for span in spans}


def test_spans_join_the_callers_trace(traced_stack: Stack, collector: tuple[str, Spans]) -> None:
    """Every step of the ensemble, under the caller's own span, with the request's id."""
    _, spans = collector
    assert embed(traced_stack, "not traced", {}).status == 200
    steps = ["minilm-tokenizer", "minilm-encoder"]
    expected = {"InferRequest": PARENT, "minilm": "InferRequest", **dict.fromkeys(steps, "minilm")}

    def arrived() -> bool:
        """Whether a call's spans have come: Triton loses some where the machine is busy, until the next call."""
        before = len(spans())
        headers = {"traceparent": TRACEPARENT, "X-Request-Id": "order-66"}
        assert embed(traced_stack, "traced", headers).status == 200
        time.sleep(1)
        return expected.items() <= parents(spans()[before:]).items()

    containers.until(arrived, 60)
    found = spans()
    assert {span["traceId"] for span in found} == {TRACE}
    assert {span["service"] for span in found} == {"triton"}
    ids = {
        item["value"]["stringValue"]
        for span in found
        for item in span.get("attributes", [])
        if item["key"] == "triton.request_id"
    }
    assert ids == {"order-66"}


@pytest.mark.parametrize("traceparent", ["", "nonsense", f"00-{TRACE}-{PARENT}", f"00-{'0' * 31}\xe9-{PARENT}-01"])
def test_a_damaged_trace_context_is_not_passed_on(stack: Stack, traceparent: str) -> None:
    assert embed(stack, "a", {"traceparent": traceparent, "tracestate": "\xe9"}).status == 200


def test_a_url_that_is_none(tmp_path: Path) -> None:
    stack = Stack(tmp_path, ["--trace-url", "localhost:4318"])
    stack.launch()
    assert "'localhost:4318' is not a URL such as http://localhost:4318/v1/traces" in stack.errors()
    assert stack.process.returncode == 2
