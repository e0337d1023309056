"""What a start refuses before anything runs, and what it says of what it serves."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, Stack, send
from containers import until
from tiny import build_tiny

from tools.bench.server import free_ports
from tools.shim.residency.families import families, fingerprint, keep_hint

REPOSITORY = ROOT / "model_repository"


def refused(*options: str) -> str:
    """What `python -m tools.serve` says instead of starting, in a line or a few."""
    command = [sys.executable, "-m", "tools.serve", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert "serving" not in done.stdout
    return done.stderr.strip()


@pytest.fixture
def listeners() -> Iterator[list[int]]:
    """Ports that something listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    yield [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()


def test_all_ports_that_are_taken_are_named_with_others(tmp_path: Path, listeners: list[int]) -> None:
    own = dict(zip(("embed", "grpc", "metrics"), listeners, strict=True))
    stack = Stack(tmp_path)
    stack.ports |= own
    words = [*stack.work_options(), *stack.port_options(*stack.ports)]
    said = refused(*words)
    for name, port in own.items():
        assert f"{port} (--{name}-port)" in said
    (arguments,) = re.findall('make serve ARGS="(.*)"', said)
    stack.options = shlex.split(arguments)  # which come last, and so count
    stack.start()
    try:
        for name in own:
            stack.ports[name] = int(re.findall(rf"--{name}-port (\d+)", arguments)[-1])
        assert stack.embed(["on other ports"]).shape == (1, 384)
    finally:
        assert stack.stop() == 0


def test_make_looks_at_the_ports_before_it_builds(listeners: list[int]) -> None:
    arguments = f"ARGS=--http-port {listeners[0]}"
    command = ["make", "--no-print-directory", "-o", "setup", "serve", "MODEL=nonsense", arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode
    assert f"something listens on port {listeners[0]} (--http-port) already" in done.stderr
    assert 'make serve MODEL="nonsense" ARGS="--http-port ' in done.stderr
    assert "catalog" not in done.stderr


def test_a_port_twice() -> None:
    (free,) = free_ports(1)
    said = refused("--embed-port", str(free), "--rerank-port", str(free))
    assert said == f"error: --embed-port and --rerank-port are both {free}: give each its own"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--host 192.0.2.1", "192.0.2.1 is no IPv4 address of this machine: name another with --host"),
        (
            "--triton-host 192.0.2.1",
            "192.0.2.1 is no IPv4 address of this machine: name another with --triton-host",
        ),
        ("--embed-port 0", "'0' is no port from 1 to 65535"),
        ("--grpc-port 65536", "'65536' is no port from 1 to 65535"),
        ("--timeout -1", "'-1' is no number of seconds above 0"),
        ("--timeout 0", "'0' is no number of seconds above 0"),
        ("--timeout inf", "'inf' is no number of seconds above 0"),
        ("--timeout soon", "'soon' is no number of seconds above 0"),
        ("--memory 9000TB", "--memory is 9000000.0 GB, and there are"),
        ("--models minilm --memory 10MB", ", and --memory gives models 10 MB: give them more"),
        ("--models nonsense", "run `make build MODEL=nonsense`"),
    ],
)
def test_what_cannot_be_is_refused(options: str, sentence: str) -> None:
    assert sentence in refused(*options.split())


def test_models_that_may_be_called_are_named(mixed: Path) -> None:
    """And not the steps that they are made of."""
    assert refused("--repository", str(mixed), "--models", "minilm-large") == (
        f"error: no model 'minilm-large' in {mixed}, which has bert-cls, bert-cross-encoder, minilm, "
        "minilm-rerank: run `make build MODEL=minilm-large`"
    )


def test_steps_that_are_missing_are_named(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for folder in REPOSITORY.glob("minilm*"):
        shutil.copytree(folder, repository / folder.name)
    shutil.rmtree(repository / "minilm-tokenizer")
    said = refused("--repository", str(repository))
    assert said.splitlines() == [
        f"error: no model in {repository} is built: run `make build`",
        "  minilm lacks minilm-tokenizer",
        "  minilm-rerank lacks minilm-tokenizer",
    ]


def listening(stack: Stack, port: str) -> set[str]:
    """The addresses on which a port is open, Triton's gRPC being told in IPv6."""
    found = psutil.Process(stack.process.pid).net_connections() + stack.triton().net_connections()
    own = [one for one in found if one.status == psutil.CONN_LISTEN and one.laddr.port == stack.ports[port]]
    return {"0.0.0.0" if one.laddr.ip == "::" else one.laddr.ip.removeprefix("::ffff:") for one in own}


def test_the_gateway_is_opened_without_triton(tmp_path: Path) -> None:
    stack = Stack(tmp_path, ["--host", "0.0.0.0"]).start()
    try:
        assert [listening(stack, port) for port in ("embed", "rerank")] == [{"0.0.0.0"}] * 2
        assert [listening(stack, port) for port in ("http", "grpc", "metrics")] == [{"127.0.0.1"}] * 3
        assert stack.embed(["a text"]).shape == (1, 384)
        assert "WARNING" not in stack.said()
    finally:
        assert stack.stop() == 0


def test_triton_is_opened_where_that_is_asked_for(tmp_path: Path) -> None:
    stack = Stack(tmp_path, ["--triton-host", "0.0.0.0"]).start()
    try:
        assert listening(stack, "embed") == {"127.0.0.1"}
        assert [listening(stack, port) for port in ("http", "grpc", "metrics")] == [{"0.0.0.0"}] * 3
        assert stack.embed(["a text"]).shape == (1, 384)
        (warning,) = stack.said().splitlines()
        assert " WARNING Triton's ports" in warning
        assert f"whoever reaches {stack.ports['http']} can end Triton" in warning
    finally:
        assert stack.stop() == 0


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default family, and tiny ones whose names come before it."""
    repository = tmp_path_factory.mktemp("mixed") / "repository"
    for folder in REPOSITORY.glob("minilm*"):
        shutil.copytree(folder, repository / folder.name)
    build_tiny(["bert-cls", "bert-cross-encoder"], "--repository", str(repository))
    return repository


@pytest.mark.parametrize(
    ("options", "embed", "rerank", "tried"),
    [
        ([], "minilm", "minilm-rerank", ["/embed", "/rerank"]),
        (["--preload", "bert-cls"], "bert-cls", "minilm-rerank", ["/embed"]),
        (["--preload", "bert-cross-encoder"], "minilm", "bert-cross-encoder", ["/rerank"]),
        (["--preload", "minilm", "--pin", "bert-cls"], "bert-cls", "minilm-rerank", ["/embed", "/rerank"]),
    ],
)
def test_calls_without_a_name_have_a_model_that_is_said(
    tmp_path: Path, mixed: Path, options: list[str], embed: str, rerank: str, tried: list[str]
) -> None:
    """Those of the command line, else the default family, whatever else is built."""
    stack = Stack(tmp_path, ["--repository", str(mixed), *options]).start()
    try:
        assert f"without a name       embed: {embed}, rerank: {rerank}\n" in stack.greeting()
        assert stack.post("embed", "/embed", {"texts": ["a"]}).json()["model"] == embed
        assert stack.rerank("a query", ["a document"])["model"] == rerank
        calls = re.findall(r"curl -s (\S+) -d '(.*)'", stack.greeting())
        assert [url.partition("/")[2].rpartition("/")[2] for url, _ in calls] == [
            path.strip("/") for path in tried
        ]
        for url, body in calls:
            assert send(urllib.request.Request(url, body.encode())).status == 200
    finally:
        assert stack.stop() == 0


def spoil_scoring(repository: Path) -> None:
    (repository / "minilm-rerank-scoring" / "config.pbtxt").write_text("name: nonsense {")


def lose_ensemble(repository: Path) -> None:
    shutil.rmtree(repository / "minilm" / "1")


@pytest.mark.parametrize(
    ("damage", "sound", "broken"),
    [(spoil_scoring, "minilm", "minilm-rerank"), (lose_ensemble, "minilm-rerank", "minilm")],
)
def test_a_sound_ensemble_is_served_beside_a_broken_one_of_its_checkpoint(
    tmp_path: Path, damage: Callable[[Path], None], sound: str, broken: str
) -> None:
    """At the start, after both were unloaded, and once more when the broken one has been mended."""
    whole, repository = tmp_path / "whole", tmp_path / "repository"
    for folder in REPOSITORY.glob("minilm*"):
        shutil.copytree(folder, whole / folder.name)
    shutil.copytree(whole, repository)
    damage(repository)
    stack = Stack(
        tmp_path / "work", ["--repository", str(repository), "--models", "minilm", "minilm-rerank"]
    ).start()
    calls = {
        "minilm": ("/embed", {"texts": ["a"], "model": "minilm"}),
        "minilm-rerank": ("/rerank", {"query": "a", "documents": ["a"], "model": "minilm-rerank"}),
    }

    def answers() -> dict[str, int]:
        return {name: stack.post("embed", *call).status for name, call in calls.items()}

    try:
        assert f"serving {sound}\n" in stack.greeting()
        assert f"WARNING {broken} is not served: " in stack.said()
        for _ in range(2):
            assert answers() == {sound: 200, broken: 503}
            assert f"Triton cannot serve {broken}: " in stack.post("embed", *calls[broken]).json()["error"]
            assert stack.get("embed", "/health").status == 503
            partial = stack.get("embed", "/health?partial=1").json()
            assert (partial["models"], list(partial["failing"])) == ([sound], [broken])
            listed = {model["name"]: model for model in stack.get("embed", "/models").json()["models"]}
            assert (listed[sound]["state"], listed[broken]["state"]) == ("loaded", "absent")
            assert listed[broken]["cause"]
            assert not listed[sound]["cause"]
            assert stack.post("embed", f"/models/{sound}/unload", b"").status == 200
        shutil.rmtree(repository)
        shutil.copytree(whole, repository)
        assert answers() == {"minilm": 200, "minilm-rerank": 200}
        assert stack.get("embed", "/health").json()["models"] == ["minilm", "minilm-rerank"]
    finally:
        assert stack.stop() == 0


def test_what_is_built_after_the_start_wants_another_one(tmp_path: Path, mixed: Path) -> None:
    repository = Path(shutil.copytree(mixed, tmp_path / "repository"))
    stack = Stack(tmp_path / "work", ["--repository", str(repository), "--preload", "minilm"]).start()
    try:
        absent = stack.post("embed", "/embed", {"texts": ["a"], "model": "roberta"})
        assert (absent.status, absent.json()["error"]) == (
            404,
            "no model 'roberta' for embed; this server has: minilm, bert-cls",
        )
        build_tiny(["roberta"], "--repository", str(repository))
        for answer in (
            stack.post("embed", "/embed", {"texts": ["a"], "model": "roberta"}),
            stack.post("embed", "/models/roberta/load", b""),
        ):
            assert answer.status == 404
            assert "roberta is built: start the server again to serve it" in answer.json()["error"]
        outside = stack.post("embed", "/embed", {"texts": ["a"], "model": "../repository/roberta"})
        assert "is built" not in outside.json()["error"]
        assert stack.stop() == 0
        stack.start()
        assert stack.embed(["a"], "roberta").shape[0] == 1
    finally:
        assert stack.stop() == 0


def test_loads_of_the_start_and_calls_under_way_are_counted(own_stack: Stack) -> None:
    def row() -> dict[str, object]:
        return next(m for m in own_stack.get("embed", "/models").json()["models"] if m["name"] == "minilm")

    loads = 'gateway_model_loads_total{model="minilm"}'
    assert f"{loads} 1.0" in own_stack.get("embed", "/metrics").body.decode()
    assert (row()["loads"], row()["calls_in_flight"]) == (1, 0)
    own_stack.triton().suspend()
    with ThreadPoolExecutor(3) as callers:
        calls = [callers.submit(own_stack.embed, [f"text {i}"]) for i in range(3)]
        until(lambda: row()["calls_in_flight"] == 3, seconds=10)
        own_stack.triton().resume()
        assert all(call.result().shape == (1, 384) for call in calls)
    assert row()["calls_in_flight"] == 0
    assert own_stack.post("embed", "/models/minilm/unload", b"").status == 200
    assert own_stack.post("embed", "/models/minilm/load", b"").status == 200
    assert f"{loads} 2.0" in own_stack.get("embed", "/metrics").body.decode()


def test_what_is_unloaded_for_memory_is_said_with_numbers(tmp_path: Path) -> None:
    """Of a model that takes more than it did when it was last served."""
    repository = tmp_path / "repository"
    for folder in REPOSITORY.glob("minilm*"):
        shutil.copytree(folder, repository / folder.name)
    (family,) = families(repository, ["minilm", "minilm-rerank"])
    keep_hint(repository, family, fingerprint(repository, family), 30 * 10**6)
    stack = Stack(tmp_path / "work", ["--repository", str(repository), "--memory", "60MB"]).start()
    try:
        sentence = r"minilm: unloaded \(memory: models took (\d+) MB of 60 MB, which --memory may raise\)"
        until(lambda: bool(re.search(sentence, stack.said())), seconds=30)
        (size,) = re.findall(sentence, stack.said())
        refused = stack.post("embed", "/embed", {"texts": ["a"]})
        assert refused.status == 507
        assert refused.json()["error"].startswith(f"minilm takes {size} MB; of the 60 MB for models")
    finally:
        assert stack.stop() == 0
