"""A backfill and `/embed` in large calls, in turns, on the same texts: CPU time of servers and client apart.

A backfill promises at least 0.95 of the speed. By the clock that shows on a machine of its own; texts by CPU
second of the servers show it anywhere. Of the client the whole process counts, with its start.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from tools.bench import machine
from tools.bench.backfill import CLIENTS, TEXTS_PER_CALL, distinct_texts, embed
from tools.bench.checkpoint import SHELL
from tools.bench.measure import FAMILY
from tools.bench.results import RESULTS
from tools.bench.server import Stack
from tools.bench.shell import serving
from tools.command import ROOT


@dataclass(frozen=True)
class Turn:
    """All texts once."""

    seconds: float
    """Seconds from the first call to the last vector."""
    server_cpu_seconds: float
    client_cpu_seconds: float


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.turns", description=__doc__)
    parser.add_argument("--texts", type=int, default=4096, help="(default: 4096)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--model", choices=[FAMILY, SHELL.name], default=FAMILY, help="(default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the JSON (default: tools/bench/results/)"
    )
    options = parser.parse_args()
    texts = list(islice(distinct_texts(), options.texts))
    ways = {"backfill": backfill_turn, "embed": embed_turn}
    rounds: list[dict[str, Turn]] = []
    with serving(options.model, ROOT) as server:
        for way in ways.values():
            way(server, texts[:TEXTS_PER_CALL])  # to warm up
        start, cpu = machine.Moment.now(), sum(server.cpu_seconds().values())
        for number in range(options.rounds):
            order = sorted(ways, reverse=number % 2 == 1)
            rounds.append({name: ways[name](server, texts) for name in order})
            print("\n".join([f"round {number + 1}", *table(rounds, options.texts)]), file=sys.stderr, flush=True)
        used = sum(server.cpu_seconds().values()) - cpu
        used += sum(turn.client_cpu_seconds for turns in rounds for turn in turns.values())
        noise = machine.noise(start, used)
    print("\n".join([*table(rounds, options.texts), *machine.warnings(noise)]))
    content = {"machine": machine.describe(), "noise": noise, "model": options.model, "texts": options.texts}
    content["rounds"] = [{name: asdict(turn) for name, turn in turns.items()} for turns in rounds]
    (options.output / "turns.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


def backfill_turn(server: Stack, texts: Sequence[str]) -> Turn:
    """By `python -m tools.backfill`, from JSON lines to JSON lines."""
    with TemporaryDirectory() as folder:
        source, goal = Path(folder, "texts"), Path(folder, "vectors")
        source.mkdir()
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (source / "a.jsonl").write_text("".join(lines))
        words = [sys.executable, "-m", "tools.backfill", str(source), str(goal)]
        words += ["--url", f"http://{server.address('embed')}"]
        before, start = sum(server.cpu_seconds().values()), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(words, cwd=ROOT, check=True, stderr=subprocess.PIPE, text=True)
        spent = sum(server.cpu_seconds().values()) - before
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
    (seconds,) = re.findall(rf"^{len(texts)} rows in ([\d.]+) s:", done.stderr, re.MULTILINE)
    return Turn(float(seconds), spent, end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)


def embed_turn(server: Stack, texts: Sequence[str]) -> Turn:
    """By `/embed` in large calls, a few at a time."""
    calls = [list(texts[i : i + TEXTS_PER_CALL]) for i in range(0, len(texts), TEXTS_PER_CALL)]
    before, cpu, start = sum(server.cpu_seconds().values()), time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as clients:
        assert sum(clients.map(lambda call: embed(server.address("embed"), call), calls)) == len(texts)
    seconds, own = time.perf_counter() - start, time.process_time() - cpu
    return Turn(seconds, sum(server.cpu_seconds().values()) - before, own)


def table(rounds: Sequence[dict[str, Turn]], texts: int) -> list[str]:
    """Medians of the rounds, and of what each round's two turns make of each other, as Markdown."""
    lines = ["| | texts/s | texts per CPU s of the servers | client CPU ms a text |", "|---|---|---|---|"]
    for way, title in (("embed", "`/embed`, 4 clients of 256 texts"), ("backfill", "`python -m tools.backfill`")):
        turns = [round_[way] for round_ in rounds]
        cells = [f"{median(texts / turn.seconds for turn in turns):.0f}"]
        cells.append(f"{median(texts / turn.server_cpu_seconds for turn in turns):.0f}")
        cells.append(f"{median(1000 * turn.client_cpu_seconds / texts for turn in turns):.2f}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    pairs = [(one["embed"], one["backfill"]) for one in rounds]
    clock = median(embed.seconds / backfill.seconds for embed, backfill in pairs)
    cpu = median(embed.server_cpu_seconds / backfill.server_cpu_seconds for embed, backfill in pairs)
    return [*lines, f"| the backfill's share | {clock:.2f} | {cpu:.2f} | |"]


if __name__ == "__main__":
    sys.exit(main())
