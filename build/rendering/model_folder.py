"""One Triton model of a family: what is in its folder."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from build.graphs.onnx_graph import OnnxGraph
from build.rendering import repository
from build.sources.checkpoint import Checkpoint
from build.target import Target

STEPS = Path(__file__).parents[1] / "steps"


@dataclass(frozen=True)
class Model:
    """One Triton model of a family and what its version folder holds."""

    config: ModelConfig
    step: str = ""
    """The file of `build/steps`, without .py, that becomes `model.py`; "" where no step of ours runs it."""
    write_graph: Callable[[OnnxGraph], None] | None = None
    """Writes `model.onnx`."""
    head: Model | None = None
    """Of which only the graph is used, as the `head.onnx` that the same step runs behind it."""
    target: Target = field(default_factory=Target)
    """What the graph is written for."""
    files: tuple[Path, ...] = ()
    """Files of the checkpoint to copy into the version folder."""
    made: Mapping[str, str] = field(default_factory=dict)
    """Text files to write into the version folder: name -> content."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Files beside the version folder, which Triton passes over: path -> content."""
    write: Callable[[Path], None] | None = None
    """Writes what else its version folder holds."""


def with_head(encoder: Model, head: Model, sided: bool = False) -> list[Model]:
    """Encoder and head as the models that they are, or as one; `sided`, where the head reads ids of its own."""
    if not encoder.target.traits.joins_head:
        return [encoder, head]
    return [replace(encoder, config=repository.with_head(encoder.config, head.config, sided), head=head)]


def tokenizer(config: ModelConfig, checkpoint: Checkpoint) -> Model:
    """The tokenizer model with the checkpoint's tokenizer.json, or the one that is made of its words."""
    path = checkpoint.transformer / "tokenizer.json"
    if checkpoint.made_tokenizer is None:
        return Model(config, step="tokenizer", files=(path,))
    return Model(config, step="tokenizer", made={path.name: checkpoint.made_tokenizer})


def graph(config: ModelConfig, target: Target, write_graph: Callable[[OnnxGraph], None]) -> Model:
    """A model of `model.onnx`, with the step that runs it where no backend of Triton's does."""
    return Model(config, target.traits.step, write_graph=write_graph, target=target)


def imports_of(step: str) -> list[str]:
    """The names of the files of `build/steps` that a step imports, itself or by one another."""
    found: dict[str, None] = {}
    left = [step]
    while left:
        for node in ast.walk(ast.parse((STEPS / f"{left.pop()}.py").read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                left += [name for name in names if name not in found]
                found |= dict.fromkeys(names)
    return list(found)


def write_model(model: Model, folder: Path) -> None:
    """Writes one model folder as Triton mounts it."""
    # An ensemble has nothing to put there, yet Triton wants the version folder.
    version = folder / "1"
    version.mkdir(parents=True)
    (folder / "config.pbtxt").write_text(repository.render(model.config))
    if model.step:
        shutil.copyfile(STEPS / f"{model.step}.py", version / "model.py")
        for name in imports_of(model.step):
            shutil.copyfile(STEPS / f"{name}.py", version / f"{name}.py")
    for file in model.files:
        shutil.copyfile(file, version / file.name)
    for name, content in model.made.items():
        (version / name).write_text(content, encoding="utf-8")
    for name, content in model.beside.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    if model.write is not None:
        model.write(version)
    if model.write_graph is not None:
        with OnnxGraph(model.config.name, version / "model.onnx", model.target) as g:
            model.write_graph(g)
    if model.head is not None and model.head.write_graph is not None:
        with OnnxGraph(model.head.config.name, version / "head.onnx", model.head.target) as g:
            model.head.write_graph(g)
