"""Listening and draining: the gateway's life around its routes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext

from aiohttp import web, web_response
from aiohttp.http_exceptions import HttpProcessingError

from tools.shim.app import make_app
from tools.shim.connections import Doors, Seldom
from tools.shim.residency import Residency
from tools.shim.upstream import Absent, Upstream

IDLE_SECONDS = 75
"""How long a connection may go without a whole request's headers: longer than proxies keep theirs open."""

DRAIN_SECONDS = 30.0
"""How long calls under way may take to finish when the gateway is told to stop."""


def is_ours(record: logging.LogRecord) -> bool:
    """Whether a failure is not that of a caller who does not speak HTTP, who gets a 400 and no line of the log."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError | web.RequestPayloadError))


@asynccontextmanager
async def listening(
    triton: str,
    models: Sequence[str],
    host: str,
    ports: Sequence[int],
    timeout: float,
    accepted: Collection[bytes],
    absent: Mapping[str, Absent] | None = None,
    aliases: Mapping[str, str] | None = None,
    origins: Collection[str] = (),
    residency: Residency | None = None,
) -> AsyncIterator[None]:
    """Answers calls that carry one of the `accepted` keys, or all where there are none; on leaving, drains.

    Listens on every one of `ports`; `triton` is the address of its gRPC. What is known of models that it could not
    load is in `absent`. Callers may also use `aliases`, and pages of `origins` may call from a browser. A
    `residency` loads models as they are called; without one they are there or not.
    """
    # The header `Server`, which would tell everybody the versions of Python and aiohttp.
    web_response.SERVER_SOFTWARE = "triton-embeddings"  # type: ignore[attr-defined]
    logging.getLogger("aiohttp.server").addFilter(is_ours)
    for name in ("asyncio", Doors.__module__):
        logging.getLogger(name).addFilter(Seldom())
    async with (
        residency or nullcontext(),
        Upstream(triton, models, absent or {}, aliases or {}, residency) as upstream,
    ):
        busy: set[asyncio.BaseProtocol] = set()
        app = make_app(upstream, timeout, accepted, busy, origins)
        runner = web.AppRunner(
            app,
            access_log=None,
            auto_decompress=False,
            handler_cancellation=True,
            keepalive_timeout=IDLE_SECONDS,
            shutdown_timeout=DRAIN_SECONDS,
        )
        await runner.setup()
        assert runner.server is not None
        try:
            doors = Doors(runner.server, host, ports, busy)
            try:
                await doors.open()
                yield
            finally:
                doors.close()
        finally:
            await runner.cleanup()
