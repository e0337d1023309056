"""Measures what a user would pick instead beside the stack: same checkpoint, texts, cores and load generator."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import openvino as ov

from build import catalog
from build.sources.obtain import obtain
from build.verification.texts import docstrings
from tools.bench import corpus, machine, plots
from tools.bench.measure import FAMILY
from tools.bench.peers.choices import Choice, choices
from tools.bench.peers.embedders import Embedder, Server
from tools.bench.perf_analyzer import Load, PerfAnalyzer
from tools.bench.raw import MAX_TOKENS, RawEngine
from tools.bench.report import OURS, peers_table
from tools.bench.results import RESULTS, Measurement, Peer, Results, Round, percentiles
from tools.bench.server import stack
from tools.command import ROOT

CALLS = [(1, 1), (32, 1), (1, 64)]
"""(clients, texts a call)."""
LONG = f"{MAX_TOKENS} tokens"
"""As long as the model reads: no text is longer, as not all cut longer ones."""
TEXTS = {"docstrings": 192, LONG: 64}
QUICK = {"docstrings": 64}
COSINES = {"fp32": 0.999, "bf16": 0.999, "Q8_0": 0.99, "int8": 0.95}
"""Precision -> the lowest cosine with the vectors of the stack; whoever is below does other work."""


@dataclass(frozen=True)
class Corpus:
    """Texts of one kind."""

    texts: list[str]
    tokens: int


@dataclass
class Comparison:
    """Everything under test, and what has been seen of it."""

    embedders: dict[str, Embedder]
    load: PerfAnalyzer
    corpora: dict[str, Corpus]
    rounds: dict[tuple[str, str, int, int], list[Round]] = field(default_factory=dict)
    latencies: dict[tuple[str, str, int, int], list[float]] = field(default_factory=dict)

    def run(self, turn: int) -> None:
        """One round, in which the embedder `turn` is the first at every load."""
        names = list(self.embedders)
        turn %= len(names)
        for name, texts in self.corpora.items():
            for clients, texts_per_call in CALLS:
                for way in names[turn:] + names[:turn]:
                    if clients == 1 or self.embedders[way].concurrent:
                        self._measure(way, name, texts, clients, texts_per_call)

    def forget(self) -> None:
        """Forgets the rounds so far."""
        self.rounds, self.latencies = {}, {}

    def measurements(self) -> list[Measurement]:
        """Everything."""
        return [Measurement(*key, rounds, percentiles(self.latencies[key])) for key, rounds in self.rounds.items()]

    def cpu_seconds(self) -> float:
        """CPU time of all that is measured, this process and the load generators so far."""
        generators = sum(one.load_cpu_seconds for rounds in self.rounds.values() for one in rounds)
        return time.process_time() + generators + sum(map(cpu_seconds, self.embedders.values()))

    def _measure(self, way: str, name: str, texts: Corpus, clients: int, texts_per_call: int) -> None:
        embedder = self.embedders[way]
        calls = [texts.texts[i : i + texts_per_call] for i in range(0, len(texts.texts), texts_per_call)]
        cpu = cpu_seconds(embedder)
        seen: Load = embedder.send(calls, clients, self.load)
        cpu = cpu_seconds(embedder) - cpu
        key = (way, name, clients, texts_per_call)
        one = Round(len(texts.texts), texts.tokens, seen.seconds, {"all": cpu}, seen.cpu_seconds)
        self.rounds.setdefault(key, []).append(one)
        self.latencies.setdefault(key, []).extend(seen.milliseconds)


def main() -> int:
    """Measures, writes and prints."""
    names = list(choices(""))
    parser = argparse.ArgumentParser(prog="python -m tools.bench.peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default: 3)")
    parser.add_argument("--quick", action="store_true", help="one short round of docstrings, printed only")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"printed only: {', '.join(names)}"
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of JSON and plot (default: tools/bench/results/)"
    )
    options = parser.parse_args()
    rounds, counts = (1, QUICK) if options.quick else (options.rounds, TEXTS)
    with ExitStack() as running:
        ours = running.enter_context(stack([FAMILY], ROOT / "model_repository"))
        raw = RawEngine(ROOT / "model_repository", FAMILY, ours.precision)
        corpora = {}
        for name, count in counts.items():
            longest = corpus.of_length(MAX_TOKENS, count, raw.tokenizer)
            texts = [fitting(text, raw) for text in docstrings()[:count]] if name == "docstrings" else longest
            corpora[name] = Corpus(texts, raw.prepare(texts).tokens)
        this = Server([ours], ours.address("embed"), "embed", "texts")
        engine = "bf16" if ov.Core().get_property("CPU", "INFERENCE_PRECISION_HINT") == ov.Type.bf16 else "fp32"
        known = {OURS: Peer("server", ours.precision)}
        embedders: dict[str, Embedder] = {OURS: this}
        checkpoint = obtain(catalog.load(FAMILY), ROOT / ".cache" / "checkpoints").folder
        sample = [text for one in corpora.values() for text in one.texts[:64]]
        for name, choice in choices(engine).items():
            if name in options.only:
                print(f"starting {name}", file=sys.stderr, flush=True)
                found, known[name] = start(choice, checkpoint, this, sample, running)
                embedders |= {name: found} if found else {}
        comparison = Comparison(embedders, PerfAnalyzer(ROOT / ".cache" / "perf_analyzer"), corpora)
        if not options.quick:
            print("warming up", file=sys.stderr, flush=True)
            comparison.run(0)
            comparison.forget()
        begin, used = machine.Moment.now(), comparison.cpu_seconds()
        for i in range(rounds):
            print(f"round {i + 1} of {rounds}", file=sys.stderr, flush=True)
            # Rounds start as far apart as they can.
            comparison.run(i * len(embedders) // rounds)
        noise = machine.noise(begin, comparison.cpu_seconds() - used)
        results = Results(machine.describe(), ours.precision, noise, {}, comparison.measurements(), known)
    print(*(peers_table(results, name) for name in corpora), f"noise: {noise}", sep="\n\n")
    for sentence in machine.warnings(noise):
        print(sentence)
    if not options.quick and options.only == names:
        results.write(options.output / "peers.json")
        plots.draw_peers(results, options.output)
    return 0


def start(
    choice: Choice, checkpoint: Path, this: Embedder, sample: list[str], running: ExitStack
) -> tuple[Embedder | None, Peer]:
    """Starts a peer for as long as `running` lasts, and compares its vectors; None where that fails, and why."""
    with ExitStack() as trial:
        try:
            embedder = trial.enter_context(choice.start(checkpoint))
            cosine = lowest_cosine(embedder, this, sample)
            if cosine < COSINES[choice.precision]:
                raise ValueError(f"its vectors are others: the lowest cosine is {cosine:.4f}")
        except subprocess.CalledProcessError as error:
            reason = f"{' '.join(map(str, error.cmd[:2]))} failed".replace(f"{ROOT}/", "")
        except (OSError, ValueError, SystemExit) as error:
            reason = str(error).replace(f"{ROOT}/", "")
        else:
            running.push(trial.pop_all())
            return embedder, Peer(choice.kind, choice.precision, cosine)
    print(f"not measured: {reason}", file=sys.stderr, flush=True)
    return None, Peer(choice.kind, choice.precision, missing=reason)


def fitting(text: str, raw: RawEngine) -> str:
    """As much of a text as the model reads."""
    return text[: raw.tokenizer.encode(text).offsets[-2][1]]


def lowest_cosine(one: Embedder, other: Embedder, texts: list[str]) -> float:
    """Of the vectors that two give to the same texts, 32 a call."""
    parts = [texts[i : i + 32] for i in range(0, len(texts), 32)]
    a, b = (np.concatenate([embedder.embed(part) for part in parts]) for embedder in (one, other))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / norms).min())


def cpu_seconds(embedder: Embedder) -> float:
    """Of all its processes so far."""
    return sum(sum(one.cpu_seconds().values()) for one in embedder.processes)


if __name__ == "__main__":
    sys.exit(main())
