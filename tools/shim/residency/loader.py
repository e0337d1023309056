"""Keeps in Triton's memory what is called: loads a family at its first call and lets others go, by `rules.py`."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from tritonclient.utils import InferenceServerException

from tools.shim.errors import GatewayError, not_ready, overloaded, too_big
from tools.shim.residency.control import Control, StuckError, lacks_memory, states_of
from tools.shim.residency.families import Family, fingerprint, keep_hint, shown
from tools.shim.residency.rules import (
    LOW,
    Drain,
    Keep,
    Load,
    Unload,
    Wait,
    fits,
    idle,
    next_step,
    taken,
)
from tools.shim.residency.tracked import FAILED_SECONDS, ModelStatus, Tracked

LOOK_SECONDS = 2.0
"""Seconds between two looks at what Triton has loaded, which others may do too, and at what that takes."""

MOST_WAITING = 256
"""Calls that may wait for one family to be loaded."""

EARLY_SECONDS = 0.5
"""Seconds before its deadline at which a call is told that its model will not come in time."""

AWAY_SECONDS = 0.5
"""Seconds after which a Triton is asked again that did not answer."""

ATTEMPTS = 3
"""Times that a family is loaded which is built anew meanwhile."""

log = logging.getLogger(__name__)


class Residency:
    """What one Triton has loaded of a repository. Use it as an async context manager."""

    def __init__(
        self,
        control: Control,
        repository: Path,
        families: Sequence[Family],
        budget: int,
        preload: Collection[str] = (),
        pinned: Collection[str] = (),
        keep_alive: float = math.inf,
        causes: Mapping[str, str] = {},
        explain: Callable[[str], str | None] | None = None,
        lost: Collection[str] = (),
    ) -> None:
        """Of `families`, those with an ensemble in `preload` at once and those in `pinned` for good.

        All together may take `budget` bytes; one that nobody calls goes after `keep_alive` seconds. `causes` says
        of those that could not be loaded before why, and `explain` of an ensemble that now cannot. Models whose
        process died while they were loaded come to be in `lost`.
        """
        self._lost_models = lost
        self._explain = explain
        self.budget = budget
        self._control = control
        self.repository = repository
        self._keep_alive = keep_alive
        self.families = [Tracked.of(repository, family, preload, pinned, causes) for family in families]
        self._of = {name: one for one in self.families for name in one.family.ensembles}
        self._changed = asyncio.Event()
        self._is_over = False
        self._away = ""
        """Why Triton does not say what it has."""
        self._looked = -math.inf
        self._worker: asyncio.Task[None] | None = None
        self._looking = asyncio.Lock()

    async def __aenter__(self) -> Residency:
        await self._control.__aenter__()
        try:
            await self.look()
        except InferenceServerException as error:  # it may come later
            self._away = str(error.message())
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *raised: object) -> None:
        assert self._worker is not None
        self._worker.cancel()
        with suppress(asyncio.CancelledError):
            await self._worker
        await self._control.__aexit__(*raised)

    def is_loaded(self, ensemble: str) -> bool:
        """Whether it takes calls now."""
        one = self._of[ensemble]
        return one.state == "loaded" and ensemble not in one.failing

    def computes_in(self, ensemble: str) -> str | None:
        """What its encoder computed in when it was loaded last; None where it does not tell."""
        return self._of[ensemble].computes_in

    def counts(self, ensemble: str) -> bool:
        """Whether it has a say in how the server is: it is there, or is to be from the start and is not.

        What nobody calls, or what makes room for others, may go.
        """
        one = self._of[ensemble]
        is_missed = one.cause or one.wanted or one.was_unloaded or one.state == "loading"
        return one.state == "loaded" or (one.preload and bool(is_missed))

    def problem(self, ensemble: str) -> str:
        """Why one that counts is not there."""
        one = self._of[ensemble]
        if one.was_unloaded and one.state == "absent" and not one.cause:
            return f"it was unloaded: POST /models/{ensemble}/load loads it, and so does its next call"
        return one.failing.get(ensemble) or one.cause or "it is being loaded"

    @asynccontextmanager
    async def use(self, ensemble: str, seconds: float, keep_alive: float | None = None) -> AsyncIterator[float]:
        """Has a model loaded for as long as the context lasts; yields the seconds that this took.

        Raises GatewayError 503 where it is not there within `seconds`, or cannot be loaded, and 507 where there is
        no room for it whoever goes. The model then stays for `keep_alive` seconds, or the server's.
        """
        one, started = self._of[ensemble], time.monotonic()
        if one.state == "loaded":
            one.calls += 1
        else:
            await self._wait(one, seconds)  # which counts the call
        keep = self._keep_alive if keep_alive is None else keep_alive
        try:
            if ensemble in one.failing:
                raise not_ready(f"Triton cannot serve {ensemble}: {one.failing[ensemble]}")
            yield time.monotonic() - started
        finally:
            one.calls -= 1
            one.used = time.monotonic()
            one.expires = one.used + keep
            if one.calls == 0:
                self._changed.set()

    async def reload(self, ensemble: str, seconds: float) -> None:
        """Has a model loaded again that Triton does not have, though it was thought to be there."""
        one = self._of[ensemble]
        await self.look()
        if one.state not in ("loaded", "draining"):
            await self._wait(one, seconds)
            one.calls -= 1  # the caller's own is counted already

    async def load(self, ensemble: str, seconds: float) -> None:
        """Loads a model for whom no call waits; raises GatewayError as `use` does."""
        async with self.use(ensemble, seconds):
            pass

    async def unload(self, ensemble: str, seconds: float) -> None:
        """Unloads a model as soon as no call to it is under way; raises GatewayError 503 after `seconds`."""
        one = self._of[ensemble]
        gone, until = one.evictions["asked"], time.monotonic() + seconds - EARLY_SECONDS
        one.wanted, one.unwanted = False, one.state != "absent"
        self._count(one)
        while one.state != "absent" and one.evictions["asked"] == gone:
            if time.monotonic() > until:
                raise not_ready(f"{ensemble} still has {one.calls} calls under way: it is unloaded after them", 1)
            await asyncio.sleep(0.05)

    def pin(self, ensemble: str, pinned: bool) -> None:
        """Keeps a model for good, or no longer; raises GatewayError 507 where no room would be left for it."""
        one = self._of[ensemble]
        if pinned and not fits(one, self.families, self.budget):
            raise self._too_big(one)
        one.pinned = pinned
        self._changed.set()

    def describe(self, ensemble: str) -> ModelStatus:
        """A model's family, as operators want to know of it."""
        return self._of[ensemble].describe(ensemble)

    async def _wait(self, one: Tracked, seconds: float) -> None:
        """Waits until a family is loaded, and counts a call to it."""
        now = time.monotonic()
        if self._away:
            raise self._unreachable()
        if one.state == "absent":
            one.renew(self.repository)
            if now < one.retry:
                raise one.failed()
            if not fits(one, self.families, self.budget):
                raise self._too_big(one)
        if one.waiting >= MOST_WAITING:
            raise overloaded(
                f"{one.waiting} calls already wait until {one.family.name} is loaded", self._seconds_to_load(one)
            )
        patience = seconds - min(EARLY_SECONDS, seconds / 10)
        if one.timed and self._seconds_to_load(one) > seconds:
            one.wanted, one.asked = True, min(one.asked, now)
            self._changed.set()
            raise self._late(one)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        one.waiters[future] = now + patience
        one.asked = min(one.asked, now)
        self._count(one)
        try:
            await asyncio.wait((future,), timeout=patience)
            one.wanted |= not future.done()  # who comes again will find it
        except asyncio.CancelledError:
            if future.done() and future.exception() is None:
                one.calls -= 1  # it came as its caller went
            raise
        finally:
            del one.waiters[future]
            self._count(one)
        if not future.done():
            raise self._late(one)
        future.result()

    def _count(self, one: Tracked) -> None:
        """Has the rules see who waits now, and the worker look at them."""
        one.count_waiters()
        self._changed.set()

    def _seconds_to_load(self, one: Tracked) -> float:
        """Until a family may be there, by what those before it took the last time."""
        before = [other for other in self.families if other.asked < one.asked and other is not one]
        return sum(max(1.0, other.load_seconds) for other in (*before, one))

    def _unreachable(self) -> GatewayError:
        return not_ready(f"Triton cannot answer now: {self._away}")

    def _late(self, one: Tracked) -> GatewayError:
        return not_ready(
            f"{one.family.name} is not loaded yet: try again, or give the call more time",
            self._seconds_to_load(one),
        )

    def _too_big(self, one: Tracked) -> GatewayError:
        pinned = sum(other.size for other in self.families if other.pinned and other is not one)
        return too_big(
            f"{one.family.name} takes {shown(one.size)}; of the {shown(self.budget)} for models only "
            f"{shown(max(0, self.budget - pinned))} are not pinned: "
            + ("unpin another, or " if pinned else "")
            + "give models more by --memory, or build it in a smaller precision"
        )

    async def _work(self) -> None:
        """Does one thing after another, for good."""
        while True:
            try:
                await self._step()
            except InferenceServerException as error:
                self._away = str(error.message())
                for one in self.families:
                    one.turn_away(self._unreachable)
                await asyncio.sleep(AWAY_SECONDS)
            except Exception:
                log.exception("models cannot be loaded or unloaded")
                await asyncio.sleep(LOOK_SECONDS)

    async def _step(self) -> None:
        """Does what is to be done now; raises InferenceServerException where Triton does not answer."""
        self._changed.clear()
        now = time.monotonic()
        if self._away or now - self._looked > LOOK_SECONDS:
            await self.look()
        self._turn_away_what_never_fits()
        total = taken(self.families)
        self._is_over = total > (LOW * self.budget if self._is_over else self.budget)
        match next_step(self.families, self.budget, self._is_over, now):
            case Load(Tracked() as one):
                await self._load(one)
            case Unload(Tracked() as one, reason):
                await self._unload(one, reason)
            case Drain(one):
                one.state = "draining"
            case Keep(Tracked() as one):
                one.state = "loaded"
                one.grant()
            case Wait(seconds):
                left = min(seconds, self._looked + LOOK_SECONDS - now)
                changed = asyncio.create_task(self._changed.wait())
                try:  # not wait_for, which may keep a cancellation to itself before Python 3.12
                    await asyncio.wait((changed,), timeout=max(0.01, left))
                finally:
                    changed.cancel()

    def _turn_away_what_never_fits(self) -> None:
        """As `_wait` does, of what has been measured since, or beside what has been pinned since."""
        for one in self.families:
            is_asked = one.state == "absent" and (one.wanted or one.waiters)
            if is_asked and not fits(one, self.families, self.budget):
                one.cause = self._too_big(one).message
                one.give_up(partial(self._too_big, one))

    async def _load(self, one: Tracked) -> None:
        started = time.monotonic()
        one.state = "loading"
        try:
            try:
                await self._bring(one)
            except InferenceServerException as error:
                victim = next(iter(idle(self.families)), None)
                if victim is None or not lacks_memory(error):
                    raise
                await self._unload(victim, "memory")
                await self._bring(one)
        except StuckError as error:
            one.fail(str(error), math.inf)
            return
        except Exception as error:
            one.failures += 1
            first, most = FAILED_SECONDS
            one.fail(self._why(one.family.name, error), min(most, first * 2 ** (one.failures - 1)))
            return
        one.arrive(self._keep_alive)
        one.load_seconds, one.timed = one.loaded - started, one.timed + 1
        one.loading += one.load_seconds
        with suppress(InferenceServerException):
            await self.look()
        one.grant()
        log.info("%s: loaded in %.1f s, takes %s", one.family.name, one.load_seconds, shown(one.size))

    def _why(self, name: str, error: Exception) -> str:
        """What a load failed for."""
        if not isinstance(error, InferenceServerException):
            log.error("%s cannot be loaded", name, exc_info=error)
            return f"the gateway failed; see its log: {error}"
        said = str(error.message()).partition("\n\nAt:")[0].strip()
        with suppress(OSError):  # the log may be gone
            return (self._explain and self._explain(name)) or said
        return said

    async def _bring(self, one: Tracked) -> None:
        """Has Triton load a family whole, as one build wrote it; raises as `Control.load` does."""
        for _ in range(ATTEMPTS):
            before = one.renew(self.repository)
            errors = await self._control.load(one.family.ensembles, one.family.steps, self._lost_models)
            one.failing = {name: self._why(name, error) for name, error in errors.items()}
            for name, cause in one.failing.items():
                log.error("%s cannot be loaded: %s", name, cause)
            if fingerprint(self.repository, one.family) == before:
                return
        raise InferenceServerException(f"{one.family.name} is being built again and again")

    async def _unload(self, one: Tracked, reason: str) -> None:
        one.state = "draining"
        try:
            await self._control.unload(one.models)
        except InferenceServerException as error:
            log.error("%s cannot be unloaded: %s", one.family.name, error.message())
            await asyncio.sleep(LOOK_SECONDS)  # it is looked at again
            return
        if one.is_measured:
            one.size = one.peak
            keep_hint(self.repository, one.family, one.build, one.peak)
        numbers = f": models took {shown(taken(self.families))} of {shown(self.budget)}, which --memory may raise"
        one.state, one.unwanted = "absent", False
        one.evictions[reason] += 1
        one.was_unloaded = reason == "asked"
        log.info(
            "%s: unloaded (%s%s)", one.family.name, reason.replace("_", " "), numbers if reason == "memory" else ""
        )

    async def look(self) -> None:
        """Sees what Triton has, whoever loaded or unloaded it, and what that takes.

        Raises InferenceServerException where Triton does not say.
        """
        async with self._looking:
            self._looked = time.monotonic()
            states = await self._control.states()
            self._away = ""
            told = await self._control.told()
            for one in self.families:
                one.failing = {n: why for n, why in one.failing.items() if states.get(n) != "READY"}
                sound = [name for name in one.family.ensembles if name not in one.failing]
                is_there = states_of(states, sound) == {"READY"}
                if one.retry == math.inf and "LOADING" not in states_of(states, one.family.steps):
                    one.retry = -math.inf  # Triton has got over it, or is another one
                if one.state == "absent" and is_there:
                    one.renew(self.repository)
                    one.arrive(self._keep_alive)
                    one.grant()
                elif one.state in ("loaded", "draining") and not is_there:
                    one.state, one.unwanted = "absent", False
                    one.wanted |= one.preload and not states  # Triton has been started again
                if one.state != "absent":
                    one.measure(told.memory)
                    one.computes_in = next(
                        (told.precisions[step] for step in one.family.steps if step in told.precisions), None
                    )
