"""Builds one family: the folders of its Triton models, written aside and then put in place together."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy
import onnx
import tokenizers
from google import protobuf

from build.catalog import QUANTISED_TOLERANCE, TOLERANCE, CatalogEntry, Hub
from build.check.families import check_apart
from build.config import RECORD
from build.errors import BuildError, UnsupportedRuntimeError
from build.graphs.colbert import pickled_head
from build.rendering.documents import document_models
from build.rendering.generation import generator_models
from build.rendering.model_folder import Model, write_model
from build.rendering.models import graph_to_adopt, models_of
from build.runtimes import runtimes_for
from build.sources import hub
from build.sources.checkpoint import Checkpoint
from build.sources.files import GRAPHS, files_of, sha256
from build.sources.obtain import obtain
from build.sources.onnx_file import data_files, read_onnx
from build.sources.settings import check_nothing_is_left
from build.target import Target
from build.tasks import DOCUMENT_TASKS

BUILDER = Path(__file__).parents[1]

ANOTHER_EXPORT = "take another graph of the model, exported with dynamic axes for batch and sequence"

STAGING = ".building"
"""Where a build writes before it puts all in place."""


def build(
    entry: CatalogEntry,
    target: Target,
    model_repository: Path,
    cache: Path,
    asked: Mapping[str, Any] = MappingProxyType({}),
) -> bool:
    """Builds `entry` into `model_repository`; returns False when it was already there, unchanged.

    What was `asked` for on the command line is kept in its record.

    Raises BuildError, and leaves the repository as it was, when the checkpoint cannot be had or built.
    """
    if lacking := [task for task in entry.tasks if task not in target.traits.tasks]:
        raise UnsupportedRuntimeError(
            f"{entry.name} is for {lacking[0]}, which {target.runtime} does not run: build it for "
            f"{runtimes_for(entry.tasks)}"
        )
    if isinstance(entry.source, Hub):
        entry = replace(entry, source=hub.pin(entry.source))
    inputs = _inputs(entry, target)
    if _is_current(model_repository, entry.name, inputs):
        if (model_repository / STAGING).exists():
            with _alone(model_repository):  # which a Triton that loads everything would take for a model
                pass
        return False
    names = _names(entry)
    if "embed_all" in entry.tasks:
        check_nothing_is_left(pickled_head(names), entry.ignore)
    exported = None
    if isinstance(entry.source, Hub):
        described = Checkpoint(hub.describe(entry.source))
        exported = None if _writes_text(entry) else graph_to_adopt(entry, described, names)
        if exported is None and not described.is_static:  # whose sizes its tensors say
            _parts(entry, described, target)  # refuses what it can before gigabytes are brought
    checkpoint = obtain(entry, cache / "checkpoints", exported)
    with _alone(model_repository) as staging:
        if _is_current(model_repository, entry.name, inputs):  # by the build that was waited for
            return False
        _build(entry, target, checkpoint, names, inputs, asked, staging / entry.name)
    return True


@contextlib.contextmanager
def _alone(model_repository: Path) -> Iterator[Path]:
    """Lets one build at a time write a repository; yields where it writes aside, which is gone afterwards.

    That is in the repository, which may be a file system of its own: folders are renamed into their place.
    """
    model_repository.mkdir(parents=True, exist_ok=True)
    folder = os.open(model_repository, os.O_RDONLY)
    staging = model_repository / STAGING
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another build into {model_repository}", flush=True)
            fcntl.flock(folder, fcntl.LOCK_EX)
        shutil.rmtree(staging, ignore_errors=True)  # of a build that was killed
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(folder)


def _build(
    entry: CatalogEntry,
    target: Target,
    checkpoint: Checkpoint,
    names: Collection[str],
    inputs: dict[str, Any],
    asked: Mapping[str, Any],
    aside: Path,
) -> None:
    """Writes the family aside, tries it and puts it in place."""
    try:
        parts = _parts(entry, checkpoint, target)
        for model in parts:
            write_model(model, aside / model.config.name)
        _check_tensors(entry, checkpoint, names)
        called = [
            model.config.name for model in parts if _writes_text(entry) or model.config.platform == "ensemble"
        ]
        try:
            check_apart(aside, called)
        except BuildError as error:
            if _is_whole(entry) or graph_to_adopt(entry, checkpoint, names) is None:
                raise
            raise BuildError(f"{error}; {ANOTHER_EXPORT}") from None
        parameters = sorted(parts[0].config.parameters.items())  # a map of protobuf has no order of its own
        facts = {key: item.string_value for key, item in parameters}
        record = {
            "inputs": inputs,
            "asked": dict(asked),
            "downloaded": checkpoint.downloaded,
            "outputs": _hashes(aside),
            "facts": facts,
            "tolerance": _tolerance(entry, facts),
        }
        (aside / entry.name / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        _put_in_place(aside, aside.parent.parent, entry.name)
    except BuildError as error:
        beside = [name for name in (*GRAPHS, *sorted(names)) if name in names and name.endswith(".onnx")]
        if beside and not _is_whole(entry) and graph_to_adopt(entry, checkpoint, names) is None:
            raise BuildError(f"{error}; its exported graph can be taken instead: --onnx {beside[0]}") from None
        raise


def _writes_text(entry: CatalogEntry) -> bool:
    """Whether it is a language model's family, which has a graph of its own kind."""
    return "generate" in entry.tasks


def _is_whole(entry: CatalogEntry) -> bool:
    """Whether there is one way only to build the family, so that no exported graph stands in for another."""
    return _writes_text(entry) or entry.tasks[0] in DOCUMENT_TASKS


def _parts(entry: CatalogEntry, checkpoint: Checkpoint, target: Target) -> list[Model]:
    """Every model of the family, those that callers use first."""
    if _writes_text(entry):
        return generator_models(entry, checkpoint, target)
    return (document_models if entry.tasks[0] in DOCUMENT_TASKS else models_of)(entry, checkpoint, target)


def _check_tensors(entry: CatalogEntry, checkpoint: Checkpoint, names: Collection[str]) -> None:
    """Raises BuildError for a tensor that nobody has read, and for an `ignore` that fits nothing."""
    passed = [name for name, _ in checkpoint.unread_settings()]
    passed += [name for name, _ in pickled_head(names) if "embed_all" in entry.tasks]
    passed += check_nothing_is_left(checkpoint.unread_tensors(), entry.ignore)
    for pattern in entry.ignore:
        if not any(fnmatch(name, pattern) for name in passed):
            raise BuildError(f"nothing that is left unread is called {pattern}: leave --ignore {pattern} out")


def _inputs(entry: CatalogEntry, target: Target) -> dict[str, Any]:
    """Everything the outputs follow from."""
    return {
        "model": entry.title,
        "source": entry.source_name,
        "runtime": target.runtime,
        "precision": target.precision,
        "dimensions": entry.dimensions,
        "minimum_dimensions": entry.minimum_dimensions,
        "max_tokens": entry.max_tokens,
        "prompts": entry.prompts,
        "tasks": list(entry.tasks),
        "pooling": entry.pooling,
        "normalise": entry.normalise,
        "adapter": entry.adapter,
        "onnx": entry.onnx,
        "output": entry.output,
        "ignore": list(entry.ignore),
        "batching": asdict(entry.batching),
        "checkpoint": entry.files | _adopted_files(entry),
        "builder": _hashes(BUILDER, "**/*.py"),
        "versions": {
            "numpy": numpy.__version__,
            "onnx": onnx.__version__,
            "protobuf": protobuf.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def _tolerance(entry: CatalogEntry, facts: Mapping[str, str]) -> dict[str, float]:
    """What `build.verify` allows by the precision that is served: no less than an adopted graph's own."""
    if "onnx" not in facts:
        return entry.tolerance
    least = QUANTISED_TOLERANCE if "quantisation" in facts else TOLERANCE[facts["precision"]]
    return {precision: min(allowed, least) for precision, allowed in entry.tolerance.items()}


def _names(entry: CatalogEntry) -> Collection[str]:
    """Every file of the checkpoint, before any large one is brought."""
    if isinstance(entry.source, Path):
        return files_of(entry.source)
    return hub.names(entry.source) if isinstance(entry.source, Hub) else entry.files


def _adopted_files(entry: CatalogEntry) -> dict[str, str]:
    """Hashes of the graph that a checkpoint folder is built from, where it is, and of its weights."""
    if not isinstance(entry.source, Path):
        return {}
    name = None
    if not _writes_text(entry):
        name = graph_to_adopt(entry, Checkpoint(entry.source), files_of(entry.source))
    if name is None:
        return {}
    graph = entry.source / name
    paths = [graph, *(graph.parent / name for name in data_files(read_onnx(graph)))]
    return {str(path.relative_to(entry.source)): sha256(path) for path in paths}


def _is_current(model_repository: Path, family: str, inputs: dict[str, Any]) -> bool:
    try:
        record = json.loads((model_repository / family / RECORD).read_bytes())
        return bool(record["inputs"] == inputs) and all(
            sha256(model_repository / name) == expected for name, expected in record["outputs"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def recorded(model_repository: Path, family: str, part: str) -> dict[str, Any]:
    """A part of the record of the family's last build; empty where there is none that can be read."""
    try:
        return dict(json.loads((model_repository / family / RECORD).read_bytes())[part])
    except (OSError, ValueError, TypeError, LookupError):
        return {}


def _hashes(folder: Path, pattern: str = "**/*") -> dict[str, str]:
    paths = sorted(path for path in folder.glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): sha256(path) for path in paths}


def _put_in_place(aside: Path, model_repository: Path, family: str) -> None:
    """Swaps finished model folders in, by renames alone; the record goes first out and last in."""
    finished = sorted(aside.iterdir())
    old = aside.with_name(f"{aside.name}.old")
    old.mkdir()
    names = dict.fromkeys([*(folder.name for folder in finished), *_models(model_repository, family)])
    for name in names:
        if (target := model_repository / name).exists():
            target.rename(old / name)
    for folder in reversed(finished):
        folder.rename(model_repository / folder.name)


def _models(model_repository: Path, family: str) -> set[str]:
    """The models that the family had when it was built last."""
    return {Path(name).parts[0] for name in recorded(model_repository, family, "outputs")}
