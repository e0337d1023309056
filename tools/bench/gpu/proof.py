"""What one run of `make gpu-proof` has found, as JSON keeps it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Speed:
    """One engine on the texts of one load."""

    engine: str
    load: str
    flops: float
    """Operations that a token needs."""
    rounds: list[float]
    """Tokens a second."""

    @property
    def tokens_per_second(self) -> float:
        """Median of the rounds."""
        return median(self.rounds)


@dataclass(frozen=True)
class Proof:
    """Everything of one run."""

    gpu: bool
    device: str
    checkpoint: str
    machine: dict[str, Any]
    versions: dict[str, str]
    peak: float
    """Operations a second of a large product of bf16 matrices, measured."""
    cosines: dict[str, dict[str, float]]
    """Two that were compared -> lowest and mean."""
    unlike: float
    """Mean cosine of unlike texts, to judge the others by."""
    same_bits: dict[str, list[int]]
    """Precision -> texts with the same bits alone as together, texts."""
    speeds: list[Speed]
    memory: dict[str, int]
    """Engine -> bytes: of the GPU's, or on a CPU of its processes."""
    absent: dict[str, str]
    """What was not measured -> why."""

    @property
    def name(self) -> str:
        """Of its files."""
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.device} {self.checkpoint}".lower()).strip("-")

    @property
    def engines(self) -> list[str]:
        """Those that were measured."""
        return list(dict.fromkeys(one.engine for one in self.speeds))

    @property
    def loads(self) -> list[str]:
        """Those that any engine got through."""
        return list(dict.fromkeys(one.load for one in self.speeds))

    def find(self, engine: str, load: str) -> Speed | None:
        """None where the engine could not."""
        return next((one for one in self.speeds if (one.engine, one.load) == (engine, load)), None)

    def share(self, speed: Speed) -> float:
        """Of the peak."""
        return speed.tokens_per_second * speed.flops / self.peak

    def write(self, folder: Path) -> Path:
        """As JSON, in a file of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Proof:
        """What `write` wrote."""
        content = json.loads(path.read_bytes())
        return cls(**content | {"speeds": [Speed(**one) for one in content["speeds"]]})
