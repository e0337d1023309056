"""Listening and draining: the gateway's life around its routes."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field

from aiohttp import web, web_response
from aiohttp.http_exceptions import HttpProcessingError

from tools.shim.app import make_app
from tools.shim.connections import BACKLOG, Listener, RateLimit, open_ports
from tools.shim.residency.loader import Residency
from tools.shim.served_model import Absent
from tools.shim.upstream import Upstream

IDLE_SECONDS = 75
"""How long a connection may go without a whole request's headers: longer than proxies keep theirs open."""

COLLECTED_OBJECTS = 10_000
"""New objects at which the garbage collector looks at the youngest; Python's own 700 are two calls."""

LAST_SECONDS = 2.0
"""After the deadline of the last call under way, for the answer that it has passed."""

FAILED_SECONDS = 30.0
"""For calls under way to be told that their Triton is gone."""

AT_ONCE_SECONDS = 0.1
"""For connections without a call, which are closed first."""

log = logging.getLogger(__name__)


def is_ours(record: logging.LogRecord) -> bool:
    """Whether a failure is not that of a caller who does not speak HTTP, who gets a 400 and no line of the log."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError | web.RequestPayloadError))


def spare_the_collector() -> None:
    """Has Python's garbage collector pass over what is there for good, and look less often.

    A call makes hundreds of short-lived objects and no cycles of its own: see `forget`.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECTED_OBJECTS)


@dataclass(frozen=True)
class GatewaySettings:
    """What a gateway is told of its calls and its Triton."""

    triton: str
    """Address of its gRPC."""
    models: Sequence[str]
    timeout: float
    accepted: Collection[bytes]
    """Keys of which a call needs one, or none where there are none."""
    absent: Mapping[str, Absent] = field(default_factory=dict)
    """What is known of models that Triton could not load."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """What callers may also name models by."""
    origins: Collection[str] = ()
    """Origins whose pages may call from a browser."""
    drain_delay: float = 0.0
    """Seconds from when the gateway is told to stop until it does, in which /health is 503."""

    @property
    def stop_seconds(self) -> float:
        """That stopping may take: each call under way has its deadline."""
        return self.drain_delay + self.timeout + LAST_SECONDS


@asynccontextmanager
async def listening(
    settings: GatewaySettings, host: str, ports: Sequence[int], residency: Residency | None = None
) -> AsyncIterator[None]:
    """Answers calls on every one of `ports`; on leaving, drains.

    A `residency` loads models as they are called; without one they are there or not.
    """
    async with answering(settings, open_ports(host, ports), residency):
        yield


@asynccontextmanager
async def answering(
    settings: GatewaySettings,
    sockets: Sequence[socket.socket],
    residency: Residency | None = None,
    workers: int = 1,
) -> AsyncIterator[None]:
    """The same, of sockets that listen, as one of so many `workers`."""
    # The header `Server`, which would tell everybody the versions of Python and aiohttp.
    web_response.SERVER_SOFTWARE = "triton-embeddings"  # type: ignore[attr-defined]
    logging.getLogger("aiohttp.server").addFilter(is_ours)
    for name in ("asyncio", Listener.__module__, make_app.__module__):
        logging.getLogger(name).addFilter(RateLimit())
    async with (
        residency or nullcontext(),
        Upstream(settings.triton, settings.models, settings.absent, settings.aliases, residency) as upstream,
    ):
        busy: set[asyncio.BaseProtocol] = set()
        app = make_app(upstream, settings.timeout, settings.accepted, busy, settings.origins, workers)
        runner = web.AppRunner(
            app,
            access_log=None,
            auto_decompress=False,
            handler_cancellation=True,
            keepalive_timeout=IDLE_SECONDS,
            shutdown_timeout=settings.stop_seconds,
        )
        await runner.setup()
        assert runner.server is not None
        # Of several, the idlest comes first to each caller.
        listener = Listener(runner.server, sockets, busy, BACKLOG if workers == 1 else 1)
        seconds = FAILED_SECONDS
        try:
            await listener.open()
            spare_the_collector()
            yield
            upstream.is_stopping = True
            if settings.drain_delay:
                log.info("stopping: /health is 503 for %g s, then the ports close", settings.drain_delay)
                await asyncio.sleep(settings.drain_delay)
            log.info("stopping: %d calls are under way, and get up to %g s", len(busy), settings.timeout)
            seconds = settings.timeout + LAST_SECONDS
        except asyncio.CancelledError:
            seconds = AT_ONCE_SECONDS
            raise
        finally:
            listener.close()
            await drain(runner, seconds)


async def drain(runner: web.AppRunner, seconds: float) -> None:
    """Has the calls under way answered, for so long or until it is cancelled; says how many are not."""
    assert runner.server is not None
    server, cleanup = runner.server, asyncio.create_task(runner.cleanup())
    try:
        await asyncio.wait((cleanup,), timeout=seconds)
    finally:
        if not cleanup.done():
            log.warning("%d calls are cut off", len(server.connections))
            cleanup.cancel()
