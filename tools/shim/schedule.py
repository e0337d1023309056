"""Splits one call of many texts into Triton requests and puts the answers back in order.

Texts of similar length travel together, so that a request carries few empty slots, and requests stay near the
encoder's own batch size, so that tokenizing one overlaps with encoding another. No text is changed or dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

REQUEST_BYTES = 8192
"""UTF-8 bytes of text in one request, about 2000 tokens; a longer text travels alone."""

Tensors = dict[str, npt.NDArray[Any]]
Infer = Callable[[list[int]], Awaitable[Tensors]]


def split(sizes: Sequence[int], max_texts: int) -> list[list[int]]:
    """Indices of texts by their `sizes` in bytes, cut into requests of at most `max_texts` and REQUEST_BYTES."""
    requests: list[list[int]] = []
    room = 0
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        if not requests or sizes[i] > room or len(requests[-1]) == max_texts:
            requests.append([])
            room = REQUEST_BYTES
        requests[-1].append(i)
        room -= sizes[i]
    return requests


async def run(requests: list[list[int]], infer: Infer, at_once: int) -> Tensors:
    """Calls `infer` for every request, longest texts first, and returns the rows in the order of the call.

    At most `at_once` run together. The first error, or the caller's going away, cancels the rest.
    """
    if len(requests) == 1:  # the usual call, which needs no tasks of its own
        return in_order(requests, [await infer(requests[0])])
    waiting = list(range(len(requests)))
    answers: list[Tensors] = [{}] * len(requests)

    async def worker() -> None:
        while waiting:
            i = waiting.pop()
            answers[i] = await infer(requests[i])

    workers = [asyncio.create_task(worker()) for _ in range(min(at_once, len(requests)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return in_order(requests, answers)


def in_order(requests: list[list[int]], answers: list[Tensors]) -> Tensors:
    """The rows of all `answers` in the order of the call."""
    if requests == [[0]]:
        return answers[0]
    places = np.argsort(np.concatenate(requests))
    return {name: np.concatenate([answer[name] for answer in answers])[places] for name in answers[0]}
