"""The memory of this machine."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def free_memory() -> int:
    """Bytes that the machine and this process's cgroup (v2) leave."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup", Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip())
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):  # no limit, or not version 2
            limit = int((folder / "memory.max").read_text())
            free = min(free, limit - int((folder / "memory.current").read_text()))
    return free
