"""What a benchmark writes as JSON, and the numbers that tables and plots take from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Round:
    """One load: all its texts once."""

    texts: int
    tokens: float
    seconds: float
    cpu_seconds: dict[str, float]
    """Role of a server process -> CPU time."""
    load_cpu_seconds: float = 0.0
    """CPU time of the load generator, which no other number holds."""
    raw_tokens_per_cpu_second: float | None = None
    """Speed of the raw loop on the same kind of text, directly before and after."""
    batch: float | None = None
    """The encoder's mean batch by Triton's own count."""
    stages_ms: dict[str, float] = field(default_factory=dict)
    """What a call spends where, on average; adds up to its latency."""

    @property
    def texts_per_second(self) -> float:
        """By the clock."""
        return self.texts / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """By the clock."""
        return self.tokens / self.seconds

    @property
    def tokens_per_cpu_second(self) -> float:
        """All server processes together."""
        return self.tokens / sum(self.cpu_seconds.values())

    @property
    def cpu_ms_a_text(self) -> dict[str, float]:
        """Role of a server process -> milliseconds of CPU time."""
        return {role: 1000 * seconds / self.texts for role, seconds in self.cpu_seconds.items()}

    @property
    def share_of_raw(self) -> float | None:
        """Tokens per CPU second against the raw loop's."""
        raw = self.raw_tokens_per_cpu_second
        return None if raw is None else self.tokens_per_cpu_second / raw


@dataclass(frozen=True)
class Measurement:
    """One way to send texts, over all rounds."""

    way: str
    """raw, embed, grpc, rerank or a peer's name."""
    corpus: str
    clients: int
    texts_per_call: int
    rounds: list[Round]
    percentiles_ms: list[float] = field(default_factory=list)
    """Latency of a call at 0, 1, ... 100 %, over all rounds."""
    padding: dict[str, float] = field(default_factory=dict)
    """Slots that the encoder computes beyond its tokens, as shares of all: in `linear` layers, in `attention`."""

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What tells one from another."""
        return self.way, self.corpus, self.clients, self.texts_per_call

    def median(self, of: Callable[[Round], float | None]) -> float:
        """Of a round's number."""
        return median(value for one in self.rounds if (value := of(one)) is not None)

    @property
    def texts_per_second(self) -> float:
        """Median of the rounds."""
        return self.median(lambda one: one.texts_per_second)

    @property
    def tokens_per_second(self) -> float:
        """Median of the rounds."""
        return self.median(lambda one: one.tokens_per_second)

    @property
    def tokens_per_cpu_second(self) -> float:
        """Median of the rounds."""
        return self.median(lambda one: one.tokens_per_cpu_second)

    @property
    def share_of_raw(self) -> float | None:
        """Median of the rounds; None where the raw loop was not measured."""
        return self.median(lambda one: one.share_of_raw) if self.rounds[0].raw_tokens_per_cpu_second else None

    @property
    def batch(self) -> float | None:
        """Median of the rounds; None where there is no Triton."""
        return self.median(lambda one: one.batch) if self.rounds[0].batch else None

    @property
    def cpu_shares(self) -> dict[str, float]:
        """Role of a server process -> its share of all CPU time."""
        roles = {role: sum(one.cpu_seconds[role] for one in self.rounds) for role in self.rounds[0].cpu_seconds}
        return {role: seconds / sum(roles.values()) for role, seconds in roles.items()}

    @property
    def cpu_ms_a_text(self) -> dict[str, float]:
        """Role of a server process -> milliseconds of CPU time, medians of the rounds."""
        roles = self.rounds[0].cpu_seconds
        return {role: median(one.cpu_ms_a_text[role] for one in self.rounds) for role in roles}

    @property
    def stages_ms(self) -> dict[str, float]:
        """Medians of the rounds."""
        return {name: median(one.stages_ms[name] for one in self.rounds) for name in self.rounds[0].stages_ms}


@dataclass(frozen=True)
class Peer:
    """What another way to get the vectors is."""

    kind: str
    """`gateway`, `server` or `library`."""
    precision: str
    cosine: float | None = None
    """The lowest of its vectors with those of the stack, where that was written down."""
    missing: str = ""
    """Why it was not measured."""


@dataclass(frozen=True)
class Results:
    """Everything of one run."""

    machine: dict[str, Any]
    precision: str
    noise: dict[str, float]
    """See machine.noise; and `raw_spread`, of the raw loop between rounds."""
    memory: dict[str, Any]
    measurements: list[Measurement]
    peers: dict[str, Peer] = field(default_factory=dict)
    """Way -> what it is, where others are measured."""

    def find(self, way: str, corpus: str, clients: int, texts_per_call: int = 1) -> Measurement:
        """The one measurement of this kind."""
        (found,) = (one for one in self.measurements if one.key == (way, corpus, clients, texts_per_call))
        return found

    def write(self, path: Path) -> None:
        """As JSON with digits enough for any table."""
        content = json.loads(json.dumps(asdict(self)), parse_float=lambda digits: float(f"{float(digits):.5g}"))
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """What `write` wrote."""
        content = json.loads(path.read_bytes())
        content["measurements"] = [
            Measurement(**one | {"rounds": [Round(**round_) for round_ in one["rounds"]]})
            for one in content["measurements"]
        ]
        content["peers"] = {way: Peer(**peer) for way, peer in content.get("peers", {}).items()}
        return cls(**content)


def percentiles(milliseconds: list[float]) -> list[float]:
    """At 0, 1, ... 100 %, each the value of one call."""
    ordered = sorted(milliseconds)
    return [ordered[round(share / 100 * (len(ordered) - 1))] for share in range(101)]
