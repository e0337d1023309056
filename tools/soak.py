"""Serves a mixed load for a long time and watches what must stay flat: memory, shared memory, files and threads.

Short and large calls, reranking, bad input, texts and queries of megabytes, bodies that are refused or stall,
deadlines that pass and callers that go away, all at once. It starts a stack of its own on free ports and ends it.
`make soak` takes an hour.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from tools.bench.server import PORTS, ended_by_sigterm, free_ports
from tools.command import ROOT
from tools.shim import keys

LIMITS = {"memory_mb": (1.05, 128), "shm_mb": (1.0, 16), "files": (1.0, 16), "threads": (1.0, 4)}
"""What is watched -> by how much, as a factor and besides, the end may be over the first half's most."""
WARM_UP_CALLS = {"large 200": 20, "long 200": 4, "query 200": 4}
"""Calls answered before the clock starts: they fill pools and caches."""
PATIENT = 120.0
"""Seconds that a call may take."""
MOST_SAID = 2000
"""Bytes of an error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one line of JSON; returns 1 when something grew or a call was answered as it must not be."""
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600, help="how long (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=16, help="calls at once (default: %(default)s)")
    parser.add_argument("--work-folder", type=Path, default=ROOT / ".cache", help="Triton's log")
    options = parser.parse_args(arguments)
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    words = [word for name, port in ports.items() for word in (f"--{name}-port", str(port))]
    command = [sys.executable, "-m", "tools.serve", "--work-folder", str(options.work_folder), *words]
    key = secrets.token_hex(16)
    environment = os.environ | {keys.VARIABLE: key}
    with (
        ended_by_sigterm(),
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as stack,
    ):
        try:
            report = asyncio.run(soak(stack, ports["embed"], key, options.seconds, options.clients))
        finally:
            stack.terminate()
    print(json.dumps(report))
    return 1 if report["grew"] or report["wrong"] or stack.returncode else 0


async def soak(
    stack: subprocess.Popen[bytes], port: int, key: str, seconds: float, clients: int
) -> dict[str, Any]:
    """Runs the load; returns calls by status, what was watched at both halves, and what is wrong with either."""
    url = f"http://127.0.0.1:{port}"
    connector, own = aiohttp.TCPConnector(limit=0), {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(
        url, connector=connector, timeout=aiohttp.ClientTimeout(PATIENT), headers=own
    ) as session:
        await ready(session, stack)
        statuses: Counter[str] = Counter()
        wrong: list[str] = []
        over = asyncio.Event()
        tasks = [asyncio.create_task(client(session, i, over, statuses, wrong)) for i in range(clients)]
        while any(statuses[call] < count for call, count in WARM_UP_CALLS.items()) and not wrong:
            await asyncio.sleep(0.2)
        started = time.monotonic()
        samples: list[dict[str, float]] = []
        while time.monotonic() < started + seconds:
            await asyncio.sleep(max(0.2, seconds / 1000))
            samples.append(sample(stack.pid))
        over.set()
        await asyncio.gather(*tasks)
    first, last = samples[: len(samples) // 2], samples[-len(samples) // 10 :]
    halves = {name: (max(s[name] for s in first), max(s[name] for s in last)) for name in LIMITS}
    grew = [name for name, (most, end) in halves.items() if end > most * LIMITS[name][0] + LIMITS[name][1]]
    return {"seconds": seconds, "calls": dict(statuses), "halves": halves, "grew": grew, "wrong": wrong[:5]}


async def client(
    session: aiohttp.ClientSession, seed: int, over: asyncio.Event, statuses: Counter[str], wrong: list[str]
) -> None:
    """One caller: draws a kind of call, sends it, and compares its status with what that kind may get."""
    draw = random.Random(seed)
    while not over.is_set():
        name = draw.choices(list(KINDS), [kind.weight for kind in KINDS.values()])[0]
        kind = KINDS[name]
        content = json.dumps(body(name, draw)).encode()
        try:
            call = session.post(
                kind.path, data=stalling(content) if kind.stalls else content, headers=kind.headers
            )
            answer = await asyncio.wait_for(call, kind.patience)
            sent_back = await answer.read()
        except (asyncio.TimeoutError, aiohttp.ClientError) as error:
            statuses[f"{name} gave up"] += 1
            if kind.patience == PATIENT:
                wrong.append(f"{name}: {error!r}")
            continue
        statuses[f"{name} {answer.status}"] += 1
        count = len(json.loads(sent_back).get("embeddings", ()))
        is_echo = answer.status >= 400 and len(sent_back) > MOST_SAID
        if answer.status not in kind.statuses or (name == "short" and count != 1) or is_echo:
            wrong.append(f"{name}: status {answer.status}, {count} embeddings, {len(sent_back)} bytes")


async def stalling(content: bytes) -> AsyncIterator[bytes]:
    """Most of a body, and then nothing."""
    yield content[: len(content) * 9 // 10]
    await asyncio.sleep(PATIENT)


def body(name: str, draw: random.Random) -> dict[str, Any]:
    """What a kind of call sends."""
    words = [f"word{draw.randrange(2000)}" for _ in range(60)]
    texts = [" ".join(draw.sample(words, draw.randrange(1, 60))) for _ in range(draw.randrange(40, 120))]
    megabytes = " ".join(words) * (4 * 2**20 // 500)
    match name:
        case "rerank":
            return {"query": texts[0], "documents": texts[1:20]}
        case "query":
            return {"query": megabytes[: 2**20], "documents": texts[:20]}
        case "bad":
            return {"texts": draw.choice([[], [""], [1], None])}
        case "late refusal":
            return {"texts": [megabytes, 1]}
        case "values":
            return {"texts": [[]] * 2**18}
        case "echo":
            return {"texts": texts[:1], "model": megabytes}
        case "over":
            return {"texts": [megabytes] * 5}
        case "long":
            return {"texts": [draw.choice([megabytes, megabytes.replace(" ", "")])]}
        case "stalled":
            return {"texts": [megabytes]}
        case "short" | "no key":
            return {"texts": texts[:1]}
    return {"texts": texts}


@dataclass(frozen=True)
class Kind:
    """A kind of call."""

    weight: int
    path: str
    statuses: Collection[int]
    """Statuses that its answers may have."""
    patience: float = PATIENT
    """Seconds after which its caller goes away."""
    stalls: bool = False
    """Whether its body never ends."""
    headers: Mapping[str, str] = field(default_factory=dict)


BUSY = (429, 503)
KINDS = {
    "short": Kind(600, "/embed", {200}),
    "large": Kind(60, "/embed", {200, *BUSY}),
    "rerank": Kind(100, "/rerank", {200, *BUSY}),
    "bad": Kind(100, "/embed", {400}),
    "late": Kind(50, "/embed", {200, 408, 504, *BUSY}, headers={"X-Request-Timeout": "0.05"}),
    "gone": Kind(50, "/embed", {200, *BUSY}, patience=0.1),
    "no key": Kind(20, "/embed", {401}, headers={"Authorization": "Bearer none"}),
    "late refusal": Kind(5, "/embed", {400, *BUSY}),
    "values": Kind(5, "/embed", {413}),
    "echo": Kind(5, "/embed", {404, *BUSY}),
    "over": Kind(5, "/embed", {413}),
    "long": Kind(10, "/embed", {200, *BUSY}),
    "query": Kind(5, "/rerank", {200, *BUSY}),
    "stalled": Kind(10, "/embed", {408, *BUSY}, patience=2, stalls=True),
}


async def ready(session: aiohttp.ClientSession, stack: subprocess.Popen[bytes]) -> None:
    """Waits until the stack answers; raises SystemExit when it ends instead."""
    while stack.poll() is None:
        try:
            async with session.get("/health") as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.2)
    raise SystemExit("the stack did not start")


def sample(pid: int) -> dict[str, float]:
    """What the processes of a stack hold together now."""
    own = psutil.Process(pid)
    tree = [own, *own.children(recursive=True)]
    segments = Path("/dev/shm").glob(f"triton-embeddings-{pid}-*")  # noqa: S108
    return {
        "memory_mb": sum(process.memory_info().rss - process.memory_info().shared for process in tree) / 2**20,
        "shm_mb": sum(segment.stat().st_size for segment in segments) / 2**20,
        "files": sum(process.num_fds() for process in tree),
        "threads": sum(process.num_threads() for process in tree),
    }


if __name__ == "__main__":
    sys.exit(main())
