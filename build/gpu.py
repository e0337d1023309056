"""The NVIDIA GPUs of this machine, as `nvidia-smi` tells, and whether torch can use them.

Standard library only, in syntax that old Pythons read: the preflight asks before anything is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CUDA, DRIVER = "13.0", 580
"""What the torch of gpu.lock is built with, and the first driver that runs it."""

CAPABILITY = (8, 0)
"""Ampere's: torch has no flash attention for older cards."""

WORKING_MEMORY = 2 * 10**9
"""Bytes that a model needs beside its weights: CUDA itself, its kernels, and a micro-batch."""

FIELDS = "index,uuid,name,compute_cap,driver_version,memory.total,memory.free"


@dataclass(frozen=True)
class Card:
    """One GPU."""

    name: str
    capability: tuple[int, ...]
    driver: str
    total: int | None
    """Bytes of its memory; None where it has none of its own."""
    free: int | None
    """Bytes of it that nobody uses; None where that is not known."""


def cards() -> list[Card]:
    """Every GPU that CUDA_VISIBLE_DEVICES leaves; none without a driver that answers."""
    command = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    found = []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    for line in done.stdout.splitlines():
        index, uuid, name, capability, driver, *memory = (word.strip() for word in line.split(","))
        if visible is not None and not any(w == index or (w and uuid.startswith(w)) for w in visible.split(",")):
            continue
        total, free = (int(word) << 20 if word.isdigit() else None for word in memory)
        found.append(Card(name, tuple(map(int, capability.split("."))), driver, total, free))
    return found


def problems(found: Sequence[Card]) -> Iterator[str]:
    """Every reason why torch cannot use one of the cards, as a sentence that says what to change."""
    for card in dict.fromkeys(found):
        if int(card.driver.partition(".")[0]) < DRIVER:
            yield (
                f"the NVIDIA driver is {card.driver}, and torch's CUDA {CUDA} needs {DRIVER} or newer: update it"
            )
        if card.capability < CAPABILITY:
            own, least = (".".join(map(str, version)) for version in (card.capability, CAPABILITY))
            yield (
                f"{card.name} has compute capability {own}, and torch's attention needs {least} or newer; with "
                "several cards, name the others in CUDA_VISIBLE_DEVICES"
            )
    if found and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        yield "torch compiles its kernels with gcc or clang, and there is neither: apt install gcc"
    elif found and not Path(sysconfig.get_path("include"), "Python.h").exists():
        version = sysconfig.get_python_version()
        yield f"torch compiles its kernels with Python.h, which is missing: apt install python{version}-dev"


def needed(weights: int) -> int:
    """Bytes of a card's memory for a model of so many bytes of weights."""
    return weights + WORKING_MEMORY


def room(found: Sequence[Card]) -> int | None:
    """Free bytes of the fullest card, since every card gets the whole model; None where that is not known."""
    return min((card.free for card in found if card.free is not None), default=None)
