"""An engine's streams, and the micro-batches that run on them: a text joins as soon as a stream is free.

Items of all batches wait together. The next micro-batch begins with the most urgent of them and takes along those
nearest in length, as long as they fit. A request is the more urgent the earlier it came and the less work it is:
only what comes while the engine could have done it alone is put before it. So one text does not wait behind a
backfill, and a backfill does not wait for ever.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy.typing as npt
import openvino as ov
import triton_python_backend_utils as pb_utils

from .last_words import end_process
from .ranges import annotate
from .requests import Batch, Item

Array: TypeAlias = npt.NDArray[Any]

Result: TypeAlias = "dict[str, Array] | Exception"
"""An item's outputs by name, or what the engine has raised; NumPy, where they do not fit."""

PLACES = re.compile(r"(?:Exception from|Check '.*?' failed at) \S+:\d+:")
"""Where in its sources OpenVINO says that an error has been."""

Feeds: TypeAlias = Callable[[Sequence[Item]], dict[str, Array]]
"""Makes what a graph reads of a micro-batch."""

Ports: TypeAlias = "list[tuple[ov.ConstOutput, set[str]]]"
"""Inputs of a graph and their names."""

HOLD = 0.02
"""Seconds that a batch is waited for, and more gather in Triton: together they cost it less than one by one."""

ROOM = 2**17
"""Tokens under way beyond which Triton is left with what comes."""

SHARED_MEMORY = "/dev/shm"  # noqa: S108

ENOUGH = 32 << 20
"""Bytes of it that are to be free where answers are sent by themselves: one that finds none is lost."""

FIRST_RATE = 4096.0
"""Tokens a second that a stream is taken to compute before it has been seen."""

SMOOTHING = 0.1
"""Weight of the last micro-batch in the rate."""


class EngineLostError(Exception):
    """A graph has failed, as one does that finds no memory; the message is the engine's, in one line.

    What it leaves behind is shapes of the failed run among those of the next, and a cache that keeps the failure:
    such an engine was seen to fail texts that it could compute, and nothing says that it cannot compute wrongly.
    """


class Lane:
    """Runs one micro-batch at a time: a graph, and the head behind it."""

    def __init__(
        self, graph: ov.CompiledModel, head: ov.CompiledModel | None, feeds: Feeds, outputs: Sequence[str]
    ) -> None:
        self._graph = graph.create_infer_request()
        self._head = head.create_infer_request() if head else None
        self._ports = [(port, port.names) for port in graph.inputs]
        self._head_ports = [(port, port.names) for port in head.inputs] if head else []
        ports = [(i, port.names) for i, port in enumerate((head or graph).outputs)]
        self._outputs = [(name, next(i for i, names in ports if name in names)) for name in outputs]
        self._feeds = feeds
        self._range = annotate("infer")

    def run(self, items: Sequence[Item], encoded: Callable[[], None] | None = None) -> list[Result]:
        """What comes of each item; `encoded` is called when the graph is done, and only the head is left.

        Raises EngineLostError.
        """
        try:
            try:
                # The engine reads these where they are.
                feeds = {
                    name: ov.Tensor(values, shared_memory=True) for name, values in self._feeds(items).items()
                }
                with self._range:
                    _run(self._graph, self._ports, feeds)
            finally:
                if encoded is not None:
                    encoded()
            if self._head is not None:
                states = self._graph.get_output_tensor(0)
                ids = feeds.get("kept_ids", feeds["input_ids"])
                _run(self._head, self._head_ports, feeds | {"last_hidden_state": states, "input_ids": ids})
            last = self._head or self._graph
            # The engine's own memory, which the next micro-batch overwrites.
            outputs = {name: last.get_output_tensor(i).data.copy() for name, i in self._outputs}
            return [{name: values[i] for name, values in outputs.items()} for i in range(len(items))]
        except EngineLostError:
            raise
        except Exception as error:
            return [error] * len(items)


@dataclass(eq=False)
class Waiting:
    """An item that has not begun."""

    urgency: float
    """The second of the monotonic clock by which its request could have been done alone."""
    item: Item
    batch: Batch

    @property
    def length(self) -> int:
        """Tokens."""
        return self.item.length


class Streams:
    """Runs items on `count` streams of an engine, each of `lanes` from a thread of its own.

    There are more lanes than streams: a stream's next micro-batch runs while the results of its last are
    collected. Where nothing is under way, and little comes, the lane `on_all_threads` runs it.
    """

    def __init__(
        self, on_all_threads: Lane, lanes: Iterable[Lane], count: int, budget: int, spread: float
    ) -> None:
        self._on_all_threads = on_all_threads
        self._count, self._budget, self._spread = count, budget, spread
        self._rate = FIRST_RATE
        """Tokens a second of one stream."""
        self._waiting: list[Waiting] = []
        """By length."""
        self._encoding = 0
        """Streams that are busy."""
        self._tokens = 0
        """Of items that are not done."""
        self._is_closed = False
        lock = threading.Lock()
        self._can_begin, self._changed = threading.Condition(lock), threading.Condition(lock)
        """What lanes wait for, and what Triton's thread waits for."""
        self._threads = [threading.Thread(target=self._run, args=(lane,), daemon=True) for lane in lanes]
        for thread in self._threads:
            thread.start()

    def wait_for_room(self) -> None:
        """Waits until there is room for a batch."""
        with self._changed:
            self._changed.wait_for(lambda: self._tokens <= ROOM)

    def run(self, batch: Batch) -> None:
        """Runs the items of a batch, or takes them; waits for them if they are to be answered together."""
        if not self._tokens:
            batches = list(micro_batches(batch.items, self._budget, self._spread))
            # With half of the streams idle, all threads on one micro-batch after another end sooner.
            if len(batches) <= max(1, self._count // 2):
                for items in reversed(batches):
                    for item, result in zip(items, _results(self._on_all_threads, items), strict=True):
                        settle(batch, item, result)
                return
        now = time.monotonic()
        with self._changed:
            batch.alone = [self._seconds(tokens) for tokens in batch.tokens]
            for item in batch.items:
                urgency = now + min(batch.alone[request] for request, _ in item.places)
                self._waiting.append(Waiting(urgency, item, batch))
                self._tokens += item.length
            self._waiting.sort(key=_length)
            self._wake()
            is_held, is_soon = batch.is_held or _is_scarce(), self._seconds(self._tokens) < HOLD

            def is_enough() -> bool:
                # While nothing new could begin, Triton gathers a batch: that is fewer messages.
                is_free = not self._waiting and self._encoding < self._count
                return batch.is_done or (is_free and not (is_held or is_soon))

            self._changed.wait_for(is_enough, None if is_held else HOLD)

    def close(self) -> None:
        """Ends when everything is done."""
        with self._changed:
            self._is_closed = True
            self._wake()
        for thread in self._threads:
            thread.join()

    def _seconds(self, tokens: int) -> float:
        return tokens / (self._rate * self._count)

    def _run(self, lane: Lane) -> None:
        while micro_batch := self._next():
            try:
                self._compute(lane, micro_batch)
            except Exception as error:
                # The thread is still there for the others.
                pb_utils.Logger.log_error(f"a micro-batch was lost: {error}")
            with self._changed:
                self._tokens -= sum(one.length for one in micro_batch)
                self._changed.notify()

    def _compute(self, lane: Lane, micro_batch: Sequence[Waiting]) -> None:
        awaited = [one for one in micro_batch if one.batch.is_awaited(one.item)]
        for one in micro_batch:
            if one not in awaited:
                one.batch.abandon(one.item)
        if not awaited:
            self._free()
            return
        for one in awaited:
            one.batch.begin(one.item)
        started = time.monotonic()
        seconds = math.inf

        def encoded() -> None:
            nonlocal seconds
            seconds = time.monotonic() - started
            self._free()

        results = _results(lane, [one.item for one in awaited], encoded)
        if not isinstance(results[0], Exception):
            rate = sum(one.length for one in awaited) / seconds
            self._rate += SMOOTHING * (rate - self._rate)
        for one, result in zip(awaited, results, strict=True):
            settle(one.batch, one.item, result)

    def _free(self) -> None:
        """A stream is free."""
        with self._changed:
            self._encoding -= 1
            self._wake()

    def _wake(self) -> None:
        """Where a stream is free, has one lane look for work, since all would take turns at Python's lock.

        Where nothing waits, Triton is to bring some.
        """
        if self._is_closed:
            self._can_begin.notify_all()
        elif self._encoding < self._count:
            (self._can_begin if self._waiting else self._changed).notify()

    def _next(self) -> list[Waiting]:
        """The next micro-batch, once a stream is free for it; [] where there will be none."""
        with self._can_begin:
            while not (self._waiting and self._encoding < self._count):
                if self._is_closed and not self._waiting:
                    return []
                self._can_begin.wait()
            self._encoding += 1
            micro_batch = self._cut()
            self._wake()
            return micro_batch

    def _cut(self) -> list[Waiting]:
        """Takes out the most urgent item, and those nearest in length that fit beside it."""
        waiting = self._waiting
        first = min(range(len(waiting)), key=lambda i: waiting[i].urgency)
        start, stop, tokens = first, first + 1, waiting[first].length
        while neighbours := [i for i in (start - 1, stop) if 0 <= i < len(waiting)]:
            nearest = min(neighbours, key=lambda i: abs(waiting[i].length - waiting[first].length))
            lower, upper = min(start, nearest), max(stop, nearest + 1)
            tokens += waiting[nearest].length
            if not _fit(waiting[lower], waiting[upper - 1], tokens, self._budget, self._spread):
                break
            start, stop = lower, upper
        micro_batch = waiting[start:stop]
        del waiting[start:stop]
        return micro_batch


def _results(lane: Lane, items: Sequence[Item], encoded: Callable[[], None] | None = None) -> list[Result]:
    """What a lane makes of items; ends the process where the engine is lost."""
    try:
        return lane.run(items, encoded)
    except EngineLostError as error:
        end_process(error)


def settle(batch: Batch, item: Item, result: Result) -> None:
    """Gives a batch what has come of an item of it."""
    if isinstance(result, Exception):
        batch.fail(item, cause(result))
    else:
        batch.give(item, result)


def _is_scarce() -> bool:
    """Whether little shared memory is left."""
    shared = os.statvfs(SHARED_MEMORY)
    return shared.f_bavail * shared.f_frsize < ENOUGH


def cause(error: Exception) -> str:
    """The engine's message in one line, without the places in its sources, which come first."""
    return textwrap.shorten(PLACES.sub("", str(error)), 300, placeholder=" …")


def micro_batches(items: Sequence[Item], budget: int, spread: float) -> Iterator[list[Item]]:
    """Items by length, cut where the next is over the budget of tokens or much wider; no item is ever cut."""
    batch: list[Item] = []
    tokens = 0
    for item in sorted(items, key=_length):
        if batch and not _fit(batch[0], item, tokens + item.length, budget, spread):
            yield batch
            batch, tokens = [], 0
        batch.append(item)
        tokens += item.length
    if batch:
        yield batch


def _fit(shortest: Item | Waiting, longest: Item | Waiting, tokens: int, budget: int, spread: float) -> bool:
    """Whether a micro-batch may have so many tokens, and rows so unlike."""
    return tokens <= budget and _width(longest) <= spread * _width(shortest)


def _length(one: Item | Waiting) -> int:
    return one.length


def _width(one: Item | Waiting) -> int:
    """Columns that the graph gives the item alone: it rounds rows up to 16."""
    return -(-one.length // 16) * 16


def _run(request: ov.InferRequest, ports: Ports, feeds: Mapping[str, ov.Tensor]) -> None:
    for port, names in ports:
        request.set_tensor(port, next(feeds[name] for name in names if name in feeds))
    try:
        request.start_async()
        request.wait()
    except Exception as error:
        raise EngineLostError(cause(error)) from None
