"""Measures what is around the engine: the stack before a model that costs next to nothing, CPU time by process.

With --beside the stack of another checkout takes turns with this one, load by load, and nothing is written.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from build.verification.texts import docstrings
from tools.bench import machine
from tools.bench.checkpoint import CACHE, SHELL
from tools.bench.measure import FAMILY
from tools.bench.perf_analyzer import Load, PerfAnalyzer
from tools.bench.report import shell_table
from tools.bench.results import RESULTS, Measurement, Results, Round, percentiles
from tools.bench.server import Stack, stack
from tools.command import ROOT

CLIENTS = (1, 16, 64)
TEXTS_PER_CALL = (1, 8, 64)
TEXTS, SLOW = 4096, {(1, 1): 256, (1, 8): 1024, (1, 64): 2048, (16, 1): 1024, (64, 1): 1024}
"""Texts of a load, and those of the slow ones by (clients, texts a call)."""


@dataclass(frozen=True)
class Cell:
    """One way to send texts."""

    way: str
    """grpc to the ensemble, embed through the gateway."""
    clients: int
    texts_per_call: int

    def texts(self, share: float) -> list[str]:
        """So much of what a load sends, but a call for every client."""
        count = SLOW.get((self.clients, self.texts_per_call), TEXTS)
        calls = max(self.clients, round(share * count) // self.texts_per_call)
        known = docstrings()
        return [known[i % len(known)] for i in range(calls * self.texts_per_call)]


@dataclass
class Side:
    """A stack, and what has been seen of it."""

    name: str
    model: str
    server: Stack
    rounds: dict[Cell, list[Round]] = field(default_factory=dict)
    latencies: dict[Cell, list[float]] = field(default_factory=dict)

    def run(self, load: PerfAnalyzer, cell: Cell, share: float) -> None:
        """One load."""
        texts = cell.texts(share)
        before = self.server.counters()
        seen = self._send(load, cell, texts)
        spent = self.server.counters() - before
        encoder = spent.models[f"{self.model}-encoder"]
        one = Round(
            texts=len(texts),
            tokens=spent.tokens["received"],
            seconds=seen.seconds,
            cpu_seconds=spent.cpu_seconds,
            load_cpu_seconds=seen.cpu_seconds,
            batch=encoder["texts"] / encoder["batches"],
        )
        self.rounds.setdefault(cell, []).append(one)
        self.latencies.setdefault(cell, []).extend(seen.milliseconds)

    def forget(self) -> None:
        """Forgets the rounds so far."""
        self.rounds, self.latencies = {}, {}

    def seconds(self) -> float:
        """CPU time of the stack and of what sent the loads so far."""
        loads = sum(one.load_cpu_seconds for rounds in self.rounds.values() for one in rounds)
        return loads + sum(self.server.cpu_seconds().values())

    def results(self, noise: dict[str, float]) -> Results:
        """Everything so far."""
        measurements = [
            Measurement(
                cell.way, SHELL.name, cell.clients, cell.texts_per_call, rounds, percentiles(self.latencies[cell])
            )
            for cell, rounds in self.rounds.items()
        ]
        return Results(machine.describe(), self.server.precision, noise, {}, measurements)

    def _send(self, load: PerfAnalyzer, cell: Cell, texts: list[str]) -> Load:
        if cell.way == "grpc":
            return load.grpc(self.server.address("grpc"), self.model, texts, cell.clients, cell.texts_per_call)
        calls = range(0, len(texts), cell.texts_per_call)
        bodies = [{"texts": texts[i : i + cell.texts_per_call]} for i in calls]
        return load.post(self.server.address("embed"), "embed", bodies, cell.clients)


def main() -> int:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.shell", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--quick", action="store_true", help="one round of the smaller loads, printed only")
    parser.add_argument("--beside", type=Path, help="another checkout; printed only")
    parser.add_argument("--model", choices=[SHELL.name, FAMILY], default=SHELL.name, help="(default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=["embed", "grpc"], default=["grpc", "embed"])
    parser.add_argument("--clients", nargs="+", type=int, default=CLIENTS)
    parser.add_argument("--texts-per-call", nargs="+", type=int, default=TEXTS_PER_CALL)
    options = parser.parse_args()
    cells = [Cell(*one) for one in product(options.ways, options.clients, options.texts_per_call)]
    share, rounds = (0.25, 1) if options.quick else (1.0, options.rounds)
    checkouts = [ROOT, *([options.beside.resolve()] if options.beside else [])]
    load = PerfAnalyzer(ROOT / ".cache" / "perf_analyzer")
    with ExitStack() as stacks:
        sides = [
            Side(checkout.name, options.model, stacks.enter_context(serving(options.model, checkout)))
            for checkout in checkouts
        ]
        for side, cell in product(sides, cells):  # to warm up
            side.run(load, cell, share / 8)
            side.forget()
        start, used = machine.Moment.now(), seconds(sides)
        for i in range(rounds):
            for cell in cells:
                for side in sides if i % 2 == 0 else reversed(sides):
                    side.run(load, cell, share)
            print(f"round {i + 1} of {rounds}", file=sys.stderr, flush=True)
        noise = machine.noise(start, seconds(sides) - used)
        results = [side.results(noise) for side in sides]
    for side, seen in zip(sides, results, strict=True):
        name = [side.name] if options.beside else []
        print("\n\n".join(["", *name, shell_table(seen)]).removeprefix("\n"))
    for sentence in machine.warnings(noise):
        print(sentence)
    if not options.quick and not options.beside and options.model == SHELL.name:
        results[0].write(RESULTS / "shell.json")
    return 0


def serving(model: str, checkout: Path) -> AbstractContextManager[Stack]:
    """A stack of `model`, built and served by the code of `checkout`."""
    if model == FAMILY:
        return stack([model], checkout / "model_repository", checkout=checkout)
    repository = CACHE / f"{model}-{checkout.name}"
    SHELL.build(repository, checkout)
    return stack([model], repository, checkout=checkout)


def seconds(sides: Sequence[Side]) -> float:
    """CPU time of this process, the stacks and the load generators so far."""
    return time.process_time() + sum(side.seconds() for side in sides)


if __name__ == "__main__":
    sys.exit(main())
