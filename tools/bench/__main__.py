"""Measures the stack beside the raw engine on the same texts, in rounds, and writes JSON, plots and a table."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tools.bench import machine, plots
from tools.bench.checkpoint import CROSS_ENCODER
from tools.bench.checkpoint import REPOSITORY as OWN_REPOSITORY
from tools.bench.measure import FAMILY, REPEATS, Bench, Cell
from tools.bench.perf_analyzer import PerfAnalyzer
from tools.bench.raw import RawEngine
from tools.bench.report import full_table
from tools.bench.results import RESULTS, Measurement, Results
from tools.bench.server import Stack, stack
from tools.command import ROOT

REPOSITORY = ROOT / "model_repository"
LENGTHS = (16, 32, 64, 128, 256)

QUICK = [
    Cell("embed", "docstrings", 1, 1, 256),
    Cell("embed", "docstrings", 16, 1, 512),
    Cell("embed", "docstrings", 64, 1, 512),
    Cell("embed", "docstrings", 1, 64, 512),
    Cell("grpc", "docstrings", 1, 1, 256),
    Cell("grpc", "docstrings", 16, 1, 512),
    Cell("raw", "queries", 1, 1, 256),
    Cell("embed", "queries", 1, 1, 256),
    Cell("embed", "chunks", 16, 1, 96),
    Cell("rerank", CROSS_ENCODER.name, 1, 80, 640),
]
CELLS = [
    *QUICK,
    Cell("embed", "docstrings", 4, 1, 256),
    Cell("embed", "docstrings", 1, 8, 256),
    Cell("embed", "docstrings", 4, 8, 512),
    Cell("embed", "docstrings", 16, 8, 512),
    Cell("embed", "docstrings", 4, 64, 512),
    Cell("embed", "docstrings", 1, 256, 1024),
    Cell("embed", "docstrings", 1, 1024, 1024),
    Cell("grpc", "docstrings", 4, 1, 256),
    Cell("grpc", "docstrings", 64, 1, 512),
    Cell("grpc", "docstrings", 1, 64, 512),
    Cell("raw", "docstrings", 1, 1, 128),
    Cell("embed", "queries", 16, 1, 512),
    Cell("grpc", "queries", 16, 1, 512),
    Cell("grpc", "chunks", 16, 1, 96),
    Cell("embed", REPEATS, 4, 8, 512),
    *(Cell("embed", f"{tokens} tokens", 16, 1, min(256, 16384 // tokens)) for tokens in LENGTHS),
    Cell("rerank", CROSS_ENCODER.name, 4, 80, 640),
    Cell("rerank", f"{FAMILY}-rerank", 1, 80, 640),
]


def main() -> int:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default: 3)")
    parser.add_argument("--quick", action="store_true", help="one short round of the main rows, printed only")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="(default: what the server picks)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of JSON and plots (default: tools/bench/results/)"
    )
    options = parser.parse_args()
    cells, rounds = ([cell.part(0.5) for cell in QUICK], 1) if options.quick else (CELLS, options.rounds)
    CROSS_ENCODER.build()
    with (
        stack([FAMILY, f"{FAMILY}-rerank"], REPOSITORY, options.precision) as embedding,
        stack([CROSS_ENCODER.name], OWN_REPOSITORY, options.precision) as reranking,
    ):
        raw = RawEngine(REPOSITORY, FAMILY, embedding.precision)
        bench = Bench(embedding, reranking, raw, PerfAnalyzer(ROOT / ".cache" / "perf_analyzer"))
        say("warming up")
        bench.run([cell.part(0.25) for cell in cells])
        bench.forget()
        start, used = machine.Moment.now(), own_seconds(bench)
        for i in range(rounds):
            say(f"round {i + 1} of {rounds}")
            bench.run(cells)
        measurements = bench.measurements()
        noise = machine.noise(start, own_seconds(bench) - used) | {"raw_spread": raw_spread(measurements)}
        results = Results(machine.describe(), embedding.precision, noise, memory(embedding), measurements)
    print(full_table(results))
    for sentence in machine.warnings(noise):
        print(sentence)
    if not options.quick:
        results.write(options.output / "bench.json")
        plots.draw(results, options.output)
    return 0


def say(sentence: str) -> None:
    """Progress, apart from the results."""
    print(sentence, file=sys.stderr, flush=True)


def own_seconds(bench: Bench) -> float:
    """CPU time of the servers, this process and the load generators so far."""
    servers = (bench.embedding, bench.reranking)
    generators = sum(one.load_cpu_seconds for rounds in bench.rounds.values() for one in rounds)
    return time.process_time() + generators + sum(sum(one.cpu_seconds().values()) for one in servers)


def raw_spread(measurements: list[Measurement]) -> float:
    """How far apart the raw loop's rounds are in tokens per CPU second: largest over smallest, less one."""
    (raw,) = (one for one in measurements if one.way == "raw" and one.corpus == "docstrings" and not one.clients)
    speeds = [one.tokens_per_cpu_second for one in raw.rounds]
    return max(speeds) / min(speeds) - 1


def memory(server: Stack) -> dict[str, object]:
    """MiB of the stack after the load: pages that processes share counted once."""
    weights = sum(path.stat().st_size for path in (REPOSITORY / f"{FAMILY}-encoder" / "1").glob("model.onnx*"))
    resident = {role: round(size / 2**20) for role, size in server.resident().items()}
    return {
        "resident_mib": resident,
        "shared_mib": round(server.shared_memory() / 2**20),
        "weights_mib": round(weights / 2**20),
    }


if __name__ == "__main__":
    sys.exit(main())
