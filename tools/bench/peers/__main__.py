"""Measures what a user would pick instead beside the stack: same checkpoint, texts, cores and load generator."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from build import catalog
from build.sources.obtain import obtain
from build.verification.texts import docstrings
from tools.bench import machine, plots
from tools.bench.measure import FAMILY
from tools.bench.peers.processes import CACHE, HERE, OFFLINE, environment, listening
from tools.bench.perf_analyzer import Load, PerfAnalyzer
from tools.bench.raw import RawEngine
from tools.bench.report import peers_table
from tools.bench.results import RESULTS, Measurement, Results, Round, percentiles
from tools.bench.server import Process, free_ports, stack
from tools.command import ROOT
from tools.direct import open_url

TEXTS = 384
CALLS = [(1, 1), (32, 1), (1, 64)]
"""(clients, texts a call) of every server."""
SAME_COSINE = 0.999
"""With vectors of another precision."""


@dataclass(frozen=True)
class Server:
    """An embedding server that takes JSON over HTTP."""

    processes: list[Process]
    address: str
    route: str
    field: str
    """Of the body: what holds the texts."""

    def cpu_seconds(self) -> float:
        """Of all its processes so far."""
        return sum(sum(one.cpu_seconds().values()) for one in self.processes)

    def embed(self, texts: list[str]) -> npt.NDArray[np.float64]:
        """One call: the vectors."""
        body = json.dumps({self.field: texts, "model": FAMILY}).encode()
        request = urllib.request.Request(f"http://{self.address}/{self.route}", body)
        request.add_header("Content-Type", "application/json")
        with open_url(request) as reply:
            answer = json.loads(reply.read())
        rows = answer["embeddings"] if "embeddings" in answer else [row["embedding"] for row in answer["data"]]
        return np.array(rows)


@dataclass(frozen=True)
class Library:
    """sentence-transformers in a process of its own, see encode.py."""

    questions: IO[str]
    answers: IO[str]

    def encode(self, texts: list[str], singly: bool) -> tuple[list[float], float]:
        """(milliseconds of each call, seconds of CPU time)."""
        self.questions.write(json.dumps({"texts": texts, "singly": singly}) + "\n")
        self.questions.flush()
        answer = json.loads(self.answers.readline())
        return answer["milliseconds"], answer["cpu_seconds"]


@dataclass
class Comparison:
    """Everything under test, and what has been seen of it."""

    servers: dict[str, Server]
    library: Library
    load: PerfAnalyzer
    texts: list[str]
    tokens: int
    rounds: dict[tuple[str, int, int], list[Round]] = field(default_factory=dict)
    latencies: dict[tuple[str, int, int], list[float]] = field(default_factory=dict)

    def check(self) -> None:
        """Raises RuntimeError unless every server gives the vectors of this one: else it does other work."""
        expected = self.servers["this"].embed(self.texts[:64])
        for name, server in self.servers.items():
            lowest = (server.embed(self.texts[:64]) * expected).sum(axis=1).min()
            if lowest < SAME_COSINE:
                raise RuntimeError(f"{name} gives other vectors: cosine {lowest:.4f}")

    def run(self) -> None:
        """One round."""
        for clients, texts_per_call in CALLS:
            for name, server in self.servers.items():
                cpu = server.cpu_seconds()
                seen = self._send(server, clients, texts_per_call)
                cpu = server.cpu_seconds() - cpu
                self._note((name, clients, texts_per_call), seen.seconds, cpu, seen)
        for singly in (True, False):
            milliseconds, cpu = self.library.encode(self.texts, singly)
            seconds = sum(milliseconds) / 1000
            texts_per_call = 1 if singly else len(self.texts)
            self._note(("sentence-transformers", 1, texts_per_call), seconds, cpu, Load(seconds, milliseconds, 0))

    def forget(self) -> None:
        """Forgets the rounds so far."""
        self.rounds, self.latencies = {}, {}

    def measurements(self) -> list[Measurement]:
        """Everything."""
        return [
            Measurement(
                name, "docstrings", clients, texts, rounds, percentiles(self.latencies[name, clients, texts])
            )
            for (name, clients, texts), rounds in self.rounds.items()
        ]

    def _send(self, server: Server, clients: int, texts_per_call: int) -> Load:
        calls = [self.texts[i : i + texts_per_call] for i in range(0, len(self.texts), texts_per_call)]
        bodies = [{server.field: call, "model": FAMILY} for call in calls]
        return self.load.post(server.address, server.route, bodies, clients)

    def _note(self, key: tuple[str, int, int], seconds: float, cpu: float, seen: Load) -> None:
        one = Round(len(self.texts), self.tokens, seconds, {"all": cpu}, seen.cpu_seconds)
        self.rounds.setdefault(key, []).append(one)
        self.latencies.setdefault(key, []).extend(seen.milliseconds)


def main() -> int:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default: 3)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of JSON and plot (default: results/)")
    options = parser.parse_args()
    pythons = {name: environment(name) for name in ("sentence-transformers", "infinity", "home-made")}
    checkpoint = obtain(catalog.load(FAMILY), ROOT / ".cache" / "checkpoints").folder
    texts = docstrings()[:TEXTS]
    with ExitStack() as running:
        ours = running.enter_context(stack([FAMILY], ROOT / "model_repository"))
        raw = RawEngine(ROOT / "model_repository", FAMILY, ours.precision).prepare(texts)
        comparison = Comparison(
            servers={
                "this": Server([ours], ours.address("embed"), "embed", "texts"),
                "infinity": running.enter_context(infinity(pythons["infinity"], checkpoint)),
                "home-made": running.enter_context(home_made(pythons, checkpoint)),
            },
            library=running.enter_context(library(pythons["sentence-transformers"], checkpoint)),
            load=PerfAnalyzer(ROOT / ".cache" / "perf_analyzer"),
            texts=texts,
            tokens=raw.tokens,
        )
        comparison.check()
        comparison.run()
        comparison.forget()
        start, used = machine.Moment.now(), own_seconds(comparison)
        for i in range(options.rounds):
            print(f"round {i + 1} of {options.rounds}", file=sys.stderr, flush=True)
            comparison.run()
        measurements = comparison.measurements()
        noise = machine.noise(start, own_seconds(comparison) - used)
        results = Results(machine.describe(), ours.precision, noise, {}, measurements)
    print(peers_table(results), f"noise: {noise}", sep="\n\n")
    for sentence in machine.warnings(noise):
        print(sentence)
    results.write(options.output / "peers.json")
    plots.draw_peers(results, options.output)
    return 0


def own_seconds(comparison: Comparison) -> float:
    """CPU time of all that is measured, this process and the load generators so far."""
    # Only the library is called without a load generator.
    seen = [one for many in comparison.rounds.values() for one in many]
    library = sum(one.cpu_seconds["all"] for one in seen if not one.load_cpu_seconds)
    servers = sum(server.cpu_seconds() for server in comparison.servers.values())
    return time.process_time() + servers + library + sum(one.load_cpu_seconds for one in seen)


@contextmanager
def infinity(python: Path, checkpoint: Path) -> Iterator[Server]:
    """infinity_emb's own server with its torch engine."""
    (port,) = free_ports(1)
    words = [str(python.with_name("infinity_emb")), "v2", "--model-id", str(checkpoint), "--device", "cpu"]
    words += ["--engine", "torch", "--served-model-name", FAMILY, "--log-level", "error"]
    with listening([*words, "--host", "127.0.0.1", "--port", str(port)], port, OFFLINE) as process:
        yield Server([process], f"127.0.0.1:{port}", "embeddings", "input")


@contextmanager
def home_made(pythons: dict[str, Path], checkpoint: Path) -> Iterator[Server]:
    """home_made.py in front of a padded encoder in the embedded Triton."""
    repository = CACHE / "repository"
    shutil.copytree(HERE / "encoder", repository / "encoder", dirs_exist_ok=True)
    graph = repository / "encoder" / "1" / "model.onnx"
    if not graph.exists():
        part = graph.with_suffix(".part")
        words = [pythons["sentence-transformers"], HERE / "export.py", checkpoint, part]
        subprocess.run(words, check=True, capture_output=True)
        part.rename(graph)
    port, *ports = free_ports(4)
    triton = [sys.executable, "-m", "tools.triton", "--repository", str(repository), "--models", "encoder"]
    triton += ["--work-folder", str(CACHE)]
    for name, one in zip(("http", "grpc", "metrics"), ports, strict=True):
        triton += [f"--{name}-port", str(one)]
    settings = OFFLINE | {"CHECKPOINT": str(checkpoint), "TRITON": f"127.0.0.1:{ports[1]}"}
    uvicorn = [str(pythons["home-made"]), "-m", "uvicorn", "home_made:app", "--app-dir", str(HERE)]
    uvicorn += ["--port", str(port), "--no-access-log", "--log-level", "warning"]
    with listening(triton, ports[0], {}) as encoder, listening(uvicorn, port, settings) as gateway:
        yield Server([encoder, gateway], f"127.0.0.1:{port}", "embed", "texts")


@contextmanager
def library(python: Path, checkpoint: Path) -> Iterator[Library]:
    """sentence-transformers."""
    words = [str(python), str(HERE / "encode.py"), str(checkpoint)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=os.environ | OFFLINE, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline().strip() != "ready":
                raise SystemExit("sentence-transformers did not start")  # it has said why
            yield Library(process.stdin, process.stdout)
        finally:
            process.terminate()


if __name__ == "__main__":
    sys.exit(main())
