"""What is measured, one process after another: the encoder, the stack around it, and what else embeds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias
from urllib.error import HTTPError

import numpy as np
import numpy.typing as npt
import psutil
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from build.runtimes import RUNTIMES
from tools.bench import server
from tools.bench.gpu.checkpoint import WINDOW
from tools.bench.gpu.loads import Load
from tools.bench.peers.processes import OFFLINE, listening
from tools.bench.server import Process, free_ports
from tools.command import ROOT
from tools.direct import channel_options, open_url

CLIENTS = 8
CALL = 64
"""Texts of a call at most: what an ensemble takes."""
GRPC, EMBED = "v2 gRPC", "`/embed`"
INSTALLED = {"vllm": "vLLM", "text-embeddings-router": "TEI (fp16)"}
"""Servers that are measured where PATH has their command; TEI knows no bf16."""

Vectors: TypeAlias = npt.NDArray[np.float32]


class EngineError(Exception):
    """An engine cannot do what it is asked for; the message says why."""


class Engine(Protocol):
    """Something that embeds texts."""

    @property
    def process(self) -> Process:
        """What computes."""

    def run(self, load: Load, passes: int) -> tuple[float, float]:
        """All texts, so many times over: (tokens computed, seconds). Raises EngineError."""


@dataclass(frozen=True)
class Worker:
    """A model in a process of its own, see worker.py."""

    process: Process
    questions: IO[str]
    answers: IO[str]
    facts: dict[str, Any]
    reads_texts: bool
    """And not token ids."""

    def run(self, load: Load, passes: int) -> tuple[float, float]:
        """As Engine says."""
        rows = load.texts if self.reads_texts else load.ids
        return passes * load.tokens, float(self._ask(rows, passes, load.batch, vectors=False)["seconds"])

    def vectors(self, rows: Sequence[Any]) -> Vectors:
        """[n, H]. Raises EngineError."""
        return np.array(self._ask(rows, 1, 1, vectors=True)["vectors"], np.float32)

    def _ask(self, rows: Sequence[Any], passes: int, batch: int, vectors: bool) -> dict[str, Any]:
        question = {"rows": rows, "passes": passes, "batch": batch, "vectors": vectors}
        answer: dict[str, Any] = {"error": "its process has died"}
        with suppress(BrokenPipeError):
            print(json.dumps(question), file=self.questions, flush=True)
            if line := self.answers.readline():
                answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer


@dataclass(frozen=True)
class Server:
    """A server that several clients call at once."""

    process: Process
    send: Callable[[list[str]], Any]
    """One call."""
    computed: Callable[[], float] | None = None
    """Tokens so far, where the server counts them: of equal texts that meet in a batch ours computes one."""

    def run(self, load: Load, passes: int) -> tuple[float, float]:
        """As Engine says."""
        size = min(CALL, load.batch)
        calls = [load.texts[i : i + size] for i in range(0, len(load.texts), size)] * passes
        before = self.computed() if self.computed else 0.0
        start = time.perf_counter()
        try:
            with ThreadPoolExecutor(CLIENTS) as pool:
                for _ in pool.map(self.send, calls):
                    pass
        except HTTPError as error:
            raise EngineError(error.read().decode(errors="replace")[:300]) from None
        except (InferenceServerException, OSError) as error:
            raise EngineError(str(error)[:300]) from None
        seconds = time.perf_counter() - start
        return (self.computed() - before if self.computed else passes * load.tokens), seconds


@contextmanager
def worker(python: Path, *words: str, reads_texts: bool = False) -> Iterator[Worker]:
    """`python -m` a module that answers as worker.py says; raises EngineError when it does not start."""
    # Compiled kernels are code, so they are kept in a folder of our own.
    environment = os.environ | OFFLINE | {"TORCHINDUCTOR_CACHE_DIR": str(ROOT / ".cache" / "gpu-proof-kernels")}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen([python, "-m", *words], cwd=ROOT, env=environment, stderr=log, **pipes) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if not (facts := process.stdout.readline()):
                process.wait()
                log.seek(0)
                raise EngineError((log.read().strip().splitlines() or ["it said nothing"])[-1][:300])
            running = Process(psutil.Process(process.pid))
            yield Worker(running, process.stdin, process.stdout, json.loads(facts), reads_texts)
        finally:
            process.terminate()


def encoder(python: Path, repository: Path, family: str) -> AbstractContextManager[Worker]:
    """The encoder of a built family."""
    return worker(python, "tools.bench.gpu.encoder", str(repository / f"{family}-encoder" / "1"))


def peer(python: Path, checkpoint: Path, package: str, precision: str) -> AbstractContextManager[Worker]:
    """transformers, which reads token ids, or sentence-transformers, which reads texts."""
    words = ["tools.bench.gpu.peer", str(checkpoint), package, precision]
    return worker(python, *words, reads_texts=package == "sentence-transformers")


@contextmanager
def stack(python: Path, repository: Path, family: str) -> Iterator[dict[str, Server]]:
    """A built family through the real ensemble over gRPC, and through the gateway."""
    with server.stack([family], repository, python=str(python)) as running:
        address = running.address("grpc")
        client = InferenceServerClient(address, channel_args=channel_options(address))

        def infer(texts: list[str]) -> Vectors:
            array = np.array([[text.encode()] for text in texts], np.object_)
            tensor = InferInput("text", array.shape, "BYTES").set_data_from_numpy(array)
            embeddings: Vectors = client.infer(family, [tensor]).as_numpy("embeddings")
            return embeddings

        def computed() -> float:
            return running.counters().tokens["computed"]

        embed = poster(f"{running.address('embed')}/embed", "texts", family)
        yield {GRPC: Server(running, infer, computed), EMBED: Server(running, embed, computed)}


@contextmanager
def installed(command: str, checkpoint: Path) -> Iterator[Server]:
    """One of INSTALLED, found on PATH; raises EngineError where there is none, or none that starts."""
    if shutil.which(command) is None:
        raise EngineError(f"there is no {command} on PATH")
    (port,) = free_ports(1)
    if command == "vllm":
        words = ["vllm", "serve", str(checkpoint), "--runner", "pooling", "--max-model-len", str(WINDOW)]
        # Texts come again, pass after pass.
        words += ["--dtype", "bfloat16", "--no-enable-prefix-caching", "--served-model-name", "proof"]
    else:
        words = [command, "--model-id", str(checkpoint), "--served-model-name", "proof", "--dtype", "float16"]
        words += ["--max-batch-tokens", str(RUNTIMES["torch"].token_budget), "--max-client-batch-size", str(CALL)]
    try:
        with listening([*words, "--port", str(port)], port, OFFLINE) as process:
            yield Server(process, poster(f"127.0.0.1:{port}/v1/embeddings", "input", "proof"))
    except SystemExit as error:
        raise EngineError(str(error)) from None


def poster(place: str, field: str, model: str) -> Callable[[list[str]], bytes]:
    """Sends texts as JSON; the answer is left as it comes."""

    def send(texts: list[str]) -> bytes:
        request = urllib.request.Request(f"http://{place}", json.dumps({field: texts, "model": model}).encode())
        request.add_header("Content-Type", "application/json")
        with open_url(request) as reply:
            return bytes(reply.read())

    return send
