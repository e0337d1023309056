"""NVIDIA's perf_analyzer, out of the last tritonclient wheel whose build runs on glibc 2.35."""

from __future__ import annotations

import json
import resource
import subprocess
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build.catalog import Wheel
from build.sources.obtain import download_wheel
from tools.triton import wheel

WHEEL = Wheel(
    requirement="tritonclient==2.51.0",
    sha256="c485bb0123bdf310f90bc8b03d3489b28df2ffed55b30c7eee0b795b48113d52",
    folder="tritonclient-2.51.0.data/data/bin",
)
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
"""What it links to -> the same library in the pytriton wheel, under the name auditwheel gave it."""


@dataclass(frozen=True)
class Load:
    """What perf_analyzer saw of one load."""

    seconds: float
    """Seconds from the first request to the last answer."""
    milliseconds: list[float]
    """Latency of each request."""
    cpu_seconds: float
    """What perf_analyzer itself took."""


class PerfAnalyzer:
    """Sends a fixed list of requests once, `clients` at a time, and times each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._binary = _obtain(folder)

    def grpc(self, address: str, model: str, texts: list[str], clients: int, texts_per_call: int) -> Load:
        """v2 infer of an ensemble over gRPC."""
        options = ["-i", "grpc", "-u", address, "-b", str(texts_per_call)]
        requests = len(texts) // texts_per_call
        return self._run(model, [{"text": [text]} for text in texts], requests, clients, options)

    def post(self, address: str, route: str, bodies: list[Any], clients: int) -> Load:
        """JSON over HTTP: perf_analyzer's OpenAI mode posts any payload to any route."""
        options = ["--service-kind", "openai", "--endpoint", route, "--async", "-u", address]
        return self._run("any", [{"payload": [body]} for body in bodies], len(bodies), clients, options)

    def _run(self, model: str, entries: list[Any], requests: int, clients: int, options: list[str]) -> Load:
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            return self._run_in(Path(folder), model, entries, requests, clients, options)

    def _run_in(
        self, folder: Path, model: str, entries: list[Any], requests: int, clients: int, options: list[str]
    ) -> Load:
        data, export = folder / "requests.json", folder / "export.json"
        data.write_text(json.dumps({"data": entries}))
        command = [str(self._binary), "-m", model, "--input-data", str(data), *options]
        command += ["--concurrency-range", str(clients), "--request-count", str(requests)]
        command += ["--profile-export-file", str(export)]
        before = _children_seconds()
        done = subprocess.run(
            command,
            cwd=folder,
            env={"LD_LIBRARY_PATH": f"{self._folder}:{wheel.libraries()}"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"perf_analyzer failed: {(done.stderr or done.stdout)[:500]}")
        (experiment,) = json.loads(export.read_bytes())["experiments"]
        sent = [request["timestamp"] for request in experiment["requests"]]
        answered = [request["response_timestamps"][-1] for request in experiment["requests"]]
        if len(sent) != requests:
            raise RuntimeError(f"perf_analyzer sent {len(sent)} requests instead of {requests}")
        return Load(
            seconds=(max(answered) - min(sent)) / 1e9,
            milliseconds=[(b - a) / 1e6 for a, b in zip(sent, answered, strict=True)],
            cpu_seconds=_children_seconds() - before,
        )


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _obtain(folder: Path) -> Path:
    """Puts the binary and the names of its libraries into `folder`, once."""
    folder.mkdir(parents=True, exist_ok=True)
    binary = folder / "perf_analyzer"
    if not binary.exists():
        with download_wheel(WHEEL, folder) as archive, zipfile.ZipFile(archive) as contents:
            part = folder / "perf_analyzer.part"
            part.write_bytes(contents.read(f"{WHEEL.folder}/perf_analyzer"))
            part.chmod(0o755)
            part.rename(binary)
    for name, pattern in LIBRARIES.items():
        (found,) = wheel.libraries().glob(pattern)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(found)
    return binary
