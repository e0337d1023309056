"""The machine that a benchmark ran on, and how much of it others took meanwhile."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGE_SHARE = 0.05
"""Share of the processors' time: what is taken beyond it makes wall times doubtful."""
LARGE_SPREAD = 0.10
"""Spread of the raw loop's rounds, largest over smallest less one, beyond which times are doubtful."""


@dataclass(frozen=True)
class Moment:
    """The processors' time since the machine started, in seconds."""

    total: float
    idle: float
    stolen: float

    @classmethod
    def now(cls) -> Moment:
        """As /proc/stat has it."""
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        seconds = [count / os.sysconf("SC_CLK_TCK") for count in ticks]
        return cls(total=sum(seconds), idle=seconds[3] + seconds[4], stolen=seconds[7])


def noise(start: Moment, own_seconds: float) -> dict[str, float]:
    """Shares of the processors' time since `start`: what the hypervisor stole, what other processes took."""
    end = Moment.now()
    total, stolen = end.total - start.total, end.stolen - start.stolen
    others = total - (end.idle - start.idle) - stolen - own_seconds
    return {"stolen": round(stolen / total, 4), "others": round(max(0.0, others) / total, 4)}


def warnings(noise: dict[str, float]) -> list[str]:
    """Sentences about what makes the numbers doubtful."""
    said = []
    for name, what in {"stolen": "the hypervisor stole", "others": "other processes took"}.items():
        if noise[name] > LARGE_SHARE:
            said.append(f"noisy machine: {what} {noise[name]:.0%} of the processors' time")
    if noise.get("raw_spread", 0) > LARGE_SPREAD:
        said.append(f"noisy machine: the raw loop's rounds are {noise['raw_spread']:.0%} apart in CPU time")
    return said


def describe() -> dict[str, Any]:
    """What the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": name,
        "processors": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30),
        "python": platform.python_version(),
    }
