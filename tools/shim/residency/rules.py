"""The rules of what stays in memory, on one page, over numbers alone: they ask nobody and change nothing.

- A family is counted in bytes, as measured where it runs; before its first load, as estimated by its weights.
- Whoever has waited longest is loaded first, and nothing else is loaded or unloaded meanwhile. One that could not
  be there even alone with those that never go is not waited for.
- To make room, idle families go, the least recently used first. One that is pinned never goes.
- One that has just come stays for RESIDENCE seconds, or as long as its load took: else two that do not fit
  together would be loaded for a call each. It goes earlier only where a caller could not be answered in time.
- Where all are busy, the one that has been there longest takes no new calls, ends those under way and goes:
  families that do not fit together are served in turns.
- Where those that are loaded have grown past the budget, idle ones go until there is LOW of it left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from tools.shim.residency.families import Family

RESIDENCE = 2.0
"""Seconds that a family stays at least, once it is loaded."""

LOW = 0.9
"""Share of the budget down to which families go when it was passed."""

State = Literal["absent", "loading", "loaded", "draining"]
Reason = Literal["room", "turn", "memory", "keep_alive", "asked"]


@dataclass
class FamilyUse:
    """A family, and all that is known of how it is used. Times are of one clock, in seconds."""

    family: Family
    size: int
    """Bytes that the family takes, or is estimated to take."""
    is_measured: bool = False
    pinned: bool = False
    state: State = "absent"
    calls: int = 0
    """Calls under way."""
    waiting: int = 0
    """Calls that wait until it is loaded."""
    wanted: bool = False
    """Whether it is to be loaded though no call waits for it."""
    unwanted: bool = False
    """Whether it is to be unloaded as soon as it is idle."""
    asked: float = math.inf
    """Time since when somebody wants it."""
    deadline: float = math.inf
    """Time when the first of its waiting calls gives up."""
    used: float = -math.inf
    """Time of its last call."""
    loaded: float = -math.inf
    """Time since when it is there."""
    load_seconds: float = 0.0
    """Seconds that its last load took."""
    expires: float = math.inf
    """Time when it goes, if nobody has called it since."""
    retry: float = -math.inf
    """Time when a load that failed may be tried again."""

    @property
    def settled(self) -> float:
        """From when on it may make room for others."""
        return self.loaded + max(RESIDENCE, self.load_seconds)


@dataclass(frozen=True)
class Load:
    """Load one."""

    one: FamilyUse


@dataclass(frozen=True)
class Unload:
    """Unload one, which is idle."""

    one: FamilyUse
    reason: Reason


@dataclass(frozen=True)
class Drain:
    """Let no new call to one."""

    one: FamilyUse


@dataclass(frozen=True)
class Keep:
    """Let calls to one again that was draining."""

    one: FamilyUse


@dataclass(frozen=True)
class Wait:
    """Do nothing until something changes, or for so many seconds."""

    seconds: float = math.inf


Step: TypeAlias = "Load | Unload | Drain | Keep | Wait"


def taken(families: Iterable[FamilyUse]) -> int:
    """Bytes of all that is there."""
    return sum(one.size for one in families if one.state != "absent")


T = TypeVar("T", bound=FamilyUse)


def idle(families: Iterable[T]) -> list[T]:
    """Those that may go at once, the least recently used first."""
    there = (one for one in families if one.state == "loaded" and one.calls == 0 and not one.pinned)
    return sorted(there, key=lambda one: one.used)


def next_step(families: Collection[FamilyUse], budget: int, is_over: bool, now: float) -> Step:
    """What is to be done now; `is_over` while more than the `budget` is being brought down to LOW of it."""
    there = [one for one in families if one.state in ("loaded", "draining")]
    asked = [one for one in families if one.state == "absent" and (one.waiting or one.wanted) and now >= one.retry]
    queue = sorted((one for one in asked if fits(one, families, budget)), key=lambda one: one.asked)
    for one in there:
        if one.unwanted and one.calls == 0:
            return Unload(one, "asked")
        if one.unwanted and one.state == "loaded":
            return Drain(one)
        if one.state == "draining" and not one.unwanted:
            if not queue:
                return Keep(one)
            if one.calls == 0:
                return Unload(one, "turn")
    free = idle(there)
    for one in free:
        if now >= one.expires:
            return Unload(one, "keep_alive")
    if is_over and free and taken(families) > LOW * budget:
        return Unload(free[0], "memory")
    sleep = min((one.expires - now for one in free), default=math.inf)
    sleep = min([sleep, *(one.retry - now for one in families if one.retry > now)])
    if not queue:
        return Wait(sleep)
    if taken(families) + queue[0].size <= budget:
        return Load(queue[0])
    return _room(queue[0], there, free, now) or Wait(sleep)


def _room(one: FamilyUse, there: Sequence[FamilyUse], free: Sequence[FamilyUse], now: float) -> Step | None:
    """How one more comes to fit; None where only a call's end helps."""
    if free:
        # Not one that is called more often in place of one that has just come.
        oldest = free[0]
        if now >= oldest.settled or oldest.settled + one.load_seconds >= one.deadline:
            return Unload(oldest, "room")
        return Wait(oldest.settled - now)
    busy = [other for other in there if not other.pinned]
    if not busy or any(other.state == "draining" for other in busy):
        return None
    longest = min(busy, key=lambda other: other.settled)
    return Drain(longest) if now >= longest.settled else Wait(longest.settled - now)


def fits(one: FamilyUse, families: Iterable[FamilyUse], budget: int) -> bool:
    """Whether there could ever be room for one beside those that never go."""
    return one.size + sum(other.size for other in families if other.pinned and other is not one) <= budget
