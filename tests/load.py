"""Load on a stack while something happens to it; Triton and the gateway as two commands, as in containers."""

from __future__ import annotations

import http.client
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import psutil
from conftest import ROOT, Stack, free_ports
from containers import listens, until

GONE = 0
"""In place of a status: the connection was refused or broke."""


class Load:
    """Clients that send one text after another; every answer must have the bits that the text gave before."""

    def __init__(self, stack: Stack, clients: int = 8, statuses: Collection[int] = (200, 503, GONE)) -> None:
        """With `statuses` that their answers may have."""
        self._stack = stack
        self._statuses = statuses
        self._texts = [f"text {i} of the load{' that goes on' * (i % 7)}" for i in range(40)]
        self._expected = stack.embed(self._texts)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(i,)) for i in range(clients)]
        self.counts: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.slowest = 0.0

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if kind is None:
            assert not self.wrong, self.wrong[:3]
            assert set(self.counts) <= set(self._statuses), self.counts

    def answers(self, count: int = 40) -> float:
        """Waits for so many more answers; returns how long the first of them took to come."""
        before = self.counts[200]
        first = until(lambda: self.counts[200] > before)
        until(lambda: self.counts[200] >= before + count)
        return first

    def fails(self, status: int) -> None:
        """Waits for one more answer of this status."""
        before = self.counts[status]
        until(lambda: self.counts[status] > before)

    def _client(self, number: int) -> None:
        generator = random.Random(number)
        while not self._stop.is_set():
            i = generator.randrange(len(self._texts))
            started = time.monotonic()
            try:
                answer = self._stack.post("embed", "/embed", {"texts": [self._texts[i]]})
            except (OSError, http.client.HTTPException):
                self.counts[GONE] += 1
                time.sleep(0.02)
                continue
            self.slowest = max(self.slowest, time.monotonic() - started)
            self.counts[answer.status] += 1
            if answer.status == 200:
                (vector,) = answer.json()["embeddings"]
                if (self._expected[i] != np.array(vector, np.float32)).any():
                    self.wrong.append(self._texts[i])
                continue
            if answer.status not in self._statuses:
                self.wrong.append(answer.body.decode())
            if answer.status == 503 and int(answer.headers["Retry-After"]) < 1:
                self.wrong.append("a 503 does not say when to try again")
            time.sleep(0.02)


@dataclass
class Split(Stack):
    """`python -m tools.triton`, and `python -m tools.shim` in front of it."""

    commands: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self) -> Split:
        """Starts both and waits until they answer."""
        self.start_triton()
        self.start_gateway()
        until(lambda: self.get("embed", "/health").status == 200)
        return self

    def start_triton(self) -> None:
        """Starts Triton only; does not wait."""
        self._run("triton", "-m", "tools.triton", "--work-folder", str(self.work_folder), *self._ports(2))

    def start_gateway(self, triton: int | None = None, code: str = "pass") -> None:
        """Starts the gateway in front of a port, after some `code`, and waits until it listens."""
        address = f"127.0.0.1:{triton or self.ports['grpc']}"
        run = f"import sys; {code}; from tools.shim.__main__ import main; sys.exit(main(sys.argv[1:]))"
        self._run("gateway", "-c", run, "--triton", address, *self._ports(0, 2))
        until(lambda: listens(self.ports["embed"]))

    def tritonserver(self) -> psutil.Process:
        """The server's own process."""
        (found,) = psutil.Process(self.commands["triton"].pid).children()
        return found

    def end(self) -> None:
        """Stops what runs."""
        for process in self.commands.values():
            process.send_signal(signal.SIGTERM)
        for process in self.commands.values():
            process.wait(60)

    def log(self, name: str) -> str:
        """What a command wrote to stderr."""
        return self._output(name).read_text()

    def _ports(self, first: int, last: int | None = None) -> list[str]:
        names = list(self.ports)[first:last]
        return [word for name in names for word in (f"--{name}-port", str(self.ports[name]))]

    def _run(self, name: str, *words: str) -> None:
        with self._output(name).open("ab") as errors:
            self.commands[name] = subprocess.Popen(
                [*self.wrapper, sys.executable, *words, *self.options],
                cwd=ROOT,
                env=os.environ | self.environment,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )


def reset(connection: socket.socket) -> None:
    """Closes a connection with RST, unless it is closed."""
    if connection.fileno() < 0:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


class Proxy:
    """Passes connections on to a port, and breaks them where it is told to."""

    def __init__(self, target: int) -> None:
        self._target = target
        (self.port,) = free_ports(1)
        self.room: int | None = None
        """Bytes that the target may still answer on all connections together; None is any number."""
        self.once = False
        """Whether any number is right again when a connection has been broken."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accepts no more and breaks what there is."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            target = socket.create_connection(("127.0.0.1", self._target))
            self._ends += (client, target)
            for pair in ((client, target, False), (target, client, True)):
                threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        with suppress(OSError):  # it was broken at another end
            while data := source.recv(1 << 16):
                if is_answer and self.room is not None:
                    data = data[: self.room]
                    self.room -= len(data)
                    if not data:
                        self.room = None if self.once else 0
                        break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
