"""Runs the stack under perf_analyzer, interleaved with the raw engine on the same texts, and prints a table."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import psutil

from tools.bench.corpus import docstrings
from tools.bench.perf_analyzer import Load, PerfAnalyzer
from tools.bench.raw import RawEngine
from tools.command import ROOT

FAMILY = "minilm"
REPOSITORY = ROOT / "model_repository"
GATEWAY, HTTP, GRPC, METRICS = "localhost:8101", "localhost:8200", "localhost:8201", "localhost:8202"


@dataclass(frozen=True)
class Measurement:
    """One way to embed all texts once."""

    tokens_per_second: float
    tokens_per_cpu_second: float
    """CPU time of every server process together; the load generator's is left out."""
    texts_per_second: float
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    mean_batch_size: float | None = None
    """Of the encoder, by Triton's own count."""


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("--texts", type=int, default=512, help="texts in each measurement (default: 512)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default: 3)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="(default: 1 8 32)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="(default: what the server picks)")
    parser.add_argument("--json", type=Path, help="also write every measurement to this file")
    options = parser.parse_args()
    texts = docstrings(options.texts)
    with stack(options.precision) as server:
        precision = served_precision()
        raw = RawEngine(REPOSITORY, FAMILY, texts, precision)
        load = PerfAnalyzer(texts, ROOT / ".cache" / "perf_analyzer")
        ways: dict[str, Callable[[], Measurement]] = {"raw engine": partial(raw_loop, raw, len(texts))}
        for n in options.concurrency:
            clients = "client" if n == 1 else "clients"
            ensemble, gateway = partial(load.ensemble, FAMILY, GRPC, n), partial(load.gateway, GATEWAY, n)
            ways[f"v2 gRPC, {n} {clients}"] = partial(under_load, server, ensemble)
            ways[f"/embed, {n} {clients}"] = partial(under_load, server, gateway)
        print(f"{len(texts)} texts, {raw.tokens} tokens, {precision}, {os.cpu_count()} processors", flush=True)
        results: dict[str, list[Measurement]] = {name: [] for name in ways}
        for i in range(options.rounds + 1):
            print(f"round {i} of {options.rounds}" if i else "warming up", file=sys.stderr, flush=True)
            for name, measure in ways.items():
                measured = measure()
                if i:
                    results[name].append(measured)
        print(table(results))
        print(f"\nresident memory of the whole stack: {resident(server) / 2**20:.0f} MiB")
    if options.json:
        content = {name: [asdict(one) for one in many] for name, many in results.items()}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


def raw_loop(engine: RawEngine, texts: int) -> Measurement:
    """The raw engine over all texts."""
    wall, cpu = engine.run()
    return Measurement(engine.tokens / wall, engine.tokens / cpu, texts / wall)


def under_load(server: psutil.Process, load: Callable[[], Load]) -> Measurement:
    """One load, with what it cost the server by its own clocks and counters."""
    before = counters(server)
    seen = load()
    cpu, tokens, inferences, executions = (b - a for a, b in zip(before, counters(server), strict=True))
    return Measurement(
        tokens_per_second=tokens / inferences * seen.texts_per_second,
        tokens_per_cpu_second=tokens / cpu,
        texts_per_second=seen.texts_per_second,
        p50_ms=seen.p50_ms,
        p95_ms=seen.p95_ms,
        p99_ms=seen.p99_ms,
        mean_batch_size=inferences / executions,
    )


def counters(server: psutil.Process) -> tuple[float, float, float, float]:
    """(CPU seconds of the whole stack, tokens received, texts, batches of the encoder) since it started."""
    times = [process.cpu_times() for process in tree(server)]
    lines = get(METRICS, "/metrics").decode().splitlines()
    name = f'encoder_tokens_total{{model="{FAMILY}-encoder",state="received"}}'
    (tokens,) = (float(line.split()[-1]) for line in lines if line.startswith(name))
    (model,) = json.loads(get(HTTP, f"/v2/models/{FAMILY}-encoder/stats"))["model_stats"]
    cpu = sum(one.user + one.system for one in times)
    return cpu, tokens, model["inference_count"], model["execution_count"]


def tree(server: psutil.Process) -> list[psutil.Process]:
    """Every process of the stack."""
    return [server, *server.children(recursive=True)]


def resident(server: psutil.Process) -> int:
    """Bytes of memory, pages that processes share counted once."""
    return sum(process.memory_full_info().pss for process in tree(server))


def get(address: str, path: str) -> bytes:
    """The body of a GET."""
    with urllib.request.urlopen(f"http://{address}{path}") as reply:
        return bytes(reply.read())


def served_precision() -> str:
    """What the encoder computes in, by its log line."""
    log = (ROOT / ".cache" / "triton-8200.log").read_text(errors="replace")
    return log.split(f"{FAMILY}-encoder: ")[1].split(",")[0]


@contextmanager
def stack(precision: str | None) -> Iterator[psutil.Process]:
    """The stack as `make serve` starts it."""
    environment = os.environ | ({"ENCODER_PRECISION": precision} if precision else {})
    command = [sys.executable, "-m", "tools.serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            if not any("Ctrl-C" in line for line in process.stdout):
                raise SystemExit(1)  # the stack has said why
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.stdout.read()


def table(results: dict[str, list[Measurement]]) -> str:
    """Medians over the rounds, as Markdown."""

    def median(name: str, field: str) -> float | None:
        values = [getattr(one, field) for one in results[name]]
        return None if values[0] is None else statistics.median(values)

    base = median("raw engine", "tokens_per_cpu_second") or 1
    lines = [
        "| | texts/s | tokens/s | tokens per CPU s | share of raw | p50 ms | p95 ms | p99 ms | mean batch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in results:
        cpu = median(name, "tokens_per_cpu_second") or 0
        cells = [f"{median(name, 'texts_per_second'):.0f}", f"{median(name, 'tokens_per_second'):.0f}"]
        cells += [f"{cpu:.0f}", f"{cpu / base:.2f}"]
        for field in ("p50_ms", "p95_ms", "p99_ms", "mean_batch_size"):
            value = median(name, field)
            cells.append("" if value is None else f"{value:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
