"""A family with all that is known of it: its build, what it takes, who waits for it, why it cannot come."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

from tools.shim.errors import GatewayError, not_ready
from tools.shim.residency.families import Family, families, fingerprint, hint
from tools.shim.residency.rules import FamilyUse, State

log = logging.getLogger(__name__)

FAILED_SECONDS = (2.0, 60.0)
"""Seconds after a load that failed until it may be tried again: at first, doubled each time, and at most."""


class ModelStatus(TypedDict):
    """What is known of a model in memory: of all together that share its steps."""

    state: State
    bytes: int
    """Bytes that its family takes, or is estimated to take."""
    bytes_are: Literal["measured", "estimated"]
    pinned: bool
    seconds_since_call: float | None
    calls_in_flight: int
    waiting: int
    """Calls that wait for it to be loaded."""
    loads: int
    load_seconds: float
    """Seconds that the last load took."""
    evictions: int
    cause: str | None
    """Why it could not be loaded."""


@dataclass
class Tracked(FamilyUse):
    """A family with what the loader knows of it besides."""

    build: str = ""
    """Fingerprint of the build that `size` and `peak` are of."""
    peak: int = 0
    """The most bytes that it took."""
    waiters: dict[asyncio.Future[None], float] = field(default_factory=dict)
    """Calls that wait for it -> when each gives up."""
    cause: str = ""
    """Why it could not be loaded."""
    failures: int = 0
    """Loads that failed since the last one that did not."""
    failing: dict[str, str] = field(default_factory=dict)
    """Ensembles of it that could not be loaded, where others could -> why."""
    loads: int = 0
    """Loads, whoever asked for them: at the start it is Triton's command line."""
    timed: int = 0
    """Loads that were asked for here."""
    loading: float = 0.0
    """Seconds that these took together."""
    evictions: Counter[str] = field(default_factory=Counter)
    preload: bool = False
    was_unloaded: bool = False
    """Whether it was unloaded by request, and has not been there since."""
    computes_in: str | None = None
    """A precision, where its encoder tells one."""

    @classmethod
    def of(
        cls,
        repository: Path,
        family: Family,
        preload: Collection[str],
        pinned: Collection[str],
        causes: Mapping[str, str],
    ) -> Tracked:
        """A family of a repository that is not there yet: wanted where it is to be from the start and can be."""
        known = hint(repository, family)
        one = cls(family, known or family.estimate, known is not None)
        one.build = fingerprint(repository, family)
        one.pinned = not {*pinned}.isdisjoint(family.ensembles)
        one.preload = one.pinned or not {*preload}.isdisjoint(family.ensembles)
        one.failing = {name: causes[name] for name in family.ensembles if name in causes}
        if len(one.failing) == len(family.ensembles):
            one.cause, one.failing = one.failing[family.name], {}
        one.wanted, one.asked = one.preload and not one.cause, time.monotonic()
        return one

    @property
    def models(self) -> tuple[str, ...]:
        """Ensembles and steps, as they are unloaded."""
        return (*self.family.ensembles, *self.family.steps)

    def renew(self, repository: Path) -> str:
        """Forgets what is known of an older build of a family that is not there; returns which one it is now."""
        build = fingerprint(repository, self.family)
        if build and build != self.build:
            self.build = build
            with suppress(ValueError):  # what it shares steps with has changed: the next start sees that
                (self.family,) = families(repository, self.family.ensembles)
            known = hint(repository, self.family)
            self.size, self.peak, self.is_measured = known or self.family.estimate, 0, known is not None
            if self.retry < math.inf:
                self.retry, self.failures, self.cause = -math.inf, 0, ""
        return build

    def count_waiters(self) -> None:
        """Has the rules see who waits now."""
        self.waiting, self.deadline = len(self.waiters), min(self.waiters.values(), default=math.inf)
        if not self.waiters and not self.wanted:
            self.asked = math.inf

    def arrive(self, keep_alive: float) -> None:
        """Notes that the family is there, from now on, and goes `keep_alive` seconds after its last call."""
        self.state, self.loads, self.was_unloaded = "loaded", self.loads + 1, False
        self.loaded = self.used = time.monotonic()
        self.expires = self.used + keep_alive

    def grant(self) -> None:
        """Lets all in who wait for the family, which is there."""
        self.wanted, self.asked = False, math.inf
        self.retry, self.failures, self.cause = -math.inf, 0, ""
        for future in self.waiters:
            if not future.done():
                self.calls += 1
                future.set_result(None)

    def give_up(self, why: Callable[[], GatewayError]) -> None:
        """Ends the wait for the family, which will not come."""
        self.wanted, self.asked = False, math.inf
        self.turn_away(why)

    def turn_away(self, why: Callable[[], GatewayError]) -> None:
        """Ends the calls that wait for the family."""
        for future in self.waiters:
            if not future.done():
                future.set_exception(why())

    def fail(self, cause: str, seconds: float) -> None:
        """Turns all away who wait for the family: it cannot be loaded, and is not tried again before `seconds`."""
        self.state, self.unwanted = "absent", False
        self.cause, self.retry = cause, time.monotonic() + seconds
        self.give_up(self.failed)
        log.error("%s cannot be loaded: %s", self.family.name, cause)

    def failed(self) -> GatewayError:
        """503: the family could not be loaded."""
        after = min(FAILED_SECONDS[1], self.retry - time.monotonic())
        return not_ready(f"Triton cannot serve {self.family.name}: {self.cause}", after)

    def measure(self, memory: Mapping[tuple[str, str], int]) -> None:
        """Notes what the family takes, by the bytes that each model holds as `process` or `gpu`."""
        kind = "gpu" if self.family.on_gpu else "process"
        sizes = [memory.get((step, kind), 0) for step in self.family.steps]
        if sum(sizes) and (self.family.on_gpu or all(sizes)):
            self.size, self.is_measured = sum(sizes), True
            self.peak = max(self.peak, self.size)

    def describe(self, ensemble: str) -> ModelStatus:
        """One of its ensembles as operators want to know of it."""
        now = time.monotonic()
        return {
            "state": "absent" if ensemble in self.failing else self.state,
            "bytes": self.size,
            "bytes_are": "measured" if self.is_measured else "estimated",
            "pinned": self.pinned,
            "seconds_since_call": round(now - self.used, 1) if self.used > 0 else None,
            "calls_in_flight": self.calls,
            "waiting": self.waiting,
            "loads": self.loads,
            "load_seconds": round(self.load_seconds, 2),
            "evictions": sum(self.evictions.values()) - self.evictions["asked"],
            "cause": self.failing.get(ensemble) or self.cause or None,
        }
