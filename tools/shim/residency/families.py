"""What a model repository holds: ensembles that callers name, and families of them, which are loaded together.

A model that writes text is called itself, and counts as an ensemble of one.
Ensembles that share a step are one family: a step is there for all of them or for none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from build import gpu
from build.config import RECORD, is_called, read_config
from build.errors import BuildError
from build.tasks import DOCUMENT_TASKS, TASKS, Task

GIVES: dict[str, Task] = {result.output: task for task, result in (TASKS | DOCUMENT_TASKS).items()}
"""Output of a model that is called -> what it is for."""

PROCESS = 40 << 20
"""Bytes that the process of a step takes beside its weights, about."""

BATCH = 0.25
"""What a batch takes of a CPU's memory, about, for each byte of weights."""

CACHE = "cache_bytes"
"""Parameter of a step: what it keeps of texts under way."""

DECIDING = (".onnx", ".onnx.data", "tokenizer.json", "openvino_model.xml", "openvino_model.bin", ".jinja")
"""How files are called that decide what a family computes."""

HINT = "memory.json"
"""File beside the record of the build: what the family took when it was last served, and for which build."""


@dataclass(frozen=True)
class Family:
    """Ensembles that share their steps."""

    ensembles: tuple[str, ...]
    """Their names; the first is the family's own."""
    steps: tuple[str, ...]
    on_gpu: bool
    """Whether it is a GPU's memory that it takes."""
    estimate: int
    """Bytes that it takes, by the size of its weights."""

    @property
    def name(self) -> str:
        """What operators call it."""
        return self.ensembles[0]


def task_of(config: ModelConfig) -> Task | None:
    """What an ensemble is for; None for a model that is none of ours."""
    tasks = [GIVES[output.name] for output in config.output if output.name in GIVES]
    return tasks[0] if is_called(config) and tasks else None


def steps_of(config: ModelConfig) -> tuple[str, ...]:
    """The models that an ensemble is made of, the tokenizer first."""
    return tuple(dict.fromkeys(step.model_name for step in config.ensemble_scheduling.step)) or (config.name,)


def ensembles(repository: Path) -> dict[str, list[str]]:
    """Every ensemble in a repository, by name -> its steps that are not built; broken ones are left out."""
    names = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    found = {name: lacking(repository, name) for name in names}
    return {name: lack for name, lack in found.items() if lack is not None}


def lacking(repository: Path, name: str) -> list[str] | None:
    """The steps of an ensemble that are not built; None where there is no ensemble that can be read."""
    with suppress(BuildError):
        config = read_config(repository, name)
        if task_of(config):
            return [step for step in steps_of(config) if not (repository / step / "1").is_dir()]
    return None


def is_built(repository: Path, name: str) -> bool:
    """Whether an ensemble called so is whole; the name may be any caller's."""
    there = {path.parent.name for path in repository.glob("*/config.pbtxt")}
    return name in there and lacking(repository, name) == []


def shown(size: int) -> str:
    """Bytes, for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def families(repository: Path, names: Sequence[str]) -> list[Family]:
    """The families of the ensembles `names`, in the order of their first; a broken ensemble is one by itself."""
    groups: list[tuple[list[str], set[str]]] = []
    for name in names:
        steps: set[str] = set()
        with suppress(BuildError):
            steps = set(steps_of(read_config(repository, name)))
        own = next((group for group in groups if group[1] & steps), None)
        if own is None:
            groups.append(([name], steps))
        else:
            own[0].append(name)
            own[1].update(steps)
    return [_family(repository, names, steps) for names, steps in groups]


def _family(repository: Path, names: Sequence[str], steps: Collection[str]) -> Family:
    weights = sum(
        file.stat().st_size
        for step in steps
        for file in (repository / step).glob("1/*")
        if file.suffix in (".bin", ".data", ".onnx", ".plan", ".safetensors")
    )
    on_gpu = False
    for step in steps:
        with suppress(BuildError, ValueError):
            config = read_config(repository, step)
            kinds = {group.kind for group in config.instance_group}
            on_gpu |= ModelInstanceGroup.KIND_GPU in kinds
            if CACHE in config.parameters:
                weights += int(config.parameters[CACHE].string_value)
    estimate = gpu.needed(weights) if on_gpu else int(weights * (1 + BATCH)) + len(steps) * PROCESS
    return Family(tuple(names), tuple(sorted(steps)), on_gpu, estimate)


def fingerprint(repository: Path, family: Family) -> str:
    """What the family on disk is: another one once it is built anew; "" while a build puts it in place."""
    with suppress(OSError):
        return hashlib.sha256((repository / family.name / RECORD).read_bytes()).hexdigest()
    return ""


def space(repository: Path, config: ModelConfig) -> str | None:
    """sha256 of all that decides an ensemble's vectors: its graphs, weights, tokenizer, prompts and window.

    By the record of its build; None where there is none. Two builds that differ in nothing else have the same.
    """
    steps = steps_of(config)
    for path in sorted(repository.glob(f"*/{RECORD}")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, BuildError):
            outputs: dict[str, str] = json.loads(path.read_text())["outputs"]
            if f"{config.name}/config.pbtxt" not in outputs:
                continue
            parts = {name: value for name, value in outputs.items() if name.split("/")[0] in steps}
            found = {name: value for name, value in sorted(parts.items()) if name.endswith(DECIDING)}
            parameters = read_config(repository, steps[0]).parameters
            said = {key: parameters[key].string_value for key in ("max_tokens", "prompts") if key in parameters}
            return hashlib.sha256(json.dumps([found, said]).encode()).hexdigest()
    return None


def hint(repository: Path, family: Family) -> int | None:
    """Bytes that this build of the family took when it was last served; None where that is not known."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        said = json.loads((repository / family.name / HINT).read_text())
        if said["build"] == fingerprint(repository, family):
            return int(said["bytes"])
    return None


def keep_hint(repository: Path, family: Family, build: str, size: int) -> None:
    """Writes what a build of the family takes beside it, where the repository can be written."""
    with suppress(OSError):
        (repository / family.name / HINT).write_text(json.dumps({"build": build, "bytes": size}) + "\n")
