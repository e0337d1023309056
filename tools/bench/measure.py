"""Runs loads against the stack, each between two slices of the raw loop on the same kind of text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean

from build.verification.texts import docstrings
from tools.bench import corpus
from tools.bench.checkpoint import CROSS_ENCODER
from tools.bench.padding import padding
from tools.bench.perf_analyzer import Load, PerfAnalyzer
from tools.bench.raw import Prepared, RawEngine
from tools.bench.results import Measurement, Round, percentiles
from tools.bench.server import Counters, Stack

FAMILY = "minilm"
REPEATS = "half repeated"
RAW_TEXTS, RAW_TOKENS = 1024, 6000
"""Texts of the raw loop, and the tokens in a slice of it, about: half a second."""


@dataclass(frozen=True)
class Cell:
    """One way to send the first `texts` texts of a corpus."""

    way: str
    """embed and rerank through the gateway, grpc to the ensemble, raw one text at a time."""
    corpus: str
    clients: int
    texts_per_call: int
    texts: int

    def part(self, share: float) -> Cell:
        """The same with so much of the texts, but a call for every client."""
        calls = max(self.clients, round(self.texts * share) // self.texts_per_call)
        return Cell(self.way, self.corpus, self.clients, self.texts_per_call, calls * self.texts_per_call)


@dataclass
class Bench:
    """The servers, the raw engine and the load generator, and what has been seen of them."""

    embedding: Stack
    reranking: Stack
    raw: RawEngine
    load: PerfAnalyzer
    rounds: dict[Cell, list[Round]] = field(default_factory=dict)
    latencies: dict[Cell, list[float]] = field(default_factory=dict)
    raw_rounds: dict[str, list[list[Round]]] = field(default_factory=dict)
    """Corpus -> for each round the slices of the raw loop."""
    _corpora: dict[str, list[str]] = field(default_factory=dict)
    _prepared: dict[str, Prepared] = field(default_factory=dict)

    def run(self, cells: list[Cell]) -> None:
        """One round: every cell once."""
        for slices in self.raw_rounds.values():
            slices.append([])
        for cell in cells:
            self._run_alone(cell) if cell.way == "raw" else self._run(cell)

    def forget(self) -> None:
        """Forgets the rounds so far."""
        self.rounds, self.latencies, self.raw_rounds = {}, {}, {}

    def measurements(self) -> list[Measurement]:
        """Everything, the raw loop first."""
        found = [
            Measurement("raw", name, 0, 0, [_merged(slices) for slices in rounds])
            for name, rounds in self.raw_rounds.items()
        ]
        for cell, rounds in self.rounds.items():
            grid, slots = percentiles(self.latencies[cell]), {}
            if cell.texts_per_call == 1 and cell.way != "raw":
                rows = self.raw.tokenizer.encode_batch_fast(self._texts(cell.corpus)[: cell.texts])
                slots = padding(
                    [len(row.ids) for row in rows], max(1, round(mean(one.batch or 1 for one in rounds)))
                )
            found.append(
                Measurement(cell.way, cell.corpus, cell.clients, cell.texts_per_call, rounds, grid, slots)
            )
        return found

    def _run(self, cell: Cell) -> None:
        # Where texts repeat, or are pairs, the raw loop would not do the same work.
        compared = cell.way != "rerank" and cell.corpus != REPEATS
        crossing = cell.corpus == CROSS_ENCODER.name
        server = self.reranking if crossing else self.embedding
        texts = self._texts(cell.corpus)[: cell.texts]
        slices = [self._run_slice(cell.corpus)] if compared else []
        before = server.counters()
        seen = self._send(cell, server, texts)
        spent = server.counters() - before
        if compared:
            slices.append(self._run_slice(cell.corpus))
        encoder = spent.models[f"{CROSS_ENCODER.name if crossing else FAMILY}-encoder"]
        alone = cell.way == "embed" and cell.texts_per_call == 1
        self._note(
            cell,
            seen.milliseconds,
            Round(
                texts=len(texts),
                tokens=spent.tokens["received"],
                seconds=seen.seconds,
                cpu_seconds=spent.cpu_seconds,
                load_cpu_seconds=seen.cpu_seconds,
                raw_tokens_per_cpu_second=mean(one.tokens_per_cpu_second for one in slices) if slices else None,
                batch=encoder["texts"] / encoder["batches"],
                stages_ms=_stages(mean(seen.milliseconds), spent) if alone else {},
            ),
        )

    def _run_alone(self, cell: Cell) -> None:
        texts = self._texts(cell.corpus)[: cell.texts]
        milliseconds = self.raw.run_singly(texts)
        seconds = sum(milliseconds) / 1000
        self._note(
            cell, milliseconds, Round(len(texts), self.raw.prepare(texts).tokens, seconds, {"raw": seconds})
        )

    def _run_slice(self, name: str) -> Round:
        if name not in self._prepared:
            self._prepared[name] = self.raw.prepare(self._texts(name)[:RAW_TEXTS])
        whole, slices = self._prepared[name], self.raw_rounds.setdefault(name, [[]])[-1]
        parts = max(1, whole.tokens // RAW_TOKENS)
        part = whole.part(len(slices) % parts, parts)
        wall, cpu = self.raw.run(part)
        slices.append(Round(part.texts, part.tokens, wall, {"raw": cpu}))
        return slices[-1]

    def _send(self, cell: Cell, server: Stack, texts: list[str]) -> Load:
        if cell.way == "grpc":
            return self.load.grpc(server.address("grpc"), FAMILY, texts, cell.clients, cell.texts_per_call)
        calls = [texts[i : i + cell.texts_per_call] for i in range(0, len(texts), cell.texts_per_call)]
        if cell.way == "embed":
            bodies = [{"texts": call} for call in calls]
            return self.load.post(server.address("embed"), "embed", bodies, cell.clients)
        pairs = zip(corpus.queries(), calls, strict=False)
        documents = [{"query": query, "documents": call, "model": cell.corpus} for query, call in pairs]
        return self.load.post(server.address("rerank"), "rerank", documents, cell.clients)

    def _texts(self, name: str) -> list[str]:
        if name not in self._corpora:
            self._corpora[name] = self._read(name)
        return self._corpora[name]

    def _read(self, name: str) -> list[str]:
        corpora: dict[str, Callable[[], list[str]]] = {
            "queries": corpus.queries,
            "chunks": corpus.chunks,
            REPEATS: corpus.repeats,
        }
        if name.endswith(" tokens"):
            return corpus.of_length(int(name.split()[0]), RAW_TEXTS, self.raw.tokenizer)
        return corpora.get(name, docstrings)()  # rerankers read docstrings

    def _note(self, cell: Cell, milliseconds: list[float], measured: Round) -> None:
        self.rounds.setdefault(cell, []).append(measured)
        self.latencies.setdefault(cell, []).extend(milliseconds)


def _stages(client_ms: float, spent: Counters) -> dict[str, float]:
    """What a call of one text spends where; the gateway's part is all that no step counts, both hops included."""
    per_call = {
        name: {part: model[part] / model["requests"] for part in ("queue_ms", "compute_ms")}
        for name, model in spent.models.items()
        if model["requests"]
    }
    del per_call[FAMILY]
    steps = {name.rsplit("-", 1)[-1]: model["compute_ms"] for name, model in per_call.items()}
    steps["queue"] = sum(model["queue_ms"] for model in per_call.values())
    return {"gateway": client_ms - sum(steps.values()), **steps}


def _merged(slices: list[Round]) -> Round:
    """The slices of one round as one."""
    return Round(
        texts=sum(one.texts for one in slices),
        tokens=sum(one.tokens for one in slices),
        seconds=sum(one.seconds for one in slices),
        cpu_seconds={"raw": sum(one.cpu_seconds["raw"] for one in slices)},
    )
