"""A server under test: starts it on free ports, and reads its CPU time, memory and Triton's statistics."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tools.command import ROOT
from tools.direct import open_url

WORK = ROOT / ".cache" / "bench"
LATER = 0.5
"""Seconds after which steps have told Triton what they counted."""
PORTS = ("embed", "rerank", "http", "grpc", "metrics")


@dataclass(frozen=True)
class Process:
    """A started command and all its children."""

    root: psutil.Process

    def cpu_seconds(self) -> dict[str, float]:
        """Role of a process -> seconds of CPU time that it took so far."""
        seconds: dict[str, float] = {}
        for process in self._tree():
            role, times = _role(process, self.root), process.cpu_times()
            seconds[role] = seconds.get(role, 0.0) + times.user + times.system
        return seconds

    def resident(self) -> dict[str, int]:
        """Role of a process -> bytes of memory, pages that processes share counted once."""
        sizes: dict[str, int] = {}
        for process in self._tree():
            role = _role(process, self.root)
            sizes[role] = sizes.get(role, 0) + process.memory_full_info().pss
        return sizes

    def shared_memory(self) -> int:
        """Bytes of its segments in /dev/shm that are in use; resident memory holds them too."""
        segments = Path("/dev/shm").glob(f"triton-embeddings-{self.root.pid}-*")  # noqa: S108
        return sum(segment.stat().st_blocks * 512 for segment in segments)

    def _tree(self) -> list[psutil.Process]:
        return [self.root, *self.root.children(recursive=True)]


@dataclass(frozen=True)
class Counters:
    """What a stack has counted since it started."""

    cpu_seconds: dict[str, float]
    """Role of a process -> seconds of CPU time."""
    tokens: dict[str, float]
    """Tokens that encoders received and computed."""
    models: dict[str, dict[str, float]]
    """Model -> texts, batches, requests; milliseconds that they waited and were computed."""

    def __sub__(self, before: Counters) -> Counters:
        """What was counted since `before`."""

        def grown(new: dict[str, float], old: dict[str, float]) -> dict[str, float]:
            return {key: value - old.get(key, 0) for key, value in new.items()}

        models = {name: grown(model, before.models[name]) for name, model in self.models.items()}
        return Counters(grown(self.cpu_seconds, before.cpu_seconds), grown(self.tokens, before.tokens), models)


@dataclass(frozen=True)
class Stack(Process):
    """Triton and the gateway, as `make serve` starts them."""

    ports: dict[str, int]
    work_folder: Path

    def address(self, port: str) -> str:
        """host:port of one of PORTS."""
        return f"127.0.0.1:{self.ports[port]}"

    @property
    def precision(self) -> str:
        """What the encoders compute in, by their log line."""
        log = (self.work_folder / f"triton-{self.ports['http']}.log").read_text(errors="replace")
        return log.split("-encoder: ")[1].split(",")[0]

    def counters(self) -> Counters:
        """All that is counted, now."""
        seconds = self.cpu_seconds()
        return Counters(seconds, self._tokens(), self._statistics())

    def _statistics(self) -> dict[str, dict[str, float]]:
        """Triton's own, see Counters."""
        found = {}
        for model in json.loads(_get(self.address("http"), "/v2/models/stats"))["model_stats"]:
            times = model["inference_stats"]
            computed = [times[f"compute_{part}"]["ns"] for part in ("input", "infer", "output")]
            found[model["name"]] = {
                "texts": model["inference_count"],
                "batches": model["execution_count"],
                "requests": times["success"]["count"],
                "queue_ms": times["queue"]["ns"] / 1e6,
                "compute_ms": sum(computed) / 1e6,
            }
        return found

    def _tokens(self) -> dict[str, float]:
        """The encoders' own, see Counters; they tell them a little later."""
        time.sleep(LATER)
        lines = _get(self.address("metrics"), "/metrics").decode().splitlines()
        counts: dict[str, float] = {}
        for line in lines:
            if line.startswith("encoder_tokens_total{"):
                state = line.split('state="')[1].split('"')[0]
                counts[state] = counts.get(state, 0) + float(line.split()[-1])
        return counts


@contextmanager
def stack(
    models: Sequence[str],
    repository: Path,
    precision: str | None = None,
    python: str = sys.executable,
    checkout: Path = ROOT,
    options: Sequence[str] = (),
) -> Iterator[Stack]:
    """Serves `models` with the code of `checkout` while the block runs."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    words = [word for name in PORTS for word in (f"--{name}-port", str(ports[name]))]
    work_folder = WORK / f"serve-{ports['http']}"
    words += [*options, "--repository", str(repository), "--models", *models, "--work-folder", str(work_folder)]
    environment = {"ENCODER_PRECISION": precision} if precision else {}
    with command([python, "-m", "tools.serve", *words], "Ctrl-C", environment, checkout) as process:
        yield Stack(process.root, ports, work_folder)
    shutil.rmtree(work_folder)


@contextmanager
def command(
    words: Sequence[str], ready: str, environment: dict[str, str] | None = None, folder: Path = ROOT
) -> Iterator[Process]:
    """Runs a command in `folder` while the block runs, from the moment that it prints a line with `ready`."""
    with (
        ended_by_sigterm(),
        subprocess.Popen(
            words, stdout=subprocess.PIPE, text=True, cwd=folder, env=os.environ | (environment or {})
        ) as process,
    ):
        assert process.stdout is not None
        try:
            if not any(ready in line for line in process.stdout):
                raise SystemExit(f"{words[0]} did not start")  # it has said why
            yield Process(psutil.Process(process.pid))
        finally:
            process.terminate()
            process.stdout.read()


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Has SIGTERM end the block as Ctrl-C does: by an exception, so that what was started in it is ended, too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, below those that the system gives to connections."""
    sockets: list[socket.socket] = []
    while len(sockets) < count:
        one = socket.socket()
        try:
            one.bind(("127.0.0.1", random.randrange(10_000, 32_768)))
        except OSError:
            one.close()
            continue
        sockets.append(one)
    ports: list[int] = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _get(address: str, path: str) -> bytes:
    with open_url(f"http://{address}{path}") as reply:
        return bytes(reply.read())


def _role(process: psutil.Process, root: psutil.Process) -> str:
    """The started command is the gateway; a Python backend's process is named for the step that it runs."""
    if process == root:
        return "gateway"
    words = process.cmdline()
    models = [Path(word).parent.parent.name for word in words if word.endswith("model.py")]
    return models[0].rsplit("-", 1)[-1] if models else process.name()
