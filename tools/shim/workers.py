"""Several processes of one gateway, `--workers N`: they take callers from the same ports in turn.

This process holds the ports, so that no caller is refused while a worker that died is started again. It answers
nothing itself. Workers share what the gateway's limits allow, and count into files that each can sum.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from tools.command import ServerError, die_with_parent, ending, run
from tools.shim.connections import open_ports
from tools.shim.metrics import FOLDER
from tools.shim.residency.loader import Residency
from tools.shim.served_model import Absent
from tools.shim.server import GatewaySettings, answering, listening

START_SECONDS = 60.0
LATE_SECONDS = 5.0
"""That a worker may end later than it should, until it is killed."""

AGAIN_SECONDS = 1.0
"""Seconds from the end of a worker until another one is started in its place."""

READY = b"ready\n"

log = logging.getLogger(__name__)


@asynccontextmanager
async def serving(
    settings: GatewaySettings, options: argparse.Namespace, residency: Residency | None
) -> AsyncIterator[None]:
    """Answers calls on the ports of a command's options, by this process or, where they say so, by several."""
    ports = [options.embed_port, options.rerank_port, *filter(None, [options.chat_port])]
    if options.workers == 1:
        async with listening(settings, options.host, ports, residency):
            yield
    else:
        async with together(settings, options.host, ports, options.workers):
            yield


@asynccontextmanager
async def together(
    settings: GatewaySettings, host: str, ports: Sequence[int], workers: int
) -> AsyncIterator[None]:
    """Answers calls as `server.listening` does, by so many processes; on leaving, all drain.

    A worker that dies is started again. Raises ServerError where one cannot be started at first.
    """
    sockets = open_ports(host, ports)
    with tempfile.TemporaryDirectory(prefix="gateway-") as folder:
        ready = [asyncio.get_running_loop().create_future() for _ in range(workers)]
        keepers = [asyncio.create_task(_keep(settings, sockets, workers, folder, one)) for one in ready]
        try:
            await asyncio.gather(*ready)
            yield
        finally:
            for one in sockets:
                one.close()
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)


async def _keep(
    settings: GatewaySettings,
    sockets: Sequence[socket.socket],
    workers: int,
    folder: str,
    ready: asyncio.Future[None],
) -> None:
    """Has a worker run until this is cancelled; `ready` is done when the first one answers, or cannot."""
    while True:
        try:
            process = await _start(settings, sockets, workers, folder)
        except OSError as error:
            if not ready.done():
                ready.set_exception(ServerError(f"no worker of the gateway can be started: {error.strerror}"))
                return
            log.error("no worker of the gateway can be started: %s", error.strerror)
            await asyncio.sleep(AGAIN_SECONDS)
            continue
        try:
            assert process.stdout is not None
            answers = await asyncio.wait_for(process.stdout.readline(), START_SECONDS) == READY
            if not ready.done():
                if not answers:
                    ready.set_exception(ServerError("a worker of the gateway did not start; it says why above"))
                    return
                ready.set_result(None)
            await process.wait()
        except asyncio.TimeoutError:
            if not ready.done():
                ready.set_exception(ServerError(f"a worker of the gateway did not start in {START_SECONDS:.0f} s"))
        finally:
            await _end(process, settings.stop_seconds + LATE_SECONDS)
            mark_process_dead(process.pid, folder)  # type: ignore[no-untyped-call]
        assert process.returncode is not None
        how = ending(process.returncode)
        log.error("worker %d of the gateway %s: another takes its place", process.pid, how)
        await asyncio.sleep(AGAIN_SECONDS)


async def _start(
    settings: GatewaySettings, sockets: Sequence[socket.socket], workers: int, folder: str
) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {FOLDER: folder},
        pass_fds=[one.fileno() for one in sockets],
        # Ctrl-C reaches the terminal's group; workers are told by this process, once.
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    assert process.stdin is not None
    told = asdict(settings) | {"accepted": [key.decode() for key in settings.accepted]}
    told |= {"sockets": [one.fileno() for one in sockets], "workers": workers}
    with suppress(ConnectionError):  # it has ended, which its keeper sees
        process.stdin.write(json.dumps(told).encode())  # not in the arguments, which everybody can read
        await process.stdin.drain()
        process.stdin.close()
    return process


async def _end(process: asyncio.subprocess.Process, seconds: float) -> None:
    """Lets a worker finish what is under way, for so long, or until this is cancelled."""
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), seconds)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def work(told: Mapping[str, Any], stop: asyncio.Event) -> None:
    """One worker: answers on the ports that it has been handed, until told to stop."""
    words = dict(told)
    sockets = [socket.socket(fileno=number) for number in words.pop("sockets")]
    workers = words.pop("workers")
    words["accepted"] = [key.encode() for key in words["accepted"]]
    words["absent"] = {name: Absent(**known) for name, known in words["absent"].items()}
    async with answering(GatewaySettings(**words), sockets, workers=workers):
        sys.stdout.buffer.write(READY)
        sys.stdout.buffer.flush()
        await stop.wait()


if __name__ == "__main__":
    sys.exit(run(partial(work, json.load(sys.stdin))))
