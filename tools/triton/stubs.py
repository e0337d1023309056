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
from io import FileIO
from pathlib import Path

from tools.command import ending

PROGRAM = "triton_python_backend_stub"
ZOMBIE, STOPPED = "Z", "T"
STOPPED_SECONDS = 15.0
"""How long a stub may be stopped until it counts as dead: somebody may be looking at it."""
STATE, EXIT_CODE = 0, 49
"""Fields of /proc/PID/stat, counted from behind the process's name, which may hold anything."""


@dataclass(frozen=True)
class Death:
    """How a stub ended."""

    instance: str
    """What it ran; "" where it died before it was seen."""
    status: int = 0
    """As `subprocess` has it; not below 0 where it ended itself, as one also does that misses its Triton."""
    stopped: bool = False
    """It is there, but stopped."""

    @property
    def model(self) -> str:
        """Name of the model whose process it was, or what there is to say in its place."""
        return self.instance.rsplit("_", 2)[0] or "a model"

    @property
    def how(self) -> str:
        """What to say of it."""
        return ending(self.status) if self.status < 0 else "died"


@dataclass(frozen=True)
class Watched:
    """A stub that is there."""

    fd: int
    """Readable when it ends."""
    instance: str


class Stubs:
    """The stubs of one tritonserver. Use it as a context manager."""

    def __init__(self, tritonserver: int) -> None:
        self._tritonserver = tritonserver
        self._watched: dict[int, Watched] = {}
        self._stopped: dict[int, float] = {}
        self._unseen: set[int] = set()
        self.lost: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        """Of the first stub that died, other than because Triton ended it, or that stays stopped.

        Triton lets go of a model's stubs without waiting for them, so one that was unloaded looks as if it had
        died: whoever knows that it was passes over it by `go_on`.
        """

    def __enter__(self) -> Stubs:
        self.look()
        return self

    def __exit__(self, *_: object) -> None:
        for pid in list(self._watched):
            self._forget(pid)
        self.lost.cancel()

    def go_on(self) -> None:
        """Takes the one that is lost for one that was meant to end."""
        self.lost = asyncio.get_running_loop().create_future()

    @property
    def instances(self) -> set[str]:
        """What those run that are there."""
        return {watched.instance for watched in self._watched.values()}

    @property
    def models(self) -> set[str]:
        """Names of the models whose processes they are."""
        return {instance.rsplit("_", 2)[0] for instance in self.instances}

    def look(self) -> None:
        """Watches those that have come since, and gives up those that stay stopped."""
        for pid in children(self._tritonserver):
            if pid not in self._watched and pid not in self._unseen and state(pid) == ZOMBIE:
                self._unseen.add(pid)
                if not self.lost.done():
                    self.lost.set_result(Death("", os.waitstatus_to_exitcode(exit_status(pid))))
            with contextlib.suppress(OSError):  # it has ended since
                if pid not in self._watched and (instance := instance_of(pid)):
                    self._watched[pid] = Watched(os.pidfd_open(pid), instance)
                    asyncio.get_running_loop().add_reader(self._watched[pid].fd, self._ended, pid)

        now = time.monotonic()
        stopped = [pid for pid in self._watched if state(pid) == STOPPED]
        self._stopped = {pid: self._stopped.get(pid, now) for pid in stopped}
        for pid, since in self._stopped.items():
            if now - since > STOPPED_SECONDS and not self.lost.done():
                self.lost.set_result(Death(self._watched[pid].instance, stopped=True))

    def _ended(self, pid: int) -> None:
        ended = self._forget(pid)
        self.look()
        # Where a younger one has taken its place, its model was loaded again.
        if (status := exit_status(pid)) and ended.instance not in self.instances and not self.lost.done():
            self.lost.set_result(Death(ended.instance, os.waitstatus_to_exitcode(status)))

    def _forget(self, pid: int) -> Watched:
        watched = self._watched.pop(pid)
        self._unseen.add(pid)
        asyncio.get_running_loop().remove_reader(watched.fd)
        os.close(watched.fd)
        return watched


def children(parent: int) -> Iterator[int]:
    """The processes that a process's threads have started.

    Without pathlib and text files: Triton has a hundred threads, and this looks at each four times a second.
    """
    with contextlib.suppress(OSError), os.scandir(f"/proc/{parent}/task") as threads:  # it has ended
        for thread in threads:
            with contextlib.suppress(OSError), FileIO(f"{thread.path}/children") as file:  # threads come and go
                yield from map(int, file.read().split())


def instance_of(stub: int) -> str:
    """What a stub runs, which its command line says before its last word: <model>_<instance>_<device>.

    "" of a process that is none, or not yet, or no longer: Triton starts a shell, which becomes the stub. Raises
    OSError for one that is gone.
    """
    words = Path(f"/proc/{stub}/cmdline").read_text().split("\0")
    return words[-3] if Path(words[0]).name == PROGRAM else ""


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
