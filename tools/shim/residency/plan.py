"""What of a repository is loaded when, by the options of a command."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from build import gpu
from build.config import read_config
from build.errors import BuildError
from build.memory import free_memory, total_memory
from build.tasks import DOCUMENT_TASKS, TASKS, Task
from tools.command import DEFAULT_MODELS, ServerError
from tools.repository import check_models
from tools.shim.residency.control import Control
from tools.shim.residency.families import Family, ensembles, families, hint, shown, task_of
from tools.shim.residency.loader import Residency

SHARE = 0.9
"""Share of the memory that is free at the start, for models."""


@dataclass(frozen=True)
class Plan:
    """What is loaded when."""

    repository: Path
    models: list[str]
    """All ensembles that callers may name; the first of a task answers calls that name none."""
    start: list[str]
    """Those that are loaded at once."""
    families: list[Family]
    preload: list[str]
    pinned: list[str]
    budget: int
    """Bytes for all that is loaded."""
    keep_alive: float

    @classmethod
    def of(cls, options: argparse.Namespace, repository: Path) -> Plan:
        """What the options say of a repository; raises ServerError for a model that it does not have."""
        first, models = [*options.pin, *options.preload], options.models
        preload = first or models
        if models is None:
            there = built(repository)
            # Documents and answers are only where they are asked for.
            tasks = [task for task in TASKS if task != "generate"]
            of_tasks = ([name for name in there if task_in(repository, name) == task] for task in tasks)
            preload = first or [names[0] for names in of_tasks if names]
            models = list(dict.fromkeys((*preload, *there)))
        models = list(dict.fromkeys((*models, *preload)))
        check_models(repository, models)
        found = families(repository, models)
        if options.models is None:
            models = [name for family in found for name in family.ensembles]
        on_gpu = any(family.on_gpu for family in found)
        free = gpu.room(gpu.cards()) if on_gpu else None
        budget = options.memory or int(SHARE * (free or free_memory()))
        sizes = {family: hint(repository, family) or family.estimate for family in found}
        start: list[str] = []
        left = budget
        wanted = [family for family in found if not set(preload).isdisjoint(family.ensembles)]
        for family in wanted:
            if sizes[family] <= left:
                left -= sizes[family]
                start += family.ensembles
        if options.memory and wanted and not start:
            least = min(wanted, key=sizes.__getitem__)
            raise ServerError(
                f"{least.name} takes {shown(sizes[least])}, and --memory gives models {shown(budget)}: give "
                "them more, or build it in a smaller precision"
            )
        start = start or list(found[0].ensembles)
        # Nobody here sees when those are called, so they do not make room for others by themselves.
        documents = [name for name in preload if task_in(repository, name) in DOCUMENT_TASKS]
        pinned = [*options.pin, *documents]
        return cls(repository, models, start, found, preload, pinned, budget, options.keep_alive)

    def check_memory(self) -> None:
        """Raises ServerError where models may take more than this machine has."""
        cards = gpu.cards() if any(family.on_gpu for family in self.families) else []
        most = min((card.total for card in cards if card.total is not None), default=total_memory())
        if self.budget > most:
            raise ServerError(
                f"--memory is {shown(self.budget)}, and there are {shown(most)}: models cannot have more"
            )

    def staying(self) -> list[str]:
        """The models that are there from the start, where nothing is to be loaded or unloaded later.

        Raises ServerError where some cannot be, or are not to be.
        """
        if self.keep_alive < math.inf:
            raise ServerError("several --workers unload nothing: leave --keep-alive out, or --workers")
        if missing := ", ".join(name for name in self.preload if name not in self.start):
            raise ServerError(
                f"there is no room for {missing} beside {', '.join(self.start)}, and several --workers unload "
                "nothing: leave one out, or --workers, or give models more by --memory"
            )
        return self.start

    @property
    def writes(self) -> bool:
        """Whether a model that writes text is loaded at the start."""
        return any(task_in(self.repository, name) == "generate" for name in self.start)

    def residency(
        self,
        control: Control,
        causes: Mapping[str, str] = {},
        explain: Callable[[str], str | None] | None = None,
        lost: Collection[str] = (),
    ) -> Residency:
        """What carries it out, on the Triton of a `control`; the rest is as `Residency` has it."""
        return Residency(
            control,
            self.repository,
            self.families,
            self.budget,
            self.preload,
            self.pinned,
            self.keep_alive,
            causes,
            explain,
            lost,
        )


def built(repository: Path) -> list[str]:
    """The ensembles that are whole, the default ones first; raises ServerError with what is missing of all."""
    there = ensembles(repository)
    whole = sorted((name for name, lack in there.items() if not lack), key=lambda name: name not in DEFAULT_MODELS)
    if not whole:
        lacking = "".join(f"\n  {name} lacks {', '.join(lack)}" for name, lack in there.items())
        raise ServerError(f"no model in {repository} is built: run `make build`{lacking}")
    return whole


def defaults(repository: Path, models: Sequence[str]) -> dict[Task, str]:
    """Task -> the one of `models` that answers its calls without a model's name: the first."""
    tasks = {name: task_in(repository, name) for name in reversed(models)}
    first = {task: name for name, task in tasks.items()}
    return {task: first[task] for task in TASKS if task in first}


def task_in(repository: Path, model: str) -> Task | None:
    """What an ensemble is for, where its configuration can be read."""
    with suppress(BuildError):
        return task_of(read_config(repository, model))
    return None
