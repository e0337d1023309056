"""What is refused costs the gateway nothing that lasts, and nobody else's time."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, Answer, Stack, free_ports, send
from load import Split, reset, until

MB = 2**20
LARGE = "seven " * (15 * MB // 6)
WITHIN = "X-Request-Timeout"


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Split]:
    running = Split(tmp_path_factory.mktemp("refusals") / "split")
    try:
        yield running.start()
        assert " ERROR " not in running.log("gateway")
    finally:
        running.end()


@pytest.fixture
def own_gateway(split: Split, tmp_path: Path) -> Iterator[Split]:
    """Another one in front of the same Triton; a test starts it."""
    ports = {**split.ports, **dict(zip(("embed", "rerank"), free_ports(2), strict=True))}
    gateway = Split(tmp_path / "gateway", ports=ports)
    yield gateway
    gateway.end()


def process(split: Split) -> psutil.Process:
    return psutil.Process(split.commands["gateway"].pid)


def memory(split: Split) -> float:
    """Of the gateway, in MB."""
    return float(process(split).memory_info().rss / MB)


def peak(split: Split) -> float:
    """The most memory that the gateway has had, in MB."""
    lines = Path(f"/proc/{process(split).pid}/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def cpu(split: Split) -> float:
    """Seconds of the gateway."""
    times = process(split).cpu_times()
    return float(times.user + times.system)


def post(stack: Stack, path: str, body: bytes, headers: dict[str, str] | None = None) -> Answer:
    return send(urllib.request.Request(stack.url("embed", path), body, headers or {}))


def hang_up(stack: Stack, body: bytes, share: float) -> None:
    """Sends a share of a body, or all of it, and goes away."""
    with socket.create_connection(("127.0.0.1", stack.ports["embed"])) as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body))
        connection.sendall(body[: int(len(body) * share)])
        reset(connection)


# name: (path, body, status)
LARGE_AND_REFUSED: dict[str, tuple[str, Any, int]] = {
    "too many texts": ("/embed", {"texts": ["a" * 5000] * 3000}, 413),
    "too many values": ("/embed", b'{"texts": [' + b'"",' * (5 * MB) + b'""]}', 413),
    "too many lists": ("/embed", b'{"texts": [' + b"[]," * (5 * MB) + b"[]]}", 413),
    "over the limit": ("/embed", b'{"texts": ["' + b"a" * (17 * MB), 413),
    "not JSON": ("/embed", b'{"texts": ["' + b"a" * (15 * MB), 400),
    "a number at the end": ("/embed", {"texts": [LARGE, 1]}, 400),
    "an unknown field": ("/embed", {"texts": [LARGE], LARGE[:10]: 1}, 400),
    "an unknown model": ("/embed", {"texts": [LARGE], "model": "none"}, 404),
    "an unknown prompt": ("/v1/embeddings", {"input": LARGE, "input_type": "none"}, 400),
    "refused by Triton": ("/embed", {"texts": ["a" + "\u0903" * 2_000_000, LARGE[: 3 * MB]]}, 400),
    "not to be cut": ("/v1/embeddings", {"input": LARGE, "truncate": "NONE"}, 422),
}


def encoded(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def test_refused_bodies_are_forgotten(split: Split) -> None:
    """Not when the garbage collector comes by: it counts objects, and a body of 16 MB is few."""
    bodies = {name: (path, encoded(body), status) for name, (path, body, status) in LARGE_AND_REFUSED.items()}
    for path, body, status in bodies.values():
        assert post(split, path, body).status == status
    before = memory(split)
    for name, (path, body, status) in bodies.items():
        for _ in range(6):
            assert post(split, path, body).status == status
        print(f"{name}: {memory(split) - before:.0f} MB more")
        assert memory(split) < before + 100, name


def test_what_did_not_end_is_forgotten(split: Split) -> None:
    """Deadlines that pass, callers that go away in their body or before their answer."""
    body = encoded({"texts": [LARGE, *map(str, range(300))]})
    for rounds in (2, 20):
        before = memory(split)
        for _ in range(rounds):
            assert post(split, "/embed", body, {WITHIN: "0.05"}).status in (408, 504)
            hang_up(split, body, 0.9)
            hang_up(split, body, 1)
    assert post(split, "/embed", b'{"texts": ["a"]}').status == 200
    until(lambda: memory(split) < before + 100, 20)
    print(f"{memory(split) - before:.0f} MB more")


def test_nobody_waits_for_a_body_to_be_refused(split: Split) -> None:
    """Values are counted before one is made: millions cost what one text of their length costs."""
    text = encoded({"texts": [LARGE], "model": "none"})
    for body in (b"[" * (15 * MB), b"[" + b"{}," * (5 * MB), b"[" + b"1," * (7 * MB), b"[" + b'"",' * (5 * MB)):
        took = []
        for one in (text, body):
            start = cpu(split)
            for _ in range(3):
                assert post(split, "/embed", one).status in (404, 413)
            took.append((cpu(split) - start) / 3)
        print(f"{took[0]:.2f} CPU seconds for a text, {took[1]:.2f} for values")
        assert took[1] < 2 * took[0] + 0.05


def test_a_text_that_looks_like_values(stack: Stack) -> None:
    """What stands in strings is not counted, whatever escapes it."""
    for text in ('{"a": [1, 2, "\\"]}', "\\", '"', "\\\\,", ",[]{}:" * 5):
        long = (text + " ") * (2 * MB // (len(text) + 1))
        assert post(stack, "/embed", encoded({"texts": [long, text + "a"], "model": None})).status == 200


def test_a_caller_that_hangs_up_in_its_body(own_gateway: Split) -> None:
    """Is counted as gone; nothing is logged, and no alert fires."""
    own_gateway.start_gateway()
    gone = 'gateway_requests_total{route="/embed",status="499"} '
    chunked = b'POST /embed HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"tex'
    for sent in (b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{", chunked):
        for leave in (reset, socket.socket.close):
            connection = socket.create_connection(("127.0.0.1", own_gateway.ports["embed"]))
            connection.sendall(sent)
            until(lambda: b"gateway_calls_in_flight 1" in own_gateway.get("embed", "/metrics").body)
            leave(connection)
            until(lambda: b"gateway_calls_in_flight 0" in own_gateway.get("embed", "/metrics").body)
    metrics = own_gateway.get("embed", "/metrics").body.decode()
    assert f"{gone}4.0" in metrics
    assert 'gateway_errors_total{type="internal"} 0.0' in metrics
    assert 'status="500"' not in metrics
    assert own_gateway.log("gateway") == ""


def test_idle_connections_give_way(split: Split, tmp_path: Path) -> None:
    """As many as files may be open: callers are answered all the while, and the log stays short."""
    ports = {**split.ports, **dict(zip(("embed", "rerank"), free_ports(2), strict=True))}
    few = ["sh", "-c", 'ulimit -n 110 && exec "$@"', "sh"]
    gateway = Split(tmp_path / "gateway", ports=ports, wrapper=few)
    gateway.start_gateway()
    address = ("127.0.0.1", gateway.ports["embed"])
    idle: list[socket.socket] = []
    busy: list[socket.socket] = []
    try:
        for _ in range(300):
            idle.append(socket.create_connection(address))
            if len(idle) % 50 == 0:
                assert post(gateway, "/embed", b'{"texts": ["a"]}').status == 200
        assert process(gateway).num_fds() < 110
        assert gateway.log("gateway") == ""
        # None of them gives way that has a call under way.
        for _ in range(100):
            connection = socket.create_connection(address)
            connection.sendall(b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
            busy.append(connection)
        time.sleep(1)  # until their calls are under way
        with socket.create_connection(address, timeout=20) as last:
            answer = last.recv(4096)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: 1" in answer
        said = gateway.log("gateway").splitlines()
        assert 1 <= len(said) < 10
    finally:
        for connection in (*idle, *busy):
            reset(connection)
        until(lambda: post(gateway, "/embed", b'{"texts": ["a"]}').status == 200)
        gateway.end()


def test_too_few_files_to_start() -> None:
    command = 'ulimit -n 64 && exec "$@"'
    ports = [
        word
        for name, port in zip(("embed", "rerank"), free_ports(2), strict=True)
        for word in (f"--{name}-port", str(port))
    ]
    done = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-m", "tools.shim", *ports],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (
        1,
        "error: 64 files may be open, too few: allow 1024, as by `ulimit -n 1024`\n",
    )


def test_stalled_bodies_are_bounded_together(own_gateway: Split) -> None:
    """Large ones are turned away for as long as others fill the budget; short calls never."""
    own_gateway.start_gateway(code="import tools.shim.reading as r; r.BODIES_BYTES = 32 * 2**20")
    body = encoded({"texts": [LARGE]})
    address = ("127.0.0.1", own_gateway.ports["embed"])
    before = memory(own_gateway)
    stalled = []
    for _ in range(12):
        connection = socket.create_connection(address)
        connection.sendall(b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body))
        connection.sendall(body[:-1])
        stalled.append(connection)
    answer = post(own_gateway, "/embed", body)
    assert (answer.status, answer.json()["type"], answer.headers["Retry-After"]) == (503, "overloaded", "1")
    assert post(own_gateway, "/embed", b'{"texts": ["short"]}').status == 200
    print(f"{memory(own_gateway) - before:.0f} MB more with 12 stalled bodies of 15 MB")
    assert memory(own_gateway) < before + 100
    for connection in stalled:
        reset(connection)
    until(lambda: post(own_gateway, "/embed", body).status == 200)


@pytest.mark.parametrize(
    ("headers", "status"),
    [("Content-Length: 99000000", 413), ("Content-Length: 10\r\nContent-Encoding: gzip", 415)],
)
def test_a_body_that_is_not_wanted_is_not_asked_for(stack: Stack, headers: str, status: int) -> None:
    """`Expect: 100-continue` gets the refusal at once, and so does a length over the limit without it."""
    for expect in ("Expect: 100-continue\r\n", ""):
        with socket.create_connection(("127.0.0.1", stack.ports["embed"]), timeout=10) as connection:
            connection.sendall(f"POST /embed HTTP/1.1\r\nHost: a\r\n{expect}{headers}\r\n\r\n".encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 %d " % status)


def test_a_body_that_is_wanted_is_asked_for(stack: Stack) -> None:
    body = b'{"texts": ["a"]}'
    with socket.create_connection(("127.0.0.1", stack.ports["embed"]), timeout=10) as connection:
        head = b"POST /embed HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
        connection.sendall(head)
        assert connection.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


NAME = "\U0001f468" * (3 * MB)
ECHOES: dict[str, tuple[str, Any]] = {
    "model": ("/embed", {"texts": ["a"], "model": NAME}),
    "prompt": ("/v1/embeddings", {"input": "a", "input_type": NAME}),
    "TEI's prompt": ("/embed", {"inputs": "a", "prompt_name": NAME}),
    "field": ("/embed", {"texts": ["a"], NAME: 1}),
    "inner field": ("/v1/rerank", {"query": "a", "documents": [{"text": "a", NAME: 1}]}),
    "choice": ("/v1/embeddings", {"input": "a", "truncate": NAME}),
    "number": ("/v1/rerank", b'{"query": "a", "documents": ["a"], "top_n": -%d}' % 10**15),
}


@pytest.mark.parametrize("name", ECHOES)
def test_a_callers_words_are_not_sent_back_whole(stack: Stack, name: str) -> None:
    path, body = ECHOES[name]
    answer = post(stack, path, encoded(body))
    assert 400 <= answer.status < 500
    assert len(answer.body) < 2000


def test_headers_and_paths_are_not_sent_back_whole(stack: Stack) -> None:
    long = "9" * 5000
    answers = [
        post(stack, "/embed", b'{"texts": ["a"]}', {WITHIN: f"-{long}"}),
        post(stack, f"/{long}", b"{}"),
        stack.get("embed", f"/health?verbose={long}"),
        post(stack, "/embed", b"{}", {"Expect": long}),
    ]
    assert [answer.status for answer in answers] == [400, 404, 400, 400]
    assert all(len(answer.body) < 500 for answer in answers)


def test_answers_do_not_name_what_the_server_is_made_of(stack: Stack) -> None:
    answers = [stack.get("embed", path) for path in ("/health", "/", "/none", "/metrics")]
    assert {answer.headers["Server"] for answer in answers} == {"triton-embeddings"}
    with socket.create_connection(("127.0.0.1", stack.ports["embed"]), timeout=10) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        answer = connection.recv(4096)
    assert b"\r\nServer: triton-embeddings\r\n" in answer
    assert b"aiohttp" not in answer


def test_a_long_query_beside_many_documents(own_gateway: Split) -> None:
    """It is sent once for each document, and not for all of them at once."""
    own_gateway.start_gateway()
    documents = [f"document {i}" for i in range(60)]

    def rerank(query: str, documents: list[str]) -> Answer:
        return post(own_gateway, "/rerank", encoded({"query": query, "documents": documents}))

    head = "seven " * 1000
    expected = rerank(head, documents)
    before = peak(own_gateway)
    answer = rerank("seven " * (4 * MB // 6), documents)
    assert (answer.status, answer.json()) == (200, expected.json())
    print(f"{peak(own_gateway) - before:.0f} MB more for 60 times 4 MB")
    assert peak(own_gateway) < before + 250
    refused = rerank("seven " * (4 * MB // 6), [f"document {i}" for i in range(256)])
    assert (refused.status, refused.json()["type"]) == (413, "too_large")
    assert "shorten it, or send fewer documents" in refused.json()["error"]


def test_texts_of_megabytes_go_after_short_ones(own_gateway: Split) -> None:
    """Though each is one text, of a row of 256 tokens."""
    own_gateway.start_gateway()
    texts = [encoded({"texts": [f"{i} {LARGE[: 2 * MB]}"]}) for i in range(55)]
    with ThreadPoolExecutor(55) as clients:
        large = [clients.submit(post, own_gateway, "/embed", text) for text in texts]
        until(lambda: any(one.done() for one in large))
        pending = sum(not one.done() for one in large)
        took = []
        for i in range(5):
            started = time.monotonic()
            assert post(own_gateway, "/embed", encoded({"texts": [f"short {i}"]})).status == 200
            took.append(time.monotonic() - started)
        left = sum(not one.done() for one in large)
        print(f"{max(took):.2f} s for a short call; {pending} before, {left} after five of them")
        assert left > 0
        assert {one.result().status for one in large} == {200}
