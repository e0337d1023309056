"""The modules that sentence-transformers puts behind a pooling: one vector per text in, one out, in their order.

Each is read from its folder of the checkpoint with the defaults of sentence-transformers' own class, and writes
[B, inputs] -> [B, width] in FP32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from build.errors import BuildError
from build.graphs.blocks import gelu, layer_norm, silu
from build.graphs.onnx_graph import OnnxGraph
from build.sources.checkpoint import Checkpoint
from build.sources.files import is_listed
from build.sources.settings import Settings
from build.sources.weights import Weights

VECTOR = "sentence_embedding"
"""What these modules read and write."""
TANH = "torch.nn.modules.activation.Tanh"
ACTIVATIONS: dict[str, Callable[[OnnxGraph, str], str]] = {
    "Identity": lambda _, x: x,
    "Tanh": lambda g, x: g.op("Tanh", x),
    "ReLU": lambda g, x: g.op("Relu", x),
    "GELU": gelu,
    "Sigmoid": lambda g, x: g.op("Sigmoid", x),
    "SiLU": silu,
}
"""Class of torch.nn, as its defaults make it -> what it computes."""
EPSILON = 1e-5
"""Of torch.nn.LayerNorm."""


class Module(Protocol):
    """One of them."""

    @property
    def width(self) -> int:
        """Of the vectors that it gives."""
        ...

    def write(self, g: OnnxGraph, x: str) -> str:
        """[B, inputs] -> [B, width]."""
        ...


@dataclass(frozen=True)
class Dense:
    """activation(x W^T + b), to which a residual adds x, or x R^T where the widths differ."""

    name: str
    """Its folder in the checkpoint."""
    weights: Weights
    inputs: int
    width: int
    bias: bool
    activation: str
    """One of ACTIVATIONS."""
    residual: bool
    layer: str = "linear."
    """What comes before the names of its tensors."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, path: str, width: int, name: str = VECTOR) -> Dense:
        """The layer, which is fed `width` values of the vectors called `name`."""
        config = checkpoint.settings(checkpoint.folder / path / "config.json")
        check_vector(config, name, default=name)
        activation = config.word("activation_function", default=TANH)
        library, _, kind = activation.rpartition(".")
        if not f"{library}.".startswith("torch.nn.") or kind not in ACTIVATIONS:
            raise BuildError(
                f"{config.path} asks for {activation}; the pooling graph is written for torch.nn's "
                f"{', '.join(ACTIVATIONS)}"
            )
        check_width(config, config.integer("in_features", default=width), width, "in_features")
        return cls(
            path,
            checkpoint.weights(checkpoint.folder / path),
            width,
            config.integer("out_features"),
            config.flag("bias", default=True),
            kind,
            config.flag("use_residual", default=False),
        )

    def write(self, g: OnnxGraph, x: str) -> str:
        """[B, inputs] -> [B, width]."""
        linear = self._linear(g, x, self.layer, self.bias)
        out = ACTIVATIONS[self.activation](g, linear)
        if not self.residual:
            return out
        return g.op("Add", out, x if self.inputs == self.width else self._linear(g, x, "residual.", bias=False))

    def _linear(self, g: OnnxGraph, x: str, layer: str, bias: bool) -> str:
        shapes = {"weight": (self.width, self.inputs), **({"bias": (self.width,)} if bias else {})}
        parts = (
            g.weight(f"{self.name}.{layer}{part}", self.weights.tensor(f"{layer}{part}", *shape))
            for part, shape in shapes.items()
        )
        return g.linear(x, *parts)


@dataclass(frozen=True)
class LayerNorm:
    """A norm over the values of a vector."""

    name: str
    """Its folder in the checkpoint."""
    weights: Weights
    width: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, path: str, width: int) -> LayerNorm:
        """The norm, which is fed `width` values."""
        config = checkpoint.settings(checkpoint.folder / path / "config.json")
        check_width(config, config.integer("dimension"), width, "dimension")
        return cls(path, checkpoint.weights(checkpoint.folder / path), width)

    def write(self, g: OnnxGraph, x: str) -> str:
        """[B, width] -> [B, width]."""
        scale, shift = (
            g.wide_weight(f"{self.name}.{part}", self.weights.tensor(f"norm.{part}", self.width))
            for part in ("weight", "bias")
        )
        return layer_norm(g, x, scale, shift, epsilon=EPSILON)


@dataclass(frozen=True)
class Normalize:
    """Unit length."""

    width: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, path: str, width: int, name: str = VECTOR) -> Normalize:
        """The norm, which is fed `width` values of the vectors called `name`."""
        check_vector(optional_config(checkpoint, path), name)
        return cls(width)

    def write(self, g: OnnxGraph, x: str) -> str:
        """[B, width] -> [B, width]."""
        return normalise(g, x)


@dataclass(frozen=True)
class Cut:
    """The first values of a vector (Kusupati et al., 2022, arXiv:2205.13147)."""

    width: int

    def write(self, g: OnnxGraph, x: str) -> str:
        """[B, inputs] -> [B, width]."""
        return g.op("Slice", x, *(g.constant([bound], np.int64) for bound in (0, self.width, 1)))


MODULES: dict[str, Callable[[Checkpoint, str, int], Module]] = {
    "Dense": Dense.of,
    "LayerNorm": LayerNorm.of,
    "Normalize": Normalize.of,
}
"""Class in `modules.json` -> what reads it, given its folder and the width that it is fed."""


def optional_config(checkpoint: Checkpoint, path: str) -> Settings:
    """Of a module in the folder `path` that may have none."""
    file = checkpoint.folder / path / "config.json"
    return checkpoint.settings(file) if is_listed(file) else Settings(file, {})


def check_vector(config: Settings, name: str = VECTOR, default: str = VECTOR) -> None:
    """Raises BuildError where a module reads or writes something else than `name`; unsaid it reads `default`."""
    config.require("module_input_name", name, default=default)
    config.require("module_output_name", name)  # what it reads, where it does not say


def check_width(config: Settings, said: int, width: int, key: str) -> None:
    """Raises BuildError where a module is fed another number of values than it says."""
    if said != width:
        raise BuildError(f"{config.path} has {key} = {said}, but is given {width} values")


def normalise(g: OnnxGraph, vectors: str) -> str:
    """x / max(|x|, 1e-12) for every row of [B, D], as torch.nn.functional.normalize defines it."""
    # Not ReduceL2, which takes its axes otherwise in the newer opsets of adopted graphs.
    squares = g.op("ReduceSum", g.op("Mul", vectors, vectors), g.constant([1], np.int64), keepdims=1)
    length = g.op("Sqrt", squares)
    return g.op("Div", vectors, g.op("Max", length, g.constant(1e-12, np.float32)))
