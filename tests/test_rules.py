"""The rules of what stays in memory, each on the numbers that it speaks of."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from tools.shim.residency.families import Family
from tools.shim.residency.rules import (
    LOW,
    RESIDENCE,
    Drain,
    FamilyUse,
    Keep,
    Load,
    Unload,
    Wait,
    fits,
    next_step,
    taken,
)

NOW = 1000.0


def one(name: str, size: int = 10, **fields: Any) -> FamilyUse:
    """A family of the size; one that is there has been there for long."""
    there = {"loaded": 0.0, "used": 0.0} if fields.get("state", "absent") != "absent" else {}
    return FamilyUse(Family((name,), (f"{name}-encoder",), False, size), size, **(there | fields))


def loaded(name: str, used: float = 0.0, **fields: Any) -> FamilyUse:
    return one(name, state="loaded", used=used, **fields)


def called(name: str, asked: float = NOW, **fields: Any) -> FamilyUse:
    """One that a call waits for, and does so for long."""
    return one(name, waiting=1, asked=asked, deadline=NOW + 100, **fields)


def test_what_fits_is_loaded() -> None:
    new = called("new")
    assert next_step([loaded("a"), new], 20, False, NOW) == Load(new)


def test_the_least_recently_used_makes_room() -> None:
    old, young, new = loaded("old", 5), loaded("young", 6), called("new")
    assert next_step([young, old, new], 20, False, NOW) == Unload(old, "room")


def test_who_has_waited_longest_comes_first() -> None:
    first, second = called("first", NOW - 2), called("second", NOW - 1)
    assert next_step([second, first], 20, False, NOW) == Load(first)
    # Though the other would fit, which would then take the room again and again.
    large, there = called("large", NOW - 3, size=15), loaded("there")
    assert next_step([second, large, there], 20, False, NOW) == Unload(there, "room")


def test_one_that_is_pinned_or_busy_never_goes() -> None:
    pinned, busy, new = loaded("pinned", pinned=True), loaded("busy", calls=1), called("new")
    assert isinstance(next_step([pinned, busy, new], 20, False, NOW), Drain)
    assert next_step([pinned, replace(busy, pinned=True), new], 20, False, NOW) == Wait()


def test_all_are_busy_so_the_longest_there_takes_no_more_calls() -> None:
    a, b, new = loaded("a", calls=2, loaded=1.0), loaded("b", calls=2, loaded=2.0), called("new")
    assert next_step([b, a, new], 20, False, NOW) == Drain(a)
    draining = replace(a, state="draining")
    assert next_step([b, draining, new], 20, False, NOW) == Wait()
    assert next_step([b, replace(draining, calls=0), new], 20, False, NOW) == Unload(
        replace(draining, calls=0), "turn"
    )


def test_a_turn_that_nobody_waits_for_any_more_is_not_ended() -> None:
    draining = loaded("a", calls=1)
    draining.state = "draining"
    assert next_step([draining, one("gone")], 10, False, NOW) == Keep(draining)


def test_one_that_has_just_come_stays_a_while() -> None:
    young, new = loaded("young", NOW, loaded=NOW - RESIDENCE / 2), called("new")
    assert next_step([young, new], 10, False, NOW) == Wait(RESIDENCE / 2)
    slow = replace(young, load_seconds=10 * RESIDENCE)
    assert next_step([slow, new], 10, False, NOW) == Wait(9.5 * RESIDENCE)
    settled = loaded("settled", NOW - 0.1, loaded=0.0)
    assert next_step([young, settled, new], 20, False, NOW) == Unload(settled, "room")
    # And is waited for, rather than that one goes which is called more often.
    young.used = NOW - 0.2
    assert next_step([young, settled, new], 20, False, NOW) == Wait(RESIDENCE / 2)


def test_unless_a_caller_would_not_be_answered_in_time() -> None:
    young, new = loaded("young", NOW, loaded=NOW - RESIDENCE / 2), called("new")
    new.deadline = NOW + RESIDENCE / 4
    assert next_step([young, new], 10, False, NOW) == Unload(young, "room")


def test_an_idle_one_that_is_young_is_waited_for_before_a_busy_one_is_ended() -> None:
    young, busy, new = loaded("young", loaded=NOW - 0.5), loaded("busy", calls=3), called("new")
    assert next_step([young, busy, new], 20, False, NOW) == Wait(RESIDENCE - 0.5)


def test_what_has_grown_past_the_budget_is_brought_down_to_less() -> None:
    a, b = loaded("a", 1, size=12), loaded("b", 2, size=9)
    assert next_step([a, b], 20, True, NOW) == Unload(a, "memory")
    assert next_step([b], 20, True, NOW) == Wait()
    almost = loaded("a", 1, size=10)
    assert taken([almost, b]) > LOW * 20
    assert next_step([almost, b], 20, True, NOW) == Unload(almost, "memory")
    assert next_step([almost, b], 20, False, NOW) == Wait()


def test_one_whose_time_is_over_goes() -> None:
    kept = loaded("a", expires=NOW + 5)
    assert next_step([kept], 20, False, NOW) == Wait(5)
    assert next_step([kept], 20, False, NOW + 5) == Unload(kept, "keep_alive")
    assert next_step([replace(kept, calls=1)], 20, False, NOW + 5) == Wait()
    assert next_step([replace(kept, pinned=True)], 20, False, NOW + 5) == Wait()


def test_one_that_an_operator_sends_away_goes_when_it_is_idle() -> None:
    sent = loaded("a", unwanted=True, calls=1)
    assert next_step([sent], 20, False, NOW) == Drain(sent)
    sent.state = "draining"
    assert next_step([sent], 20, False, NOW) == Wait()
    assert next_step([replace(sent, calls=0)], 20, False, NOW) == Unload(replace(sent, calls=0), "asked")


def test_a_load_that_failed_is_not_tried_again_at_once() -> None:
    failed, other = called("failed", NOW - 9, retry=NOW + 3), called("other")
    assert next_step([failed, other], 20, False, NOW) == Load(other)
    assert next_step([failed], 20, False, NOW) == Wait(3)
    assert next_step([failed], 20, False, NOW + 3) == Load(failed)


def test_one_that_can_never_fit_keeps_nobody_waiting() -> None:
    there, large, small = loaded("there"), called("large", NOW - 3, size=25), called("small", NOW - 1)
    assert next_step([there, large], 20, False, NOW) == Wait()
    assert next_step([there, large, small], 20, False, NOW) == Load(small)
    pinned = replace(there, pinned=True)
    assert next_step([pinned, called("half", size=11)], 20, False, NOW) == Wait()


def test_what_fits() -> None:
    pinned, new = loaded("pinned", pinned=True), one("new", 11)
    assert fits(new, [pinned, new], 21)
    assert not fits(new, [pinned, new], 20)
    assert fits(new, [loaded("other"), new], 20)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_called_the_budget_holds_and_everybody_is_served(seed: int) -> None:
    """A simulation: calls of random families, sizes and lengths; loads take time; none waits for ever."""
    draw = random.Random(seed)
    families = [one(str(i), draw.randrange(5, 30)) for i in range(12)]
    now, budget, waits = 0.0, 60, [0.0]
    ends: list[tuple[float, FamilyUse]] = []
    for _ in range(4000):
        now += 0.1
        for end, resident in [pair for pair in ends if pair[0] <= now]:
            ends.remove((end, resident))
            resident.calls -= 1
            resident.used = now
        if now < 300:
            resident = families[min(11, int(draw.paretovariate(1)) - 1)]
            if resident.state == "loaded":
                resident.calls += 1
                ends.append((now + draw.random(), resident))
            else:
                resident.waiting += 1
                resident.asked = min(resident.asked, now)
                resident.deadline = now + 120
        match next_step(families, budget, taken(families) > budget, now):
            case Load(resident):
                assert taken(families) + resident.size <= budget
                waits.append(now - resident.asked)
                now += 0.5
                resident.state, resident.loaded, resident.used, resident.load_seconds = "loaded", now, now, 0.5
                resident.calls += resident.waiting
                ends += [(now + draw.random(), resident)] * resident.waiting
                resident.waiting, resident.asked, resident.deadline = 0, math.inf, math.inf
            case Unload(resident, _):
                assert resident.calls == 0
                resident.state = "absent"
            case Drain(resident):
                resident.state = "draining"
            case Keep(resident):
                resident.state = "loaded"
            case Wait(seconds):
                assert seconds > 0
    assert not any(resident.waiting for resident in families)
    assert max(waits) < 60
