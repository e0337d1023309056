"""The real stack, started as a user starts it, on ports of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from hypothesis import settings
from tritonclient.grpc import InferenceServerClient, InferInput
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tools.access import HEADER, secret_file
from tools.bench.server import PORTS, free_ports

ROOT = Path(__file__).parent.parent
REFERENCE = Path(__file__).parent / "reference"
TINY = REFERENCE / "tiny"
# The same examples in every run: a test that fails now and then tells nobody anything. New ones are looked for by
# `--hypothesis-profile default`.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

# `make test` hands down its variables and its depth: a make that a test runs would take them for its own.
for inherited in ("ARGS", "MAKELEVEL", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS"):
    os.environ.pop(inherited, None)

# What a shell runs in its background ignores Ctrl-C, and so would all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

SERVERLESS = [
    *("accounts", "adapters", "build", "check", "command", "contributing", "dequantised", "engine", "exported"),
    *("graphs", "heads", "hostile_folders", "hostile_onnx", "imports", "inspect", "long_texts", "makefile"),
    *("published", "refused_checkpoints", "rules", "sources", "variants", "vocabularies"),
]
"""Modules that start no server."""


class Scheduling(LoadScopeScheduling):
    """Where `make test` runs what: tests of servers one after another in one process, the others beside them."""

    def _split_scope(self, nodeid: str) -> str:
        module = Path(nodeid.partition("::")[0]).stem
        return module if module.removeprefix("test_") in SERVERLESS else "servers"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    """For xdist, where it is told how many processes there are."""
    return Scheduling(config, log)


@dataclass
class Answer:
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Stack:
    """One `python -m tools.serve` process: Triton, its stubs and the gateway."""

    work_folder: Path
    options: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    wrapper: list[str] = field(default_factory=list)
    """What runs the command: `wrapper` python -m tools.serve ..."""
    python: str = sys.executable
    ports: dict[str, int] = field(default_factory=lambda: dict(zip(PORTS, free_ports(len(PORTS)), strict=True)))

    def start(self) -> Stack:
        """Starts the stack and waits until it says that it serves."""
        self.launch()
        while "Ctrl-C" not in self.greeting():
            assert self.process.poll() is None, f"the stack did not start: {self.errors()}"
            time.sleep(0.05)
        return self

    def launch(self) -> None:
        """Starts the process only."""
        self.process = self.run("-m", "tools.serve", *self.work_options(), *self.port_options(*PORTS))

    def work_options(self) -> list[str]:
        return ["--work-folder", str(self.work_folder)]

    def port_options(self, *names: str) -> list[str]:
        return [word for name in names for word in (f"--{name}-port", str(self.ports[name]))]

    def run(self, *words: str, prefix: str = "") -> subprocess.Popen[bytes]:
        """Starts Python with these words and the stack's options; what it writes goes to files of that prefix."""
        output, errors = self._output(f"{prefix}output"), self._output(f"{prefix}errors")
        with output.open("wb") as stdout, errors.open("wb") as stderr:
            return subprocess.Popen(
                [*self.wrapper, self.python, *words, *self.options],
                cwd=ROOT,
                env=os.environ | self.environment,
                stdout=stdout,
                stderr=stderr,
            )

    def greeting(self) -> str:
        """What the process has written to stdout."""
        return self._output("output").read_text()

    def said(self) -> str:
        """What the process has written to stderr."""
        return self._output("errors").read_text()

    def errors(self) -> str:
        """The same, once it has ended."""
        self.process.wait(60)
        return self.said()

    def stop(self) -> int:
        """Sends SIGTERM and returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)

    def _output(self, name: str) -> Path:
        return self.work_folder.with_name(f"{self.work_folder.name}-{self.ports['http']}-{name}.txt")

    def tree(self) -> list[psutil.Process]:
        """Every process of the stack: this one, Triton and its stubs."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def triton(self) -> psutil.Process:
        """The tritonserver process."""
        (found,) = (process for process in self.tree() if process.name() == "tritonserver")
        return found

    def step(self, name: str) -> psutil.Process:
        """The process of one model."""
        (found,) = (process for process in self.tree() if any(f"{name}_0" in word for word in process.cmdline()))
        return found

    def secret(self) -> str:
        """What Triton's management APIs are closed behind."""
        return secret_file(self.work_folder, self.ports["http"]).read_text()

    def segments(self) -> list[Path]:
        """Its shared-memory segments."""
        return sorted(Path("/dev/shm").glob(f"triton-embeddings-{self.process.pid}-*"))

    def url(self, port: str, path: str) -> str:
        return f"http://127.0.0.1:{self.ports[port]}{path}"

    def get(self, port: str, path: str) -> Answer:
        return send(urllib.request.Request(self.url(port, path)))

    def post(self, port: str, path: str, content: object, headers: Mapping[str, str] = {}) -> Answer:
        """Posts JSON, or `content` itself when it is bytes."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return send(urllib.request.Request(self.url(port, path), body, dict(headers)))

    def manage(self, path: str) -> Answer:
        """Posts to a management API of Triton's, as whoever has the secret may."""
        return self.post("http", f"/v2/repository/{path}", {}, {HEADER: self.secret()})

    def embed(self, texts: list[str], model: str | None = None) -> npt.NDArray[np.float32]:
        answer = self.post("embed", "/embed", {"texts": texts, "model": model})
        assert answer.status == 200, answer.body
        return np.array(answer.json()["embeddings"], np.float32)

    def rerank(self, query: str, documents: list[str]) -> Any:
        answer = self.post("rerank", "/rerank", {"query": query, "documents": documents})
        assert answer.status == 200, answer.body
        return answer.json()

    def infer(
        self, model: str, parameters: dict[str, Any] | None = None, **texts: list[str]
    ) -> dict[str, npt.NDArray[Any]]:
        """v2 infer over gRPC with BYTES [B, 1] tensors: every output."""
        inputs = []
        for name, values in texts.items():
            array = np.array([[value.encode()] for value in values], np.object_)
            inputs.append(InferInput(name, array.shape, "BYTES").set_data_from_numpy(array))
        with InferenceServerClient(f"127.0.0.1:{self.ports['grpc']}") as client:
            result = client.infer(model, inputs, parameters=parameters)
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

    def statistics(self, model: str) -> Any:
        """Triton's own statistics of one model."""
        return self.get("http", f"/v2/models/{model}/stats").json()["model_stats"][0]

    def metric(self, name: str, **labels: str) -> float:
        """One sample of Triton's metrics."""
        if name.startswith("encoder_"):
            time.sleep(0.3)  # steps tell what they count four times a second
        lines = self.get("metrics", "/metrics").body.decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        (line,) = (x for x in lines if x.startswith(f"{name}{{") and all(label in x for label in wanted))
        return float(line.rsplit(" ", 1)[1])


def send(request: urllib.request.Request) -> Answer:
    """Sends a request; an error status is an answer like any other."""
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return Answer(reply.status, dict(reply.headers), reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, dict(error.headers), error.read())


def cosines(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Cosine of each row of `a` with the same row of `b`; zeros are alike, and like nothing else."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1)
    both = ~a64.any(axis=1) & ~b64.any(axis=1)
    return np.where(both, 1, (a64 * b64).sum(axis=1) / np.maximum(lengths, 1e-300))


def rows(flat: npt.NDArray[Any], counts: npt.NDArray[np.int32]) -> list[list[int]]:
    """A reference's `flat` values as one list for each text."""
    return [row.tolist() for row in np.split(flat, np.cumsum(counts)[:-1])]


@dataclass(frozen=True)
class Reference:
    """What sentence-transformers gives for the committed texts."""

    texts: list[str]
    embeddings: npt.NDArray[np.float32]
    token_ids: list[list[int]]
    truncated: list[bool]


@pytest.fixture(scope="session")
def reference() -> Reference:
    arrays = np.load(REFERENCE / "minilm.npz")
    return Reference(
        texts=json.loads((REFERENCE / "texts.json").read_text()),
        embeddings=arrays["embeddings"],
        token_ids=rows(arrays["token_ids"], arrays["token_counts"]),
        truncated=arrays["truncated"].tolist(),
    )


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack as `make serve` starts it, shared by the tests that leave it as they found it."""
    running = Stack(tmp_path_factory.mktemp("stack")).start()
    yield running
    assert running.stop() == 0
    assert not running.segments()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Three tiny families, shared by the tests of backfills."""
    from tiny import build_tiny  # which imports this

    folder, families = tmp_path_factory.mktemp("small"), ["bert-cls", "roberta", "bert-cross-encoder"]
    build_tiny(families, "--repository", str(folder / "repository"))
    options = ["--repository", str(folder / "repository"), "--models", *families]
    running = Stack(folder / "work", options).start()
    yield running
    assert running.stop() == 0


@pytest.fixture
def own_stack(tmp_path: Path) -> Iterator[Stack]:
    """A stack that the test may damage."""
    running = Stack(tmp_path / "stack").start()
    yield running
    running.stop()


@dataclass(frozen=True)
class Precision:
    """A stack that computes in one precision, and how far it may be from the reference."""

    stack: Stack
    minimum_cosine: float


@pytest.fixture(scope="session", params=["fp32", "bf16"])
def precise(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Precision]:
    """A stack in fp32, then one in bf16."""
    folder = tmp_path_factory.mktemp(request.param)
    running = Stack(folder, environment={"ENCODER_PRECISION": request.param}).start()
    yield Precision(running, {"fp32": 0.99999, "bf16": 0.9995}[request.param])
    assert running.stop() == 0
