"""The processes ("stubs") in which a Triton runs its Python models, watched for those that die.

Triton 2.51 neither starts such a process again nor stops saying that its model is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

ZOMBIE = "Z"
STATE, EXIT_CODE = 0, 49
"""Fields of /proc/PID/stat, counted from behind the process's name, which may hold anything."""


@dataclass(frozen=True)
class Death:
    """How a stub ended."""

    model: str
    killed: bool
    """By a signal. Else it ended itself, as one also does that misses its Triton."""


class Stubs:
    """The stubs of one tritonserver. Use it as a context manager."""

    def __init__(self, tritonserver: int) -> None:
        self._tritonserver = tritonserver
        self._watched: dict[int, int] = {}
        self.lost: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        """Of the first stub that died, other than because Triton ended it."""

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
        """Watches those that have come since."""
        for pid in children(self._tritonserver):
            with contextlib.suppress(OSError, IndexError):  # it has ended since
                if pid not in self._watched and (model := model_of(pid)):
                    self._watched[pid] = os.pidfd_open(pid)
                    asyncio.get_running_loop().add_reader(self._watched[pid], self._ended, pid, model)

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


def exit_status(stub: int) -> int:
    """With what a process has ended, as wait(2) gives it; 0 too where Triton has noticed, which then ended it."""
    try:
        fields = Path(f"/proc/{stub}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[EXIT_CODE]) if fields[STATE] == ZOMBIE else 0
