"""What a TensorRT plan was built on and from, kept beside it, and whether this machine may load it.

A plan is compiled for one GPU by one TensorRT version: anywhere else Triton fails to load it, or runs it slowly.
So `model.plan` comes with `model.plan.json`, its stamp, and `problems` compares the two with the machine before
Triton does. This needs neither TensorRT nor onnx.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from build.config import read_config
from build.errors import BuildError
from build.sources.files import sha256

PLAN = "model.plan"
GRAPH = "model.onnx"

IMAGE_DIGEST = "TRITON_IMAGE_DIGEST"
"""Environment variable that names the image: no container knows its own digest, so whoever starts it says so."""

VERSION_VARIABLES = ("TRT_VERSION", "TENSORRT_VERSION")
"""Environment variables by which NVIDIA's images tell their TensorRT; the first is what their containers set."""

MODULES = ("tensorrt", "tensorrt_bindings")
"""TensorRT's Python package whole, and without the libraries that NVIDIA's images have."""

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Machine:
    """What a plan depends on."""

    gpu: str
    """As `nvidia-smi` names it."""
    compute_capability: str
    """As "9.0"."""
    tensorrt: str
    """As "11.1.0.106"."""
    image: str
    """Digest of the container image, or "unknown"."""

    @classmethod
    def here(cls) -> Machine:
        """The machine this runs on; raises BuildError when it has no GPU, GPUs of several kinds or no TensorRT."""
        gpu, capability = _gpu()
        return cls(gpu, capability, _tensorrt_version(), os.environ.get(IMAGE_DIGEST) or UNKNOWN)


@dataclass(frozen=True)
class Stamp:
    """What `model.plan.json` holds."""

    machine: Machine
    graph: dict[str, str]
    """File of the graph, its weights included -> sha256."""
    plan: str
    """sha256 of the plan."""
    quantization: str
    """`fp8` or `nvfp4`, or `none`: the graph's own precision."""

    @classmethod
    def read(cls, plan: Path) -> Stamp | None:
        """The stamp of `plan`, or None where there is none that can be read."""
        try:
            fields = json.loads(stamp_of(plan).read_bytes())
            return cls(**fields | {"machine": Machine(**fields["machine"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    @classmethod
    def of(cls, model: PlannedModel, machine: Machine, quantization: str) -> Stamp:
        """The stamp of the plan that lies in its place."""
        return cls(machine, graph_hashes(model.version), sha256(model.plan), quantization)

    def write(self, plan: Path) -> None:
        """Puts the stamp beside `plan`."""
        stamp_of(plan).write_text(json.dumps(asdict(self), indent=2) + "\n")


@dataclass(frozen=True)
class PlannedModel:
    """One Triton model that TensorRT runs."""

    config: ModelConfig
    version: Path
    """The version folder, with `model.onnx` and, once built, `model.plan`."""

    @property
    def plan(self) -> Path:
        """Where its plan belongs."""
        return self.version / PLAN

    @property
    def stamp(self) -> Path:
        """Where the stamp of that plan belongs."""
        return stamp_of(self.plan)


def stamp_of(plan: Path) -> Path:
    """Where the stamp of `plan` belongs."""
    return plan.with_name(plan.name + ".json")


def graph_hashes(version: Path) -> dict[str, str]:
    """sha256 of the graph in a version folder: of `model.onnx` and of the weights beside it."""
    return {path.name: sha256(path) for path in sorted(version.glob(f"{GRAPH}*"))}


def planned_models(repository: Path, ensemble: str) -> list[PlannedModel]:
    """The steps of `ensemble` that TensorRT runs; raises BuildError when a configuration is missing."""
    steps = {step.model_name: None for step in read_config(repository, ensemble).ensemble_scheduling.step}
    configs = [read_config(repository, step) for step in steps]
    return [PlannedModel(c, repository / c.name / "1") for c in configs if c.backend == "tensorrt"]


def problems(repository: Path, ensembles: Sequence[str]) -> Iterator[str]:
    """Every reason why Triton must not load the plans of `ensembles` here, as a sentence that says what to do.

    Raises BuildError when that cannot be told: no such model, or no GPU or TensorRT although a plan wants them.
    """
    for ensemble in ensembles:
        if models := planned_models(repository, ensemble):
            machine = Machine.here()
            for model in models:
                if reason := mismatch(model.version, machine):
                    yield f"{reason}: run `python -m build.plans {ensemble}` on this machine, in this image"


def mismatch(version: Path, machine: Machine) -> str | None:
    """Why the plan in the folder `version` must not be loaded on `machine`, or None when it may."""
    plan = version / PLAN
    if not plan.exists():
        return f"{plan} has not been built"
    if (stamp := Stamp.read(plan)) is None:
        return f"{plan} has no readable stamp {stamp_of(plan).name}"
    built = stamp.machine
    if (built.gpu, built.compute_capability) != (machine.gpu, machine.compute_capability):
        return (
            f"{plan} was built for {built.gpu} (compute capability {built.compute_capability}), "
            f"this is {machine.gpu} ({machine.compute_capability})"
        )
    if built.tensorrt != machine.tensorrt:
        return f"{plan} was built by TensorRT {built.tensorrt}, this is TensorRT {machine.tensorrt}"
    if UNKNOWN not in (built.image, machine.image) and built.image != machine.image:
        return f"{plan} was built in image {built.image}, this is image {machine.image}"
    if stamp.graph != graph_hashes(version):
        return f"{plan} was built from another graph than the {GRAPH} beside it"
    if stamp.plan != sha256(plan):
        return f"{plan} is damaged: its sha256 is not the one of its stamp"
    return None


def tensorrt_module() -> Any:
    """TensorRT's Python module; raises ImportError when it is not installed."""
    for name in MODULES[:-1]:
        with suppress(ImportError):
            return importlib.import_module(name)
    return importlib.import_module(MODULES[-1])


def _gpu() -> tuple[str, str]:
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        raise BuildError("there is no nvidia-smi: TensorRT needs a machine with an NVIDIA GPU") from None
    # It complains on stdout.
    lines = sorted(set(done.stdout.strip().splitlines()))
    if done.returncode or not lines:
        raise BuildError(f"nvidia-smi finds no GPU: {' '.join(lines) or done.stderr.strip() or 'no message'}")
    if len(lines) > 1:
        raise BuildError(
            f"this machine has GPUs of several kinds ({'; '.join(lines)}) and a plan fits only one: "
            "give the container GPUs of one kind"
        )
    name, capability = lines[0].rsplit(", ", 1)
    return name, capability


def _tensorrt_version() -> str:
    try:
        return str(tensorrt_module().__version__)
    except ImportError:
        for variable in VERSION_VARIABLES:
            if version := os.environ.get(variable):
                return version.split("+")[0]
    raise BuildError(
        "there is no TensorRT: run this in NVIDIA's tritonserver image, "
        f"which tells its version in {VERSION_VARIABLES[0]}"
    )
