"""Starting, stopping and dying: nothing is left behind, and every failure says what to do."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY, Answer, Reference, Stack
from containers import until

from build import make
from tools import preflight
from tools.triton import embedded

REPOSITORY = ROOT / "model_repository"


def assert_nothing_left(stack: Stack, processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive, f"left running: {alive}"
    assert not stack.segments()
    for port in stack.ports.values():
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, f"port {port} still listens"


def test_ten_starts_leave_nothing_behind(tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    for _ in range(10):
        stack.start()
        processes = stack.tree()
        assert len(processes) >= 5  # this one, Triton and three stubs
        assert stack.segments()
        assert stack.embed(["up again"]).shape == (1, 384)
        assert stack.stop() == 0
        assert_nothing_left(stack, processes)


def test_the_greeting_shows_calls_that_work(tmp_path: Path) -> None:
    stack = Stack(tmp_path).start()
    try:
        calls = [line.strip() for line in stack.greeting().splitlines() if line.strip().startswith("curl")]
        embed, rerank = (subprocess.check_output(call, shell=True, text=True) for call in calls)
    finally:
        stack.stop()
    assert '"embeddings":[[' in embed
    assert '"order":[1,0]' in rerank


@pytest.mark.parametrize("told", ["the command", "all processes"])
def test_sigterm_answers_what_is_under_way(tmp_path: Path, reference: Reference, told: str) -> None:
    """To the command alone, or as a supervisor may send it, to everything that the command has started too."""
    stack = Stack(tmp_path).start()
    processes = stack.tree()
    expected = stack.embed(reference.texts)
    own = psutil.Process(stack.process.pid)
    stack.triton().send_signal(signal.SIGSTOP)  # or the first would be answered before the last one comes
    with ThreadPoolExecutor(64) as clients:
        calls = [clients.submit(stack.embed, reference.texts[i::48]) for i in range(48)]
        calls += [clients.submit(stack.embed, reference.texts[i : i + 1]) for i in range(16)]
        while sum(one.laddr[1] == stack.ports["embed"] for one in own.net_connections("tcp")) <= 64:
            time.sleep(0.01)
        time.sleep(2)  # the gateway has read them all
        triton = stack.triton()
        for process in processes if told == "all processes" else processes[:1]:
            process.send_signal(signal.SIGTERM)
        triton.send_signal(signal.SIGCONT)
        vectors = [call.result() for call in calls]
    assert all((vectors[i] == expected[i::48]).all() for i in range(48))
    assert all((vectors[48 + i] == expected[i]).all() for i in range(16))
    assert stack.process.wait(60) == 0
    assert_nothing_left(stack, processes)


@contextmanager
def stuck(stack: Stack, count: int) -> Iterator[list[Future[Answer]]]:
    """So many calls that are under way for as long as Triton stands still."""
    triton = stack.triton()
    triton.suspend()
    try:
        with ThreadPoolExecutor(count) as clients:
            calls = [clients.submit(stack.post, "embed", "/embed", {"texts": [f"text {i}"]}) for i in range(count)]
            until(lambda: f"gateway_calls_in_flight {count}.0" in stack.get("embed", "/metrics").body.decode())
            yield calls
    finally:
        with suppress(psutil.NoSuchProcess):
            triton.resume()


def test_sigterm_leaves_each_call_its_deadline(tmp_path: Path) -> None:
    """A call that takes too long is told so, and not cut off."""
    stack = Stack(tmp_path, ["--timeout", "20"]).start()
    stack.embed(["before"])
    with stuck(stack, 3) as calls:
        stack.process.send_signal(signal.SIGTERM)
        answers = [call.result() for call in calls]
    assert [(answer.status, answer.json()["type"]) for answer in answers] == [(504, "timeout")] * 3
    assert stack.process.wait(60) == 0
    assert "INFO stopping: 3 calls are under way, and get up to 20 s" in stack.said()
    assert "cut off" not in stack.said()


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    stack = Stack(tmp_path).start()
    processes = stack.tree()
    stack.embed(["before"])
    with stuck(stack, 3) as calls:
        stack.process.send_signal(signal.SIGINT)
        until(lambda: "3 calls are under way, and get up to 120 s" in stack.said())
        stack.process.send_signal(signal.SIGINT)
        assert stack.process.wait(10) == 1
        for call in calls:
            error = call.exception()
            assert isinstance(error, OSError | HTTPException) or call.result().status == 503
    assert "WARNING 3 calls are cut off" in stack.said()
    assert "WARNING stopped at once" in stack.said()
    assert_nothing_left(stack, processes)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_load_balancer_sees_that_it_stops(tmp_path: Path, workers: int) -> None:
    """Before calls are refused, where it is given the time to."""
    stack = Stack(tmp_path, ["--drain-delay", "5", "--workers", str(workers)]).start()
    assert stack.get("embed", "/health").status == 200
    stack.process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    until(lambda: stack.get("embed", "/health").status == 503)
    health = stack.get("embed", "/health?partial=1")
    assert (health.status, health.json()["error"]) == (503, "this server is stopping")
    while time.monotonic() - told < 4:
        stack.embed(["in the meantime"])
    assert stack.process.wait(30) == 0
    assert time.monotonic() - told > 5


def test_garbage_in_place_of_weights_is_not_healthy(tmp_path: Path, broken_repository: Path) -> None:
    weights = broken_repository / "minilm-encoder" / "1" / "model.onnx.data"
    weights.write_bytes(b"\xff" * weights.stat().st_size)  # not a number, whatever the type
    stack = Stack(tmp_path / "work", ["--repository", str(broken_repository)]).start()
    try:
        for _ in range(2):
            answer = stack.post("embed", "/embed", {"texts": ["a"]})
            assert (answer.status, answer.json()["type"]) == (502, "upstream")
            health = stack.get("embed", "/health")
            assert health.status == 503
            assert "not finite numbers" in health.json()["failing"]["minilm"]
        assert re.search(r" ERROR POST /embed from 127.0.0.1: 502 upstream, .*not finite numbers", stack.said())
    finally:
        assert stack.stop() == 0


def test_what_callers_are_denied_is_logged_once_a_second(tmp_path: Path) -> None:
    stack = Stack(tmp_path, environment={"GATEWAY_API_KEYS": "a-key-of-sixteen-characters"}).start()
    try:
        for _ in range(2):
            for _ in range(10):
                assert stack.post("embed", "/embed", {"texts": ["a"]}).status == 401
            time.sleep(1.1)
        first, *_, last = stack.said().splitlines()
        assert re.match(
            r"\d{4}-\d\d-\d\dT\S+ WARNING POST /embed from 127.0.0.1: 401 unauthorized, request id", first
        )
        left_out = [int(number) for number in re.findall(r"\(and (\d+) more like it before\)", stack.said())]
        assert len(stack.said().splitlines()) <= 6
        assert left_out
        assert last.endswith("more like it before)")
    finally:
        assert stack.stop() == 0


def test_ctrl_c_while_starting(tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    stack.launch()
    while not (children := psutil.Process(stack.process.pid).children(recursive=True)):
        time.sleep(0.05)
    stack.process.send_signal(signal.SIGINT)
    assert stack.process.wait(60) == 0
    assert_nothing_left(stack, children)


def test_triton_dies(tmp_path: Path) -> None:
    stack = Stack(tmp_path).start()
    processes = stack.tree()
    stack.triton().kill()
    errors = stack.errors()
    assert stack.process.returncode == 1
    assert errors.startswith("error: tritonserver was killed (SIGKILL; dmesg says whether memory ran out)")
    assert "start it again" in errors
    assert not re.search(r"I\d{4} ", errors)  # what Triton notes is no cause
    assert_nothing_left(stack, processes)
    (log,) = tmp_path.glob("triton-*.log")
    ended = log.read_text()
    assert stack.start().stop() == 0
    assert log.with_name(f"{log.name}.1").read_text() == ended


def test_killed_outright_and_started_again(tmp_path: Path) -> None:
    """SIGKILL cannot be tidied up after, but Triton goes along and the next start removes the rest."""
    stack = Stack(tmp_path).start()
    processes = stack.tree()
    stack.process.kill()
    stack.process.wait()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
    # Steps that end by themselves remove their segments, most of the time.
    Path("/dev/shm", f"triton-embeddings-{stack.process.pid}-{uuid.uuid4()}").touch(0o600)
    left = stack.segments()
    assert left
    assert stack.start().stop() == 0
    assert not any(segment.exists() for segment in left)


@pytest.fixture
def broken_repository(tmp_path: Path) -> Path:
    """A copy of the model repository, to be damaged."""
    return Path(shutil.copytree(REPOSITORY, tmp_path / "repository"))


@pytest.fixture(scope="module")
def two_families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default families and a tiny one."""
    folder = tmp_path_factory.mktemp("two") / "repository"
    shutil.copytree(REPOSITORY, folder)
    assert make.main([str(TINY / "bert-cls"), "--repository", str(folder)]) == 0
    return folder


def cut_graph(repository: Path) -> None:
    graph = repository / "bert-cls-encoder" / "1" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])


def cut_tokenizer(repository: Path) -> None:
    (repository / "bert-cls-tokenizer" / "1" / "tokenizer.json").write_text("{")


def spoil_configuration(repository: Path) -> None:
    (repository / "bert-cls-encoder" / "config.pbtxt").write_text("name: nonsense {")


def another_runtime(repository: Path) -> None:
    options = ["--runtime", "onnxruntime", "--repository", str(repository)]
    assert make.main([str(TINY / "bert-cls"), *options]) == 0


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (cut_graph, "bert-cls-encoder/1/model.onnx cannot be run, build the family again"),
        (cut_tokenizer, "failed to load 'bert-cls-tokenizer' version 1"),
        (spoil_configuration, "bert-cls-encoder/config.pbtxt"),
        (another_runtime, "bert-cls-encoder is built for onnxruntime, which the embedded Triton does not have"),
    ],
)
def test_a_family_that_cannot_be_loaded_takes_no_other_along(
    tmp_path: Path, two_families: Path, damage: Callable[[Path], None], cause: str, reference: Reference
) -> None:
    """The command says which one and why, and so does the gateway, which never answers with another model."""
    repository = Path(shutil.copytree(two_families, tmp_path / "repository"))
    damage(repository)
    models = ["--models", "bert-cls", "minilm", "minilm-rerank"]
    stack = Stack(tmp_path / "work", ["--repository", str(repository), *models]).start()
    try:
        assert "serving minilm, minilm-rerank\n" in stack.greeting()
        (warning,) = stack.said().splitlines()
        assert " WARNING bert-cls is not served: " in warning
        assert cause in warning
        assert (stack.embed(reference.texts[:1], "minilm") @ reference.embeddings[0])[0] > 0.999
        assert stack.rerank("a query", ["a document"])["model"] == "minilm-rerank"
        for model in ("bert-cls", None):
            answer = stack.post("embed", "/embed", {"texts": ["a"], "model": model})
            assert answer.status == 503
            assert answer.json()["type"] == "not_ready"
            assert "Triton cannot serve bert-cls: " in answer.json()["error"]
            assert cause in answer.json()["error"]
        health = stack.get("embed", "/health")
        assert health.status == 503
        assert health.json()["error"].startswith("bert-cls: ")
        assert cause in health.json()["failing"]["bert-cls"]
        partial = stack.get("embed", "/health?partial=1").json()
        assert (partial["status"], partial["models"]) == ("partial", ["minilm", "minilm-rerank"])
        assert cause in partial["failing"]["bert-cls"]
        listed = stack.get("embed", "/models").json()["models"]
        assert [model["name"] for model in listed if model["state"] == "loaded"] == ["minilm", "minilm-rerank"]
        assert cause in next(model["cause"] for model in listed if model["name"] == "bert-cls")
        assert stack.get("http", "/v2/health/ready").status == 200
        samples = stack.get("embed", "/metrics").body.decode()
        assert 'gateway_model_ready{model="bert-cls"} 0.0' in samples
        assert 'gateway_model_ready{model="minilm"} 1.0' in samples
    finally:
        assert stack.stop() == 0


def failure(stack: Stack) -> str:
    """The message of a stack that does not start; it must leave nothing behind."""
    stack.launch()
    errors = stack.errors()
    assert stack.process.returncode == 1
    assert not stack.segments()
    assert "Traceback" not in errors
    return errors


def test_a_damaged_graph(tmp_path: Path, broken_repository: Path) -> None:
    graph = broken_repository / "minilm-encoder" / "1" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])
    errors = failure(Stack(tmp_path / "work", ["--repository", str(broken_repository)]))
    assert "failed to load 'minilm-encoder'" in errors
    assert re.search("build the family again: [A-Z]", errors)  # a whole sentence, not its end
    assert ".cpp" not in errors


def test_a_damaged_tokenizer(tmp_path: Path, broken_repository: Path) -> None:
    (broken_repository / "minilm-tokenizer" / "1" / "tokenizer.json").write_text("{")
    errors = failure(Stack(tmp_path / "work", ["--repository", str(broken_repository)]))
    assert "failed to load 'minilm-tokenizer'" in errors
    assert "build the family again" in errors


def test_a_damaged_configuration(tmp_path: Path, broken_repository: Path) -> None:
    (broken_repository / "minilm-encoder" / "config.pbtxt").write_text("name: nonsense {")
    errors = failure(Stack(tmp_path / "work", ["--repository", str(broken_repository)]))
    assert "minilm-encoder/config.pbtxt" in errors


@pytest.mark.parametrize(
    ("name", "value"), [("ENCODER_PRECISION", "fp8"), ("ENCODER_THREADS", "0"), ("ENCODER_THREADS", "many")]
)
def test_a_setting_that_does_not_exist(tmp_path: Path, name: str, value: str) -> None:
    assert failure(Stack(tmp_path / "work", environment={name: value})).startswith(
        f"error: {name} is '{value}': choose"
    )
    assert not (tmp_path / "work").exists()  # Triton has not been started


def test_threads_follow_the_affinity(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        stack = Stack(tmp_path).start()
    finally:
        os.sched_setaffinity(0, allowed)
    try:
        log = next(tmp_path.glob("*.log")).read_text()
    finally:
        stack.stop()
    assert re.search(r"minilm-encoder: \w+, 1 of \d+ processors", log)


def test_an_unknown_model(tmp_path: Path) -> None:
    errors = failure(Stack(tmp_path, ["--models", "nonsense"]))
    assert "no model 'nonsense'" in errors
    assert "which has minilm," in errors


def test_a_busy_port(tmp_path: Path, stack: Stack) -> None:
    second = Stack(tmp_path, ports={**Stack(tmp_path).ports, "grpc": stack.ports["grpc"]})
    errors = failure(second)
    assert f"port {stack.ports['grpc']} (--grpc-port)" in errors


def test_an_unwritable_folder(tmp_path: Path) -> None:
    second = Stack(tmp_path, ["--work-folder", "/proc/nothing"])
    assert "cannot write /proc/nothing" in failure(second)


def test_a_missing_libpython_is_named() -> None:
    assert preflight.loadable(preflight.libpython()) or sys.version_info[:2] == preflight.BUNDLED_LIBPYTHON
    assert not preflight.loadable("libpython3.99.so.1.0")


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("version_info", (3, 9, 0), "needs 3.10 to 3.13"),
        ("platform", "darwin", "needs Linux"),
    ],
)
def test_a_machine_that_cannot_serve(
    monkeypatch: pytest.MonkeyPatch, attribute: str, value: object, words: str
) -> None:
    assert not list(preflight.problems())
    monkeypatch.setattr(sys, attribute, value)
    (problem,) = preflight.problems()
    assert words in problem


def test_an_old_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.31"))
    (problem,) = preflight.problems()
    assert "glibc 2.35" in problem


def test_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "loadable", lambda _: False)
    monkeypatch.setattr(preflight, "BUNDLED_LIBPYTHON", (3, 99))
    (problem,) = preflight.problems()
    assert "apt install libpython3" in problem


def test_a_family_of_another_runtime_is_refused(tmp_path: Path) -> None:
    options = ["--runtime", "onnxruntime", "--repository", str(tmp_path / "repository")]
    assert make.main(["minilm", *options]) == 0
    stack = Stack(tmp_path, ["--repository", str(tmp_path / "repository"), "--models", "minilm"])
    stack.launch()
    assert stack.process.wait(60) == 1
    assert "is built for onnxruntime, which the embedded Triton does not have: build it with" in stack.errors()


def test_a_model_that_is_unloaded_and_loaded_by_hand(own_stack: Stack) -> None:
    """Triton lets go of its processes, which is no death, and they are watched like the first ones afterwards."""
    steps = ("minilm", "minilm-rerank", "minilm-tokenizer", "minilm-encoder")
    for _ in range(3):
        for name in steps:
            assert own_stack.manage(f"models/{name}/unload").status == 200
        for name in steps[:2]:
            assert own_stack.manage(f"models/{name}/load").status == 200
        assert own_stack.embed(["there again"]).shape == (1, 384)
    until(lambda: len(own_stack.tree()) == 5, seconds=30)  # this one, Triton and three stubs
    time.sleep(8 * embedded.WATCH_SECONDS)
    own_stack.step("minilm-encoder").kill()
    assert "error: the process of minilm-encoder was killed (SIGKILL" in own_stack.errors()
