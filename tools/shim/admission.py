"""Who may wait: two queues of calls, each bounded in tokens, that know how fast they empty.

Calls of one Triton request and calls that are split into several have a lane each, with requests of their own at
Triton: a bulk load delays the others by its few requests there and takes none of their places in the queue.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tools.shim.errors import overloaded
from tools.shim.schedule import Tensors

UNMEASURED_TOKENS = 2**18
"""Tokens that may queue before the lane's rate is known."""

BYTES_PER_TOKEN = 4
"""Of UTF-8, about; corrected by what Triton counts."""

BYTES_READ_PER_TOKEN = 4096
"""That travel and are read by the tokenizer in about the time that an encoder takes for a token."""

MEASURED_SECONDS = (0.5, 5.0)
"""Of work, that a rate is taken over: at least, at most."""


@dataclass(frozen=True)
class Work:
    """What some texts cost, in tokens."""

    tokens: float = 0.0
    """Of their rows, estimated."""
    reading: float = 0.0
    """For all of their bytes, those beyond the window included."""

    @classmethod
    def of(cls, size: int, max_tokens: int) -> Work:
        """One text of so many bytes, for a model that reads so many tokens."""
        return cls(min(max_tokens, 2 + size // BYTES_PER_TOKEN), size / BYTES_READ_PER_TOKEN)

    @property
    def cost(self) -> float:
        """In all."""
        return self.tokens + self.reading

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.reading + other.reading)


@dataclass
class Place:
    """One call in a lane."""

    cost: float
    """Of the requests that are not answered."""


@dataclass
class Lane:
    """A queue of calls that take turns, request by request."""

    requests: int
    """Under way at Triton at once."""
    seconds: float
    """How much work may be ahead of a call that is let in."""
    cost: float = 0.0
    """Of all calls in the lane."""
    correction: float = 1.0
    """Tokens that Triton counts for each that is estimated."""
    slots: asyncio.Semaphore = field(init=False)
    counted: float = 0.0
    busy: float = 0.0
    """Seconds in which `counted` tokens were answered while every slot was taken: an idle server has no rate."""
    noted: float = 0.0
    was_full: bool = False

    def __post_init__(self) -> None:
        self.slots = asyncio.Semaphore(self.requests)

    @property
    def rate(self) -> float:
        """Tokens a second that Triton answers when the lane is full; 0 until that has been seen."""
        return self.counted / self.busy if self.busy > MEASURED_SECONDS[0] else 0.0

    @contextmanager
    def admitted(self, work: Work, seconds: float) -> Iterator[Place]:
        """A place for a call of any size that has `seconds` left; raises GatewayError 429 where there is none.

        There is none while the work ahead would take longer than the lane allows, or leave the call too little.
        """
        if self.slots.locked():
            ahead, own, rate = self.cost * self.correction, work.cost * self.correction, self.rate
            most = min(rate * self.seconds, rate * seconds - own) if rate else UNMEASURED_TOKENS
            if ahead >= most:
                wait = max(1, math.ceil((ahead - max(most, 0)) / rate)) if rate else 1
                raise overloaded(f"{ahead:.0f} tokens are ahead of this call: try again in {wait} s", wait)
        place = Place(work.cost)
        self.cost += work.cost
        try:
            yield place
        finally:
            self.cost -= place.cost

    async def run(self, place: Place, work: Work, infer: Callable[[], Awaitable[Tensors]]) -> Tensors:
        """Sends one request of a call when its turn comes."""
        async with self.slots:
            counted = 0.0
            try:
                answer = await infer()
                tokens = int(answer["token_count"].sum())
                counted = tokens + work.reading
                place.cost -= work.cost
                self.cost -= work.cost
                self.correction += (tokens / work.tokens - self.correction) / 16
                return answer
            finally:
                self._note(counted)

    def _note(self, counted: float) -> None:
        """Takes the time since the last request ended into the rate, where the lane was full all the while."""
        now, full = time.monotonic(), self.slots.locked()
        if full and self.was_full and counted:
            self.busy += now - self.noted
            self.counted += counted
        if self.busy > MEASURED_SECONDS[1]:
            self.busy, self.counted = self.busy / 2, self.counted / 2
        self.noted, self.was_full = now, full
