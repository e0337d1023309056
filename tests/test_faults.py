"""Faults that a stack will meet: what callers see, and that it comes back. docs/promises.md lists them."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from statistics import median

import psutil
import pytest
from conftest import ROOT, TINY, Answer, Reference, Stack, free_ports, send
from load import GONE, Load, Proxy, Split, reset, until
from tokenizers import Tokenizer
from tritonclient.utils import InferenceServerException

from build import make
from build.rendering import family
from build.target import Target
from tools.triton.embedded import WATCH_SECONDS

LONG = "seven " * 250
WITHIN = "X-Request-Timeout"


def call(stack: Stack, texts: list[str], seconds: float | None = None, model: str | None = None) -> Answer:
    """Embeds texts within so many seconds."""
    body = json.dumps({"texts": texts, "model": model}).encode()
    headers = {} if seconds is None else {WITHIN: str(seconds)}
    return send(urllib.request.Request(stack.url("embed", "/embed"), body, headers))


def kind(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.json()["type"]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Split]:
    """Triton and the gateway as two commands; a test leaves them running and well."""
    running = Split(tmp_path_factory.mktemp("faults") / "split")
    try:
        yield running.start()
    finally:
        running.end()


def own_ports(split: Split) -> dict[str, int]:
    """Of another gateway in front of the same Triton."""
    return {**split.ports, **dict(zip(("embed", "rerank"), free_ports(2), strict=True))}


def test_triton_is_killed_under_load_and_started_again(split: Split) -> None:
    with Load(split) as load:
        load.answers()
        split.tritonserver().kill()
        assert split.commands["triton"].wait(30) == 1
        load.fails(503)
        split.start_triton()
        came_back = load.answers()
    assert load.counts[GONE] == 0
    assert "tritonserver was killed (SIGKILL; dmesg says whether memory ran out)" in split.log("triton")
    print(f"first answer {came_back:.1f} s after the start; slowest call {load.slowest:.1f} s")


def test_the_gateway_is_killed_under_load_and_started_again(split: Split) -> None:
    server = split.tritonserver().pid
    with Load(split) as load:
        load.answers()
        split.commands["gateway"].kill()
        split.commands["gateway"].wait()
        load.fails(GONE)
        split.start_gateway()
        came_back = load.answers()
    assert split.tritonserver().pid == server
    print(f"first answer {came_back:.1f} s after the start")


def test_triton_accepts_but_does_not_answer(split: Split) -> None:
    """Deadlines hold, and when it goes on, so does everything."""
    (before,) = split.embed(["before"])
    server = split.tritonserver()
    server.suspend()
    try:
        started = time.monotonic()
        assert kind(call(split, ["during"], 1)) == (504, "timeout")
        assert 0.9 < time.monotonic() - started < 4
        assert kind(split.get("embed", "/health")) == (503, "not_ready")
    finally:
        server.resume()
    assert (split.embed(["before"]) == before).all()
    assert split.get("embed", "/health").status == 200


def test_a_port_that_never_answers(tmp_path: Path) -> None:
    """From the start: the gateway knows no model yet."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        gateway = Split(tmp_path / "gateway")
        gateway.start_gateway(silent.getsockname()[1])
        try:
            assert kind(call(gateway, ["a"], 0.5)) == (504, "timeout")
            with ThreadPoolExecutor(2) as clients:
                answers = list(clients.map(lambda path: gateway.get("embed", path), ["/health", "/models"]))
            assert [kind(answer) for answer in answers] == [(503, "not_ready")] * 2
            assert all(answer.headers["Retry-After"] == "1" for answer in answers)
        finally:
            gateway.end()


def test_the_connection_to_triton_breaks_in_an_answer(split: Split, tmp_path: Path) -> None:
    texts = [f"text {i} of many" for i in range(500)]
    expected = split.embed(texts)
    proxy = Proxy(split.ports["grpc"])
    gateway = Split(tmp_path / "gateway", ports=own_ports(split))
    gateway.start_gateway(proxy.port)
    try:
        assert (gateway.embed(texts[:1]) == expected[:1]).all()
        proxy.room = 100_000  # of the 750 kB that the answer has
        answer = call(gateway, texts)
        assert kind(answer) == (503, "not_ready")
        assert answer.headers["Retry-After"] == "1"
        proxy.room = None
        took = until(lambda: call(gateway, texts).status == 200, 20)
        print(f"answers {took:.1f} s after the connection is whole again")
        proxy.room, proxy.once = 100_000, True
        assert (gateway.embed(texts) == expected).all()
        assert proxy.room is None
    finally:
        gateway.end()
        proxy.close()


@pytest.mark.parametrize("step", ["tokenizer", "encoder"])
def test_a_models_process_is_killed_under_load(tmp_path: Path, step: str) -> None:
    """Triton 2.51 would stay half dead: the server ends instead, and a supervisor starts it again."""
    stack = Stack(tmp_path / "stack").start()
    with Load(stack) as load:
        load.answers()
        stack.step(f"minilm-{step}").kill()
        died = time.monotonic()
        assert stack.process.wait(60) == 1
        ended = time.monotonic() - died
        load.fails(GONE)
        assert f"the process of minilm-{step} was killed (SIGKILL; dmesg says" in stack.errors()
        assert not stack.segments()
        stack.start()
        load.answers()
        print(f"ended after {ended:.1f} s, answered again after {time.monotonic() - died:.1f} s")
        assert stack.stop() == 0


def test_a_process_is_killed_that_was_seen_before_it_was_a_models(tmp_path: Path) -> None:
    """Triton starts it from a shell: what that is called, the process must not be known by."""
    (folder := tmp_path / "slow").mkdir()
    shell = folder / "bash"
    shell.write_text(f'#!/bin/sh\nsleep {4 * WATCH_SECONDS}\nexec {shutil.which("bash")} "$@"\n')
    shell.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    stack = Stack(tmp_path / "stack", environment={"PATH": path}).start()
    assert stack.post("embed", "/models/minilm/unload", b"").status == 200
    stack.embed(["loads it anew"])  # while it is looked for processes, not only before
    stack.step("minilm-encoder").kill()
    assert stack.process.wait(60) == 1
    assert "the process of minilm-encoder was killed (SIGKILL" in stack.errors()


def test_a_models_process_hangs(tmp_path: Path) -> None:
    """Triton says ready all the while: only an answer proves that a model answers. It gives such a process up."""
    stack = Stack(tmp_path / "stack").start()
    stack.embed(["before"])
    encoder = stack.step("minilm-encoder")
    encoder.suspend()
    try:
        answer = call(stack, ["during"], 20)
        assert kind(answer) == (503, "not_ready")
        assert answer.headers["Retry-After"] == "1"
        health = stack.get("embed", "/health")
        assert stack.get("http", "/v2/models/minilm/ready").status == 200
        assert kind(health) == (503, "not_ready")
        assert {"minilm", "minilm-rerank"} == health.json()["failing"].keys()
    finally:
        encoder.resume()
    assert re.search(
        r"the process of minilm-encoder (died|was killed \(SIG\w+\)); start the server again", stack.errors()
    )
    assert stack.process.returncode == 1


SLOW = """

class Slow(TritonPythonModel):
    def execute(self, requests):
        import time
        time.sleep(1)
        return super().execute(requests)


TritonPythonModel = Slow
"""


FAMILIES = ("bert-cls", "qwen3-embedding", "gemma3", "xlm-roberta")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Models whose tokenizers are of different kinds; the first one takes a second for a batch."""
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        assert family.build(make.known_entry(str(TINY / name)), Target(), folder / "repository", folder / "cache")
    step = folder / "repository" / f"{FAMILIES[0]}-encoder" / "1" / "model.py"
    step.write_text(step.read_text() + SLOW)
    running = Stack(folder / "work", ["--repository", str(folder / "repository"), "--models", *FAMILIES]).start()
    yield running
    assert running.stop() == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_long_text_has_the_tokens_of_the_whole(families: Stack, reference: Reference, name: str) -> None:
    """Though mostly only its start is tokenized; the reference reads all of it."""
    tokenizer = Tokenizer.from_file(str(TINY / name / "tokenizer.json"))
    tokenizer.no_padding()
    parameters = families.get("http", f"/v2/models/{name}-tokenizer/config").json()["parameters"]
    tokenizer.enable_truncation(int(parameters["max_tokens"]["string_value"]))
    draw = random.Random(0)
    texts = [
        *(" ".join(draw.choices(reference.texts, k=200)) for _ in range(3)),
        *("".join(draw.choices(reference.texts, k=200)).replace(" ", "") for _ in range(3)),
        *("".join(draw.choices("abcde \n\u00e9\u4e2d\u0301\U0001f468", k=30_000)) for _ in range(5)),
        "\u4e2d\u6587" * 15_000,
        "a" * 30_000,
        "a" + " " * 30_000 + "b",
        "aab" * 10_000,
    ]
    for text in texts:
        assert len(text) > 40 * int(parameters["max_tokens"]["string_value"])
        outputs = families.infer(f"{name}-tokenizer", text=[text])
        expected = tokenizer.encode(text)
        assert outputs["input_ids"][0].tolist() == expected.ids
        assert outputs["truncated"].item() == bool(expected.overflowing)


# All of it is tokenized, for a third of a second.
SLOW_TEXT = "a" + "\u0903" * 600_000


def tokenizing(stack: Stack) -> float:
    """CPU seconds that MiniLM's tokenizer has taken."""
    return sum(stack.step("minilm-tokenizer").cpu_times()[:2])


def test_texts_that_nobody_waits_for_are_not_tokenized(stack: Stack) -> None:
    """Though Triton tells no step of an ensemble that its caller has gone."""
    before, started = tokenizing(stack), time.monotonic()
    assert call(stack, [f"{i}{SLOW_TEXT}" for i in range(4)]).status == 200
    once, seconds = tokenizing(stack) - before, time.monotonic() - started
    with ThreadPoolExecutor(4) as clients:
        calls = [[f"{i} {j}{SLOW_TEXT}" for j in range(4)] for i in range(4)]
        late = list(clients.map(lambda texts: call(stack, texts, seconds / 3), calls))
    # On a busy machine the deadline comes while the megabytes are read; where the rate is known by then, a call
    # that cannot be done before it is refused at once.
    kinds = Counter(map(kind, late))
    assert kinds.keys() <= {(504, "timeout"), (408, "slow_body"), (429, "overloaded")}
    assert kinds[504, "timeout"] >= 1
    assert call(stack, ["short"]).status == 200
    assert tokenizing(stack) - before < 2.4 * once


@pytest.mark.parametrize("model", ["minilm", "minilm-tokenizer"])
def test_a_deadline_in_a_request_of_v2_infer(stack: Stack, model: str) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    now = time.monotonic()
    for deadline in (f"{boot} {now + 60}", f"{uuid.uuid4()} {now - 60}", f"{boot} soon", "", boot):
        assert stack.infer(model, {"deadline": deadline}, text=["a"])["token_count"].tolist() == [[3]]
    with pytest.raises(InferenceServerException, match="nobody waits for the answer"):
        stack.infer(model, {"deadline": f"{boot} {now - 60}"}, text=["a"])


def test_a_slow_model(families: Stack) -> None:
    """Its callers' deadlines hold, what they gave up is not computed, and the other models go on."""
    slow, fast = FAMILIES[0], FAMILIES[-1]
    before = families.statistics(f"{slow}-encoder")["execution_count"]
    with ThreadPoolExecutor(40) as clients:
        started = time.monotonic()
        first = clients.submit(call, families, ["the first"], None, slow)
        time.sleep(0.2)
        late = [clients.submit(call, families, [f"number {i}"], 0.5, slow) for i in range(32)]
        others = [call(families, [f"number {i}"], None, fast) for i in range(5)]
        assert all(answer.status == 200 for answer in others)
        assert [kind(answer.result()) for answer in late] == [(504, "timeout")] * 32
        assert time.monotonic() - started < 5
        assert first.result().status == 200
    assert call(families, ["the last"], None, slow).status == 200
    # The late ones were in Triton's queue: some may have made it into the second batch, not into more.
    assert families.statistics(f"{slow}-encoder")["execution_count"] - before <= 3


def test_a_busy_model_is_not_called_dead(tmp_path: Path) -> None:
    """A probe of a reranker waits behind another model's callers, in the encoder that they share."""
    repository = tmp_path / "repository"
    assert make.main(["minilm", "--repository", str(repository)]) == 0
    step = repository / "minilm-encoder" / "1" / "model.py"
    step.write_text(step.read_text() + SLOW.replace("sleep(1)", "sleep(4)"))
    stack = Stack(tmp_path / "work", ["--repository", str(repository)]).start()
    try:
        with ThreadPoolExecutor(8) as clients:
            calls = [clients.submit(call, stack, [f"number {i}"]) for i in range(48)]
            until(lambda: any(one.done() for one in calls))
            seen = [stack.get("embed", "/health") for _ in range(3)]
            assert not all(one.done() for one in calls)
            assert [answer.status for answer in seen] == [200] * 3
            assert {one.result().status for one in calls} == {200}
    finally:
        assert stack.stop() == 0


def test_a_triton_without_one_of_the_models(split: Split, tmp_path: Path) -> None:
    """Calls that the absent one might have answered are not answered by another."""
    gateway = Split(tmp_path / "gateway", ["--models", "absent", "minilm"], ports=own_ports(split))
    gateway.start_gateway(split.ports["grpc"])
    try:
        for model in ("absent", None):
            answer = call(gateway, ["a"], None, model)
            assert kind(answer) == (503, "not_ready")
            assert "Triton cannot serve absent: " in answer.json()["error"]
        assert (gateway.embed(["a"], "minilm") == split.embed(["a"])).all()
        assert kind(call(gateway, ["a"], None, "none")) == (404, "unknown_model")
        assert "absent: " in gateway.get("embed", "/health").json()["error"]
        partial = gateway.get("embed", "/health?partial=1").json()
        assert (partial["models"], list(partial["failing"])) == (["minilm"], ["absent"])
    finally:
        gateway.end()


def test_a_model_is_unloaded_under_load_and_loaded_again(own_stack: Stack) -> None:
    """By others, through Triton's own API: the calls that find it gone have it loaded."""
    with Load(own_stack, statuses=(200,)) as load:
        load.answers()
        for _ in range(2):
            assert own_stack.manage("models/minilm/unload").status == 200
            load.answers()
        assert own_stack.rerank("the other model", ["goes on"])["order"] == [0]
    assert own_stack.get("embed", "/health").status == 200
    (row,) = (row for row in own_stack.get("embed", "/models").json()["models"] if row["name"] == "minilm")
    assert row["loads"] == 3  # the first at the start


def can_mount() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


needs_mounts = pytest.mark.skipif(not can_mount(), reason="needs root, for a file system of its own")


def on_small_disk(folder: Path | str, size: str) -> list[str]:
    """Runs a command that sees a small file system at `folder`."""
    return ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs {folder} && exec "$@"', "sh"]


@needs_mounts
def test_shared_memory_runs_out(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "stack", wrapper=on_small_disk("/dev/shm", "8m")).start()
    try:
        before = stack.embed(["before"])
        answer = call(stack, ["long " * 2_000_000])
        assert kind(answer) == (502, "upstream")
        assert "Failed to increase the shared memory pool" in answer.json()["error"]
        assert "triton-embeddings" not in answer.json()["error"]  # the name of a segment
        assert (stack.embed(["before"]) == before).all()
        assert stack.get("embed", "/health").status == 200
    finally:
        assert stack.stop() == 0


@needs_mounts
def test_too_little_shared_memory_to_start(tmp_path: Path) -> None:
    # Room for one step; with two, a family of two would be served.
    stack = Stack(tmp_path / "stack", wrapper=on_small_disk("/dev/shm", "1m"))
    stack.launch()
    errors = stack.errors()
    assert stack.process.returncode == 1
    assert "Each Python backend model instance requires at least 1 MB of shared memory" in errors


@needs_mounts
def test_the_disk_of_the_log_is_full(tmp_path: Path) -> None:
    folder = tmp_path / "stack"
    folder.mkdir()
    stack = Stack(folder, wrapper=on_small_disk(folder, "1m")).start()
    try:
        disk = Path(f"/proc/{stack.process.pid}/root{folder}")
        with pytest.raises(OSError, match="No space left"):
            (disk / "filler").write_bytes(bytes(2 << 20))
        assert stack.post("http", "/v2/models/minilm/infer", b"logged, or not").status >= 400
        with Load(stack) as load:
            load.answers()
    finally:
        assert stack.stop() == 0


@needs_mounts
def test_a_full_disk_to_start_on(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "stack", wrapper=on_small_disk(tmp_path, "4k"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stack, "_output", lambda _, name: Path(f"{tmp_path}-{name}.txt"))
        stack.launch()
        errors = stack.errors()
    assert stack.process.returncode == 1
    assert f"cannot write {tmp_path / 'stack'}: No space left on device" in errors


@needs_mounts
def test_a_full_disk_to_build_on(tmp_path: Path) -> None:
    """Which is another one than the cache's."""
    for size, status in (("1m", 1), ("200m", 0)):
        build = [sys.executable, "-m", "build.make", "minilm", "--repository", str(tmp_path / "repository")]
        left = f"{' '.join(build)}; status=$?; ls -A {tmp_path}/repository; exit $status"
        done = subprocess.run(
            [*on_small_disk(tmp_path, size), "sh", "-c", left], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == status
        if status:
            assert done.stderr == f"error: cannot write {tmp_path / 'repository'}: No space left on device\n"
            assert done.stdout == ""
        else:
            assert "minilm-encoder" in done.stdout


def test_memory_runs_out_in_the_encoder(tmp_path: Path) -> None:
    """What is left of an engine fails later texts that it could compute: it is never asked again."""
    stack = Stack(tmp_path / "stack").start()
    with Load(stack, statuses=(200, 502, 503, GONE)) as load:
        load.answers()
        encoder = stack.step("minilm-encoder")
        encoder.rlimit(psutil.RLIMIT_AS, (encoder.memory_info().vms + (1 << 20), -1))
        answer = call(stack, [f"{i} {LONG}" for i in range(256)])
        assert kind(answer) == (503, "not_ready"), answer.body
        assert stack.process.wait(60) == 1
        load.fails(GONE)
        assert "the process of minilm-encoder died; start the server again" in stack.errors()
        assert "error: the engine failed, and nothing that it computes now would be trusted: " in stack.errors()
        assert not stack.segments()
        stack.start()
        load.answers()
        assert stack.stop() == 0


@pytest.fixture
def bulk(own_stack: Stack) -> Iterator[list[socket.socket]]:
    """Clients whose large calls are under way; they go away in the end."""
    body = json.dumps({"texts": [f"{i} {LONG}" for i in range(300)]}).encode()
    head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connections = [socket.create_connection(("127.0.0.1", own_stack.ports["embed"])) for _ in range(10)]
    for connection in connections:
        connection.sendall(head + body)
    yield connections
    for connection in connections:
        connection.close()


def singles(stack: Stack, count: int) -> list[float]:
    """Seconds of short calls, one after another."""
    took = []
    for i in range(count):
        started = time.monotonic()
        assert call(stack, [f"a short question, number {i}"]).status == 200
        took.append(time.monotonic() - started)
    return took


def test_overload(own_stack: Stack) -> None:
    """Far more large calls than can be done: small ones pass, refused ones are told when to come back."""
    calls = itertools.count()

    def texts() -> list[str]:  # never the same, which would be computed once
        number = next(calls)
        return [f"{number} {i} {LONG}" for i in range(60)]

    calm = singles(own_stack, 20)
    started = time.monotonic()
    assert call(own_stack, texts()).status == 200
    alone = time.monotonic() - started
    with ThreadPoolExecutor(20) as clients:
        flood = [clients.submit(call, own_stack, texts()) for _ in range(6)]
        during = singles(own_stack, 5)
        assert not any(answer.done() for answer in flood)
        # Several times what takes `alone` seconds is ahead: within that time, nothing more can be answered.
        refused = call(own_stack, texts(), alone)
        assert kind(refused) == (429, "overloaded")
        told = int(refused.headers["Retry-After"])
        assert 1 <= told < 10 * alone + 2
        sentence = r"\d+ tokens(?:, (\d+) s of work,)? are ahead of this call: there may be room for it in (\d+) s"
        said = re.fullmatch(sentence, refused.json()["error"])
        assert said
        assert int(said[2]) == told <= int(said[1] or told), "there is room before all is done"
        waited = time.monotonic()
        time.sleep(told)
        while (answer := call(own_stack, texts(), 6 * alone)).status == 429:
            assert time.monotonic() - waited < 10 * alone + 5
            time.sleep(int(answer.headers["Retry-After"]))
        assert all(answer.result().status == 200 for answer in flood)
    after = singles(own_stack, 20)
    print(
        f"a small call: {median(calm):.3f} s, {median(during):.3f} s in the flood, {median(after):.3f} s after it"
    )
    assert max(during) < alone
    assert median(after) < max(0.1, 5 * median(calm))


def test_clients_that_leave_take_their_work_along(own_stack: Stack, bulk: list[socket.socket]) -> None:
    time.sleep(1)
    for connection in bulk:
        reset(connection)
    assert call(own_stack, ["the next"], 30).status == 200
    time.sleep(1)
    computed = own_stack.metric("encoder_tokens_total", state="computed")
    time.sleep(1)
    assert own_stack.metric("encoder_tokens_total", state="computed") == computed
    assert computed < 10 * 300 * 250 / 4


def http_of(connection: socket.socket) -> bytes:
    connection.settimeout(20)
    return connection.recv(4096)


def test_slow_bodies_and_idle_connections(stack: Stack) -> None:
    """A body that does not come ends with its call's deadline; connections that wait cost no one anything."""
    address = ("127.0.0.1", stack.ports["embed"])
    idle = [socket.create_connection(address) for _ in range(200)]
    head = f"POST /embed HTTP/1.1\r\nHost: a\r\n{WITHIN}: 1\r\nContent-Length: 100\r\n\r\n{{".encode()
    slow = [socket.create_connection(address) for _ in range(50)]
    for connection in slow:
        connection.sendall(head)
    assert call(stack, ["a good call"], 20).status == 200
    for connection in slow:
        assert http_of(connection).startswith(b"HTTP/1.1 408 ")
        reset(connection)
    for connection in idle:
        reset(connection)
    assert call(stack, ["a good call"], 20).status == 200


def test_headers_that_do_not_end(split: Split, tmp_path: Path) -> None:
    """With the limit of 75 seconds set to one."""
    gateway = Split(tmp_path / "gateway", ports=own_ports(split))
    gateway.start_gateway(code="import tools.shim.server as s; s.IDLE_SECONDS = 1")
    try:
        slow = [socket.create_connection(("127.0.0.1", gateway.ports["embed"])) for _ in range(50)]
        for connection in slow:
            connection.sendall(b"POST /embed HTTP/1.1\r\nHost: a\r\nX-")
        assert gateway.embed(["a good call"]).shape == (1, 384)
        assert [http_of(connection) for connection in slow] == [b""] * 50
        for connection in slow:
            connection.close()
    finally:
        gateway.end()


def test_a_shape_that_overflows_ends_triton(tmp_path: Path) -> None:
    """Over v2 HTTP, Triton 2.51 does not survive it; the command ends with the cause, as always then."""
    stack = Stack(tmp_path / "stack").start()
    tensor = {"name": "text", "datatype": "FP32", "shape": [2**31, 2**31], "data": [1.0]}
    with pytest.raises(OSError, match=r"closed|reset"):
        stack.post("http", "/v2/models/minilm/infer", {"inputs": [tensor]})
    assert "tritonserver was killed (SIG" in stack.errors()
    assert stack.process.returncode == 1
    assert not stack.segments()


FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


@pytest.mark.skipif(not FAKETIME.exists(), reason="needs libfaketime: apt install libfaketime")
def test_the_clock_jumps(split: Split, tmp_path: Path) -> None:
    """Hours forth and back under load: deadlines and health go by the monotonic clock."""
    offset = tmp_path / "offset"
    offset.write_text("+0")
    environment = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    gateway = Split(tmp_path / "gateway", ports=own_ports(split), environment=environment)
    gateway.start_gateway()
    try:
        with Load(gateway, 2) as load:
            for jump in ("+3600", "-7200", "+0"):
                offset.write_text(jump)
                seen = gateway.get("embed", "/health")
                ahead = parsedate_to_datetime(seen.headers["Date"]).timestamp() - time.time()
                assert abs(ahead - int(jump)) < 5
                assert seen.status == 200
                load.answers(10)
            for i in range(2000):  # also between two looks at it for the same call
                offset.write_text(("+3600", "+0")[i % 2])
                time.sleep(0.001)
        assert set(load.counts) == {200}
        assert call(gateway, [f"{LONG}{i}" for i in range(100)], 0.05).status == 504
    finally:
        gateway.end()


def test_only_monotonic_clocks_decide() -> None:
    tools = ROOT / "tools"
    files = [*(tools / "shim").rglob("*.py"), *(tools / "triton").glob("*.py"), tools / "serve.py"]
    sources = {file.name: file.read_text() for file in [*files, *(ROOT / "build" / "steps").glob("*.py")]}
    assert len(sources) > 15
    found = {name for name, source in sources.items() if re.search(r"time\.time\(|datetime", source)}
    assert found == {"chat.py", "chat_template.py"}  # which tell the date


@pytest.mark.timeout(700)
def test_a_short_soak(tmp_path: Path) -> None:
    """`make soak` for ten seconds instead of an hour."""
    command = [sys.executable, "-m", "tools.soak", "--seconds", "10", "--work-folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert {call.rsplit(" ", 1)[0] for call in report["calls"]} >= {
        "short",
        "large",
        "rerank",
        "bad",
        "long",
        "query",
        "no key",
    }


def test_two_servers_on_the_same_ports(stack: Stack, tmp_path: Path) -> None:
    """The second one says so and the first one notices nothing."""
    with Load(stack, 2) as load:
        for port in ("embed", "grpc"):
            second = Stack(tmp_path / port, ports={**Stack(tmp_path).ports, port: stack.ports[port]})
            second.launch()
            assert f"port {stack.ports[port]} (--{port}-port) already" in second.errors()
            assert second.process.returncode == 1
        load.answers(10)
    assert set(load.counts) == {200}
