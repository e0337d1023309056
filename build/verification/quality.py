"""What mteb's tasks make of a served family and of its reference: `python -m build.verify FAMILY --mteb STS12`.

mteb asks both through the same few lines, so tasks, prompts and the scores' arithmetic are the same. Prompts are
the model's own for queries and documents, not those that mteb has for some models: scores are to compare the two.

mteb is imported only here and only when asked for; it brings torch along.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from build.errors import BuildError

TOLERANCE = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.995}
"""Precision -> 1 less the largest difference of a task's main scores, which are in 0..1."""

Embed: TypeAlias = Callable[[Sequence[str], str], npt.NDArray[np.float32]]
"""(texts, prompt name or "") -> embeddings [n, D]."""

Score: TypeAlias = Callable[[Sequence[tuple[str, str]]], npt.NDArray[np.float32]]
"""[(query, passage)] -> scores [n]."""


@dataclass(frozen=True)
class Outcome:
    """One task's main score, of the family and of the reference."""

    task: str
    measure: str
    served: float
    reference: float

    @property
    def agreement(self) -> float:
        """1 less the difference."""
        return 1 - abs(self.served - self.reference)


class Asked:
    """A model as mteb knows one: an encoder, or a cross-encoder."""

    def __init__(self, name: str) -> None:
        self.mteb_model_meta = _mteb("models").ModelMeta.create_empty(
            {"name": f"verify/{name}", "revision": "none"}
        )


class Encoder(Asked):
    """Texts, by a function; vectors are compared by their cosine."""

    def __init__(self, name: str, embed: Embed) -> None:
        super().__init__(name)
        self._embed = embed

    def encode(self, inputs: Iterable[dict[str, Any]], *, prompt_type: Any = None, **_: Any) -> Any:
        """Embeddings [n, D] of batches of texts."""
        return self._embed(_texts(inputs), "" if prompt_type is None else str(prompt_type.value))

    def similarity(self, a: Any, b: Any) -> Any:
        """Of each with each."""
        return _mteb("similarity_functions").cos_sim(a, b)

    def similarity_pairwise(self, a: Any, b: Any) -> Any:
        """Of each with the one at its place."""
        return _mteb("similarity_functions").pairwise_cos_sim(a, b)


class CrossEncoder(Asked):
    """Pairs, by a function."""

    def __init__(self, name: str, score: Score) -> None:
        super().__init__(name)
        self._score = score

    def predict(self, inputs1: Iterable[dict[str, Any]], inputs2: Iterable[dict[str, Any]], **_: Any) -> Any:
        """Scores [n] of pairs."""
        return self._score(list(zip(_texts(inputs1), _texts(inputs2), strict=True)))


def tasks(names: Sequence[str], data: Path | None = None) -> list[Any]:
    """mteb's tasks of these names; raises BuildError where it does not know one or its data are not there.

    The data are taken from a folder in `data`, named as their repository, or from where `datasets` finds them.
    """
    return [_task(name, data) for name in names]


def compare(served: Asked, reference: Asked, tasks: Sequence[Any]) -> list[Outcome]:
    """Each task's outcome."""
    return [
        Outcome(
            str(task.metadata.name), str(task.metadata.main_score), _score(served, task), _score(reference, task)
        )
        for task in tasks
    ]


def summarise(outcomes: Sequence[Outcome], tolerance: float) -> dict[str, Any]:
    """The part of a report that follows; `passed` wants each task within `tolerance`, whichever side is better."""
    return {
        "tasks": [{**vars(one), "agreement": one.agreement} for one in outcomes],
        "tolerance": tolerance,
        "passed": all(one.agreement >= tolerance for one in outcomes),
    }


def table(report: dict[str, Any]) -> list[str]:
    """The report in a few lines."""
    lines = [
        f"{report['family']} on {report['server']} against {report['reference']}",
        f"{'task':30} {'measure':20} {'served':>9} {'reference':>9} {'difference':>10}",
    ]
    for one in report["tasks"]:
        scores = f"{one['served']:9.5f} {one['reference']:9.5f} {one['served'] - one['reference']:+10.6f}"
        lines.append(f"{one['task']:30} {one['measure']:20} {scores}")
    lines.append(f"{'passed' if report['passed'] else 'FAILED'}     tolerance {1 - report['tolerance']:.1e}")
    return lines


def versions() -> dict[str, str]:
    """mteb's."""
    return {"mteb": str(_mteb().__version__)}


def _task(name: str, data: Path | None) -> Any:
    mteb = _mteb()
    try:
        task = mteb.get_task(name)
    except KeyError as error:
        raise BuildError(f"mteb {mteb.__version__} has no task {name!r}: {error.args[0]}") from None
    repository = task.metadata.dataset["path"]
    if data is not None:
        folder = data / repository
        if not folder.is_dir():
            raise BuildError(f"there is no {folder}, which is to hold the data of {name}")
        dataset = {**task.metadata.dataset, "path": str(folder)}
        task.metadata = task.metadata.model_copy(update={"dataset": dataset})
    try:
        task.load_data()
    except (OSError, ValueError) as error:
        raise BuildError(
            f"the data of {name} cannot be loaded: {' '.join(str(error).split())}; fetch {repository} of the "
            "Hub's data sets into FOLDER under that name and say --mteb-data FOLDER"
        ) from None
    return task


def _score(model: Asked, task: Any) -> float:
    """The mean of a task's main score over its splits and languages."""
    result = _mteb().evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    return float(result.task_results[0].get_score())


def _texts(batches: Iterable[dict[str, Any]]) -> list[str]:
    return [text for batch in batches for text in batch["text"]]


def _mteb(module: str = "") -> Any:
    try:
        return importlib.import_module(f"mteb.{module}" if module else "mteb")
    except ImportError:
        raise BuildError(
            "mteb is not installed: run this with the Python of an environment made of verify.lock; nothing else "
            "here needs it"
        ) from None
