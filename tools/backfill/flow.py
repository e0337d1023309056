"""The flow of a backfill: windows of texts are read, embedded and written at the same time, in bounded memory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tools.backfill.client import Client
from tools.backfill.progress import Progress

Vectors = npt.NDArray[np.float32]

AHEAD, BEHIND = 1, 2
"""Windows that are read but not sent, and those that are sent but not written."""

POLL_SECONDS = 1.0
"""Seconds between two looks at what others do."""


@dataclass(frozen=True)
class Window:
    """Some rows of a store, which are written together."""

    ids: list[str]
    texts: list[str | None]
    """None where a row has no text that could be sent."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Why, by the row's place, where it is not simply NULL."""
    token: Any = None
    """The store's own."""


@dataclass(frozen=True)
class Wait:
    """Nothing can be read now, and more may have to be later."""

    why: str | None
    """What others do; None where only this job's own windows keep it."""


class Store(Protocol):
    """Where texts come from and vectors go. `read` and `write` are called from different threads."""

    def read(self) -> Window | Wait | None:
        """The next rows that nobody else does; None where all rows are done. It never blocks for others."""

    def write(self, window: Window, vectors: Vectors, refused: Mapping[int, str]) -> int:
        """Keeps `vectors` [rows, D], those of `refused` rows aside; returns how many rows were written."""


async def run(store: Store, client: Client, progress: Progress) -> None:
    """Reads, embeds and writes until the store has no more; raises BackfillError where it cannot go on."""
    ahead: asyncio.Queue[Window | None] = asyncio.Queue(AHEAD)
    behind: asyncio.Queue[tuple[Window, asyncio.Task[Vectors]] | None] = asyncio.Queue(BEHIND)
    refused: dict[int, dict[int, str]] = {}
    tasks: list[asyncio.Task[Any]] = []
    unwritten = 0
    wrote = asyncio.Event()

    async def read() -> None:
        nonlocal unwritten
        while (found := await asyncio.to_thread(store.read)) is not None:
            if isinstance(found, Window):
                unwritten += 1
                await ahead.put(found)
                continue
            if found.why is not None and not unwritten:
                progress.waits(found.why)
            with suppress(TimeoutError):
                await asyncio.wait_for(wrote.wait(), POLL_SECONDS)
            wrote.clear()
        await ahead.put(None)

    async def embed() -> None:
        while (window := await ahead.get()) is not None:
            refused[id(window)] = reasons = blank(window)
            task = asyncio.create_task(embedded(client, window, reasons))
            tasks.append(task)
            await behind.put((window, task))
        await behind.put(None)

    async def write() -> None:
        nonlocal unwritten
        while (item := await behind.get()) is not None:
            window, task = item
            vectors = await task
            tasks.remove(task)
            await client.check()  # nothing is written of a server that has become another one
            reasons = refused.pop(id(window))
            written = await asyncio.to_thread(store.write, window, vectors, reasons)
            unwritten -= 1
            wrote.set()
            progress.wrote(written, {window.ids[i]: reason for i, reason in reasons.items()})

    tasks += [asyncio.create_task(step()) for step in (read, embed, write)]
    steps = tasks[:]
    try:
        await asyncio.gather(*steps)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def blank(window: Window) -> dict[int, str]:
    """The rows without a text, and why."""
    found = dict(window.reasons)
    for i, text in enumerate(window.texts):
        if text is None:
            found.setdefault(i, "its text is NULL")
        elif not text:
            found[i] = "its text is empty"
    return found


async def embedded(client: Client, window: Window, reasons: dict[int, str]) -> Vectors:
    """The vectors of a window, zeros for rows that are in `reasons` at the end."""
    vectors = np.zeros((len(window.ids), client.origin.dimensions), np.float32)
    places = [i for i in range(len(window.ids)) if i not in reasons]
    await client.embed(window.texts, places, vectors, reasons)
    return vectors
