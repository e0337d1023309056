"""Lets in as many connections as there are file descriptors for; when they are taken, an idle one gives way."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import orjson
from aiohttp import web

from tools.command import ServerError
from tools.shim.errors import no_room, own_error

BACKLOG = 16
"""Connections of one port that are accepted in one turn of the event loop."""

WAITING = 128
"""Connections of one port that the kernel keeps until then."""

RESERVED_FILES = 32
"""Files for what is not a caller: Triton, the resolver, pages."""

FEWEST = 8

log = logging.getLogger(__name__)


def most_connections(ports: int) -> float:
    """How many connections there is room for beside what is open now; raises ServerError where that is none."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return float("inf")
    needed = len(list(Path("/proc/self/fd").iterdir())) + RESERVED_FILES + ports * BACKLOG
    if limit < needed + FEWEST:
        raise ServerError(f"{limit} files may be open, too few: allow 1024, as by `ulimit -n 1024`")
    return limit - needed


def open_ports(host: str, ports: Sequence[int]) -> list[socket.socket]:
    """Listens on every port."""
    sockets = []
    for port in ports:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sockets.append(socket.create_server((host, port), family=family, backlog=WAITING))
    return sockets


class Listener:
    """The ports of a server, and who has come in by them."""

    def __init__(
        self,
        server: web.Server,
        listening: Sequence[socket.socket],
        busy: Collection[asyncio.BaseProtocol],
        at_once: int = BACKLOG,
    ) -> None:
        """With the connections that are `busy` with a call at any time; a port lets `at_once` in together."""
        self._server = server
        self._busy = busy
        self._sockets = listening
        self._at_once = at_once
        self._most = most_connections(len(listening))
        self._servers: list[asyncio.AbstractServer] = []

    async def open(self) -> None:
        """Lets callers in."""
        loop = asyncio.get_running_loop()
        for one in self._sockets:
            self._servers.append(await loop.create_server(self._enter, sock=one, backlog=self._at_once))
            one.listen(WAITING)  # the loop's backlog is both this and how many it accepts at once

    def close(self) -> None:
        """Lets nobody else in."""
        for server in self._servers:
            server.close()

    def _enter(self) -> asyncio.BaseProtocol:
        """What answers a new connection."""
        there = self._server.connections
        if len(there) >= self._most:
            oldest = next(filter(self._is_idle, there), None)
            if oldest is None:
                log.warning("%d connections are all there is room for, and none is idle", len(there))
                return Refusal()
            oldest.force_close()
        return self._server()

    def _is_idle(self, connection: web.RequestHandler) -> bool:
        """Whether nothing is asked or being answered on a connection that is open."""
        transport = connection.transport
        return connection not in self._busy and transport is not None and not transport.get_write_buffer_size()


class Refusal(asyncio.Protocol):
    """Answers 503 without reading anything."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Says so and hangs up."""
        assert isinstance(transport, asyncio.Transport)
        error = no_room()
        body = orjson.dumps(own_error(error)[1])
        headers = {
            **(error.headers or {}),
            "Connection": "close",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
        }
        lines = ["HTTP/1.1 503 Service Unavailable", *(f"{name}: {value}" for name, value in headers.items())]
        transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        transport.close()


class RateLimit(logging.Filter):
    """Lets one record of a kind pass in a second: what goes wrong for each caller must not fill a disk."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[str, int, int], float] = {}
        self._left_out = Counter[tuple[str, int, int]]()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the last one from the same line of code, of the same `status`, is a second old.

        What passes says how many have not since then.
        """
        now, kind = time.monotonic(), (record.pathname, record.lineno, getattr(record, "status", 0))
        if now - self._last.get(kind, -1.0) < 1:
            self._left_out[kind] += 1
            return False
        self._last[kind] = now
        if left_out := self._left_out.pop(kind, 0):
            record.msg = f"{record.msg} (and {left_out} more like it before)"
        return True
