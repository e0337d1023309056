"""A backfill: many texts through /embed, a few large calls at a time, with progress and the stack's memory."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path

from build.verification.texts import docstrings
from tools.bench import machine
from tools.bench.measure import FAMILY
from tools.bench.results import RESULTS
from tools.bench.server import stack
from tools.command import ROOT
from tools.direct import open_url

TEXTS_PER_CALL, CLIENTS = 256, 4
REPORTS = 20


def main() -> int:
    """Sends, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.backfill", description=__doc__)
    parser.add_argument("--texts", type=int, default=100_000, help="(default: 100000)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the JSON (default: tools/bench/results/)"
    )
    options = parser.parse_args()
    progress = []
    with stack([FAMILY], ROOT / "model_repository") as server, ThreadPoolExecutor(CLIENTS) as clients:
        start, moment, cpu = time.perf_counter(), machine.Moment.now(), sum(server.cpu_seconds().values())
        texts, done = distinct_texts(), 0
        for _ in range(REPORTS):
            part = list(islice(texts, options.texts // REPORTS))
            calls = [part[i : i + TEXTS_PER_CALL] for i in range(0, len(part), TEXTS_PER_CALL)]
            done += sum(clients.map(lambda call: embed(server.address("embed"), call), calls))
            resident = sum(server.resident().values()) // 2**20
            seconds = time.perf_counter() - start
            print(f"{done} texts, {done / seconds:.0f} texts/s, {resident} MiB", file=sys.stderr, flush=True)
            progress.append({"texts": done, "seconds": round(seconds, 1), "resident_mib": resident})
        used = sum(server.cpu_seconds().values()) - cpu + time.process_time()
        noise = machine.noise(moment, used)
    content = {"machine": machine.describe(), "noise": noise, "progress": progress}
    (options.output / "backfill.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


def distinct_texts() -> Iterator[str]:
    """Docstrings without end, none twice."""
    for number in count(1):
        yield from (f"{number}. {text}" for text in docstrings())


def embed(address: str, texts: list[str]) -> int:
    """One call: how many vectors came back."""
    with open_url(f"http://{address}/embed", json.dumps({"texts": texts}).encode()) as reply:
        return len(json.loads(reply.read())["embeddings"])


if __name__ == "__main__":
    sys.exit(main())
