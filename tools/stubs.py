"""The processes ("stubs") in which a Triton runs its Python models, watched for those that die or are stopped.

Triton 2.51 neither starts such a process again nor stops saying that its model is ready. One that is stopped, by
SIGSTOP, it gives up for good after a second. One that is only slow is left alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

ZOMBIE, STOPPED = "Z", "T"
STOPPED_SECONDS = 15.0
"""How long a stub may be stopped until it counts as dead: somebody may be looking at it."""
STATE, EXIT_CODE = 0, 49
"""Fields of /proc/PID/stat, counted from behind the process's name, which may hold anything."""


@dataclass(frozen=True)
class Death:
    """How a stub ended."""

    model: str
    killed: bool
    """By a signal. Else it ended itself, as one also does that misses its Triton."""
    stopped: bool = False
    """It is there, but stopped."""


class Stubs:
    """The stubs of one tritonserver. Use it as a context manager."""

    def __init__(self, tritonserver: int) -> None:
        self._tritonserver = tritonserver
        self._watched: dict[int, int] = {}
        self._stopped: dict[int, float] = {}
        self.lost: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        """Of the first stub that died, other than because Triton ended it, or that stays stopped."""

    def __enter__(self) -> Stubs:
        self.look()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in list(self._watched):
            self._forget(pid)
        self.lost.cancel()

    def look(self) -> None:
        """Watches those that have come since, and gives up those that stay stopped."""
        for pid in children(self._tritonserver):
            with contextlib.suppress(OSError, IndexError):  # it has ended since
                if pid not in self._watched and (model := model_of(pid)):
                    self._watched[pid] = os.pidfd_open(pid)
                    asyncio.get_running_loop().add_reader(self._watched[pid], self._ended, pid, model)

        now = time.monotonic()
        stopped = [pid for pid in self._watched if state(pid) == STOPPED]
        self._stopped = {pid: self._stopped.get(pid, now) for pid in stopped}
        for pid, since in self._stopped.items():
            if now - since > STOPPED_SECONDS and not self.lost.done():
                self.lost.set_result(Death(model_of(pid), killed=True, stopped=True))

    def _ended(self, pid: int, model: str) -> None:
        self._forget(pid)
        status = exit_status(pid)
        if status and not self.lost.done():
            self.lost.set_result(Death(model, os.WIFSIGNALED(status)))

    def _forget(self, pid: int) -> None:
        fd = self._watched.pop(pid)
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)


def children(parent: int) -> Iterator[int]:
    """The processes that a process's threads have started."""
    for path in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # threads come and go
            yield from map(int, path.read_text().split())


def model_of(stub: int) -> str:
    """The model whose stub a process is: its command line ends <model>_<instance>_<device> DEFAULT."""
    return Path(f"/proc/{stub}/cmdline").read_text().split("\0")[-3].rsplit("_", 2)[0]


def state(stub: int) -> str:
    """One letter, as ps(1) shows it; "" of a process that is gone."""
    fields = status(stub)
    return fields[STATE] if fields else ""


def exit_status(stub: int) -> int:
    """With what a process has ended, as wait(2) gives it; 0 too where Triton has noticed, which then ended it."""
    fields = status(stub)
    return int(fields[EXIT_CODE]) if fields and fields[STATE] == ZOMBIE else 0


def status(stub: int) -> list[str]:
    """The fields of /proc/PID/stat behind the process's name; none of a process that is gone."""
    try:
        return Path(f"/proc/{stub}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
