"""Many models in the memory of a few: skewed calls, and what is loaded while they are answered.

Writes `residency.json` and draws `residency.svg`. The families are of MiniLM's size.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from prometheus_client import parser

from build.verification.texts import docstrings
from tools.bench import machine, plots
from tools.bench.checkpoint import CACHE, CROSS_ENCODER
from tools.bench.results import RESULTS, percentiles
from tools.bench.server import Stack, stack
from tools.direct import open_url

FAMILIES, CLIENTS, SEED = 12, 8, 0
MEMORY = "1200MB"
"""Memory for all families: less than half of what they would take."""
REPOSITORY = CACHE / "residency"


@dataclass(frozen=True)
class Call:
    """One that was answered."""

    seconds: float
    waited: float
    """Seconds of these that it waited for the family to be loaded."""


def main() -> int:
    """Builds, serves, calls, samples, writes."""
    words = argparse.ArgumentParser(prog="python -m tools.bench.residency", description=__doc__)
    words.add_argument("--seconds", type=int, default=240, help="(default: 240)")
    words.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the JSON (default: tools/bench/results/)"
    )
    options = words.parse_args()
    names = [f"family-{number:02}" for number in range(1, FAMILIES + 1)]
    build(names)
    with stack(names, REPOSITORY, options=("--preload", names[0], "--memory", MEMORY)) as server:
        content = {"machine": machine.describe(), **measure(server, names, options.seconds)}
    (options.output / "residency.json").write_text(json.dumps(content, indent=1) + "\n")
    plots.draw_residency(content, options.output)
    return 0


def build(names: Sequence[str]) -> None:
    """The families, all of one shape."""
    for name in names:
        replace(CROSS_ENCODER, name=name, scores=False).build(REPOSITORY)


def measure(server: Stack, names: Sequence[str], seconds: int) -> dict[str, Any]:
    """Calls for so long, the k-th family as often as 1 / k (Zipf), and samples what is loaded."""
    end, calls, samples, refused = threading.Event(), list[Call](), list[dict[str, Any]](), list[int]()
    texts, weights = docstrings(), [1 / k for k in range(1, len(names) + 1)]
    start = time.perf_counter()

    def client(number: int) -> None:
        chance = random.Random(SEED + number)
        while not end.is_set():
            (name,) = chance.choices(names, weights)
            try:
                calls.append(embed(server.address("embed"), name, chance.choice(texts)))
            except HTTPError as error:  # one that could not be loaded in time
                refused.append(error.code)

    with ThreadPoolExecutor(CLIENTS) as clients:
        running = [clients.submit(client, number) for number in range(CLIENTS)]
        while (now := time.perf_counter() - start) < seconds:
            samples.append({"seconds": round(now, 1), "resident": metric(server, "gateway_model_resident_bytes")})
            time.sleep(2)
        end.set()
        for one in running:
            one.result()  # what was raised in it
    hits, misses = [one for one in calls if not one.waited], [one for one in calls if one.waited]
    return {
        "budget_bytes": sum(metric(server, "gateway_model_budget_bytes").values()),
        "loads": sum(metric(server, "gateway_model_loads_total").values()),
        "clients": CLIENTS,
        "refused": len(refused),
        "hits": latencies(hits),
        "misses": latencies(misses),
        "samples": samples,
    }


def metric(server: Stack, name: str) -> dict[str, int]:
    """Family -> one of the gateway's numbers."""
    with open_url(f"http://{server.address('embed')}/metrics") as reply:
        samples = [
            one
            for family in parser.text_string_to_metric_families(reply.read().decode())
            for one in family.samples
        ]
    return {one.labels.get("model", ""): int(one.value) for one in samples if one.name == name}


def latencies(calls: Sequence[Call]) -> dict[str, float]:
    """How many there were, and their milliseconds."""
    shares = percentiles([1000 * one.seconds for one in calls])
    return {"calls": len(calls), "p50_ms": round(shares[50], 1), "p99_ms": round(shares[99], 1)}


def embed(address: str, model: str, text: str) -> Call:
    """One call; raises HTTPError where it is refused."""
    start = time.perf_counter()
    with open_url(f"http://{address}/embed", json.dumps({"texts": [text], "model": model}).encode()) as reply:
        reply.read()
        return Call(time.perf_counter() - start, float(reply.headers.get("X-Load-Seconds", 0)))


if __name__ == "__main__":
    sys.exit(main())
