"""A checkpoint's tensors as values of a graph, of the shapes that its configuration says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from build.graphs.blocks import layer_norm, rms_norm
from build.graphs.onnx_graph import OnnxGraph
from build.sources.weights import Weights


@dataclass(frozen=True)
class Parameters:
    """What a graph calls its layers by. Shapes are torch's: a linear layer's weight is [outputs, inputs]."""

    g: OnnxGraph
    weights: Weights

    def table(self, name: str, rows: int, width: int, plus: npt.NDArray[np.float32] | None = None) -> str:
        """An embedding table [rows, width], to every row of which `plus` is added."""
        values = self.weights.tensor(f"{name}.weight", rows, width)
        return self.g.weight(f"{name}.weight", values if plus is None else values + plus)

    def linear(self, x: str, name: str, outputs: int, inputs: int, bias: bool = True) -> str:
        """x W^T + b, or x W^T without `bias`: [..., inputs] -> [..., outputs]."""
        shapes = {"weight": (outputs, inputs), **({"bias": (outputs,)} if bias else {})}
        parts = (
            self.g.weight(f"{name}.{part}", self.weights.tensor(f"{name}.{part}", *shape))
            for part, shape in shapes.items()
        )
        return self.g.linear(x, *parts)

    def layer_norm(self, x: str, name: str, width: int, epsilon: float, bias: bool = True) -> str:
        """`blocks.layer_norm` over the last axis of `width` values, of a weight alone without `bias`."""
        scale, *shift = (
            self.g.wide_weight(f"{name}.{part}", self.weights.tensor(f"{name}.{part}", width))
            for part in ("weight", *(["bias"] if bias else []))
        )
        return layer_norm(self.g, x, scale, *shift, epsilon=epsilon)

    def rms_norm(self, x: str, name: str, width: int, epsilon: float, plus: float = 0) -> str:
        """`blocks.rms_norm` over the last axis of `width` values, by the weight `plus` a constant."""
        weight = self.weights.tensor(f"{name}.weight", width) + plus
        return rms_norm(self.g, x, self.g.wide_weight(f"{name}.weight", weight), epsilon)
