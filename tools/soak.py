"""Serves a mixed load for a long time and watches what must stay flat: memory, shared memory, files and threads.

Short and large calls, reranking, bad input, deadlines that pass and callers that go away, all at once. It starts a
stack of its own on free ports and ends it. `make soak` takes an hour.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from tools.bench.server import PORTS, free_ports
from tools.command import ROOT

LIMITS = {"memory_mb": (1.05, 16), "shm_mb": (1.0, 16), "files": (1.0, 16), "threads": (1.0, 4)}
"""What is watched -> by how much, as a factor and besides, the end may be over the first half's most."""
WARM_UP_CALLS = 20
"""Large calls answered before the clock starts: they fill pools and caches."""


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
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as stack:
        try:
            report = asyncio.run(soak(stack, ports["embed"], options.seconds, options.clients))
        finally:
            stack.terminate()
    print(json.dumps(report))
    return 1 if report["grew"] or report["wrong"] or stack.returncode else 0


async def soak(stack: subprocess.Popen[bytes], port: int, seconds: float, clients: int) -> dict[str, Any]:
    """Runs the load; returns calls by status, what was watched at both halves, and what is wrong with either."""
    url = f"http://127.0.0.1:{port}"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:
        await ready(session, stack)
        statuses: Counter[str] = Counter()
        wrong: list[str] = []
        over = asyncio.Event()
        tasks = [asyncio.create_task(client(session, i, over, statuses, wrong)) for i in range(clients)]
        while statuses["large 200"] < WARM_UP_CALLS and not wrong:
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
        name = draw.choices(list(KINDS), [weight for weight, *_ in KINDS.values()])[0]
        _, path, allowed, patience = KINDS[name]
        headers = {"X-Request-Timeout": "0.05"} if name == "late" else {}
        try:
            call = session.post(path, data=json.dumps(body(name, draw)).encode(), headers=headers)
            answer = await asyncio.wait_for(call, patience)
            count = len(json.loads(await answer.read()).get("embeddings", ()))
        except (asyncio.TimeoutError, aiohttp.ClientError) as error:
            statuses[f"{name} gave up"] += 1
            if name != "gone":
                wrong.append(f"{name}: {error!r}")
            continue
        statuses[f"{name} {answer.status}"] += 1
        if answer.status not in allowed or (name == "short" and count != 1):
            wrong.append(f"{name}: status {answer.status}, {count} embeddings")


def body(name: str, draw: random.Random) -> dict[str, Any]:
    """What a kind of call sends."""
    words = [f"word{draw.randrange(2000)}" for _ in range(60)]
    texts = [" ".join(draw.sample(words, draw.randrange(1, 60))) for _ in range(draw.randrange(40, 120))]
    if name == "rerank":
        return {"query": texts[0], "documents": texts[1:20]}
    if name == "bad":
        return {"texts": draw.choice([[], [""], ["\0"], [1], None])}
    return {"texts": texts[:1] if name == "short" else texts}


KINDS: dict[str, tuple[int, str, set[int], float]] = {
    "short": (60, "/embed", {200}, 120),
    "large": (6, "/embed", {200, 429}, 120),
    "rerank": (10, "/rerank", {200, 429}, 120),
    "bad": (10, "/embed", {400}, 120),
    "late": (5, "/embed", {200, 429, 504}, 120),
    "gone": (5, "/embed", {200, 429}, 0.1),
}
"""Kind of call -> weight, path, statuses that it may get, seconds after which its caller goes away."""


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
