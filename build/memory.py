"""The memory of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def free_memory() -> int:
    """Bytes that the machine and this process's cgroup (v2) leave."""
    groups = (limit - int((folder / "memory.current").read_text()) for folder, limit in _limits())
    return min([_of_machine("MemAvailable"), *groups])


def total_memory() -> int:
    """Bytes that this process could have, if nobody else had any."""
    return min([_of_machine("MemTotal"), *(limit for _, limit in _limits())])


def _of_machine(line: str) -> int:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines[line].split()[0]) * 1024


def _limits() -> Iterator[tuple[Path, int]]:
    """The cgroup's folder and those above it that have a limit."""
    group = Path("/sys/fs/cgroup", Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip())
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):  # no limit, or not version 2
            yield folder, int((folder / "memory.max").read_text())
