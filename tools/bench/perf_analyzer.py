"""NVIDIA's perf_analyzer, out of the last tritonclient wheel whose build runs on glibc 2.35."""

from __future__ import annotations

import csv
import json
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

from build.catalog import Wheel
from build.checkpoint import download_wheel
from tools.triton import wheel_libraries

WHEEL = Wheel(
    requirement="tritonclient==2.51.0",
    sha256="c485bb0123bdf310f90bc8b03d3489b28df2ffed55b30c7eee0b795b48113d52",
    folder="tritonclient-2.51.0.data/data/bin",
)
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
"""What it links to -> the same library in the pytriton wheel, under the name auditwheel gave it."""


WINDOW_MS = 1500


@dataclass(frozen=True)
class Load:
    """What perf_analyzer saw of one load."""

    texts_per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


class PerfAnalyzer:
    """Sends one text a request, either to a Triton ensemble over gRPC or to the gateway's /embed over HTTP."""

    def __init__(self, texts: list[str], folder: Path) -> None:
        self._folder = folder
        self._binary = _obtain(folder)
        self._grpc_input = self._write("grpc.json", [{"text": [text]} for text in texts])
        self._http_input = self._write("http.json", [{"payload": [{"texts": [text]}]} for text in texts])

    def ensemble(self, model: str, address: str, concurrency: int) -> Load:
        """v2 infer over gRPC."""
        return self._run(model, concurrency, self._grpc_input, "-i", "grpc", "-u", address)

    def gateway(self, address: str, concurrency: int) -> Load:
        """`POST /embed`: perf_analyzer's OpenAI mode posts any JSON payload to any route."""
        options = ["--service-kind", "openai", "--endpoint", "embed", "--async", "-u", address]
        return self._run("minilm", concurrency, self._http_input, *options)

    def _run(self, model: str, concurrency: int, texts: Path, *options: str) -> Load:
        report = self._folder / "report.csv"
        command = [str(self._binary), "-m", model, "--input-data", str(texts), *options]
        command += ["--concurrency-range", str(concurrency), "-f", str(report)]
        # Three windows of any spread: how steady the machine is shows in the rounds.
        command += ["--measurement-interval", str(WINDOW_MS), "--max-trials", "3", "--stability-percentage", "100"]
        libraries = f"{self._folder}:{wheel_libraries()}"
        done = subprocess.run(
            command, env={"LD_LIBRARY_PATH": libraries}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"perf_analyzer failed: {done.stderr or done.stdout}")
        with report.open() as file:
            row = next(csv.DictReader(file))
        p50, p95, p99 = (float(row[f"p{n} latency"]) / 1000 for n in (50, 95, 99))
        return Load(float(row["Inferences/Second"]), p50, p95, p99)

    def _write(self, name: str, requests: list[dict[str, list[object]]]) -> Path:
        path = self._folder / name
        path.write_text(json.dumps({"data": requests}))
        return path


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
        (found,) = wheel_libraries().glob(pattern)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(found)
    return binary
