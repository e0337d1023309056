"""Who may wait: two queues of calls, each bounded in tokens, that know how fast they empty.

Calls of one Triton request and calls that are split into several have a lane each, with requests of their own at
Triton: a bulk load delays the others by its few requests there and takes none of their places in the queue.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from tools.shim.errors import overloaded
from tools.shim.schedule import Tensors

UNMEASURED_TOKENS = 2**18
"""Tokens that may queue before the lane's rate is known."""

BYTES_PER_TOKEN = 4
"""Bytes of UTF-8 for each token, about; corrected by what Triton counts."""

BYTES_READ_PER_TOKEN = 4096
"""Bytes that travel and are tokenized in about the time that an encoder takes for a token."""

MEASURED_SECONDS = (0.5, 5.0)
"""Seconds of work that a rate is taken over: at least, at most."""


class Work(NamedTuple):
    """What some texts cost, in tokens."""

    tokens: float
    """Tokens of their rows, estimated."""
    reading: float
    """Time to read all of their bytes, those beyond the window included, counted in tokens."""

    @classmethod
    def of(cls, sizes: Sequence[int], max_tokens: int) -> Work:
        """Texts of so many bytes, for a model that reads so many tokens."""
        tokens = sum([min(max_tokens, 2 + size // BYTES_PER_TOKEN) for size in sizes])
        return cls(tokens, sum(sizes) / BYTES_READ_PER_TOKEN)

    @property
    def cost(self) -> float:
        """Tokens in all."""
        return self.tokens + self.reading


@dataclass
class Place:
    """One call in a lane."""

    cost: float
    """Tokens of the requests that are not answered."""


@dataclass
class Lane:
    """A queue of calls that take turns, request by request."""

    requests: int
    """Requests that may be under way at Triton at once."""
    seconds: float
    """How much work may be ahead of a call that is let in."""
    unmeasured: int = UNMEASURED_TOKENS
    """Tokens that may be ahead of one while it is not known how long they take."""
    cost: float = 0.0
    """Tokens of all calls in the lane."""
    correction: float = 1.0
    """Tokens that Triton counts for each that is estimated."""
    slots: asyncio.Semaphore = field(init=False)
    there: int = 0
    """Requests under way and those that wait for their turn."""
    counted: float = 0.0
    busy: float = 0.0
    """Seconds in which `counted` tokens were answered while every slot was taken: an idle server has no rate."""
    noted: float = 0.0
    was_full: bool = False

    def __post_init__(self) -> None:
        self.slots = asyncio.Semaphore(self.requests)

    def shared(self, workers: int) -> Lane:
        """One like it for each of so many processes, of two requests at least; time is what it is for all."""
        return Lane(max(2, self.requests // workers), self.seconds, unmeasured=self.unmeasured // workers)

    @property
    def is_full(self) -> bool:
        """Whether another request would have to wait."""
        return self.there >= self.requests

    @property
    def rate(self) -> float:
        """Tokens a second that Triton answers when the lane is full; 0 until that has been seen."""
        return self.counted / self.busy if self.busy > MEASURED_SECONDS[0] else 0.0

    @contextmanager
    def admitted(self, work: Work, seconds: float) -> Iterator[Place]:
        """A place for a call of any size that has `seconds` left; raises GatewayError 429 where there is none.

        There is none while the work ahead would take longer than the lane allows, or leave the call too little.
        """
        if self.is_full:
            ahead, own, rate = self.cost * self.correction, work.cost * self.correction, self.rate
            most = min(rate * self.seconds, rate * seconds - own) if rate else self.unmeasured
            if ahead >= most:
                wait = max(1, math.ceil((ahead - max(most, 0)) / rate)) if rate else 1
                known = f", {math.ceil(ahead / rate)} s of work," if rate else ""
                message = f"{ahead:.0f} tokens{known} are ahead of this call: there may be room for it in {wait} s"
                raise overloaded(message, wait)
        place = Place(work.cost)
        self.cost += work.cost
        try:
            yield place
        finally:
            self.cost -= place.cost

    async def run(self, place: Place, work: Work, infer: Callable[[], Awaitable[Tensors]]) -> Tensors:
        """Sends one request of a call when its turn comes."""
        self.there += 1
        try:
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
        finally:
            self.there -= 1

    def _note(self, counted: float) -> None:
        """Takes the time since the last request ended into the rate, where the lane was full all the while."""
        now, full = time.monotonic(), self.is_full
        if full and self.was_full and counted:
            self.busy += now - self.noted
            self.counted += counted
        if self.busy > MEASURED_SECONDS[1]:
            self.busy, self.counted = self.busy / 2, self.counted / 2
        self.noted, self.was_full = now, full
