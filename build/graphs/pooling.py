"""What sentence-transformers does after the transformer: token vectors in, one vector per text out.

Input   last_hidden_state FP32 [T * H], input_ids INT32 [T], lengths INT32 [B]: Triton hands every ragged input
        over flat, so the hidden states arrive as one dimension and are reshaped here; slots whose id is -1
        hold no token and are left out
Output  embeddings FP32 [B, D]

Pooling by mean, first or last token (Reimers and Gurevych, 2019, arXiv:1908.10084), then Dense layers, then the
cut to the first D dimensions (Kusupati et al., 2022, arXiv:2205.13147), then unit length, as far as the checkpoint
asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from onnx import TensorProto

from build.checkpoint import Checkpoint
from build.errors import BuildError
from build.files import is_listed
from build.graphs.onnx_graph import PACKED, OnnxGraph
from build.graphs.ragged import item_rows, state_inputs
from build.weights import Weights

MODES = ("cls", "mean", "lasttoken")
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
"""How older checkpoints name the mode."""
ACTIVATIONS = {"Identity": None, "Tanh": "Tanh"}
VECTOR = "sentence_embedding"
"""What the modules behind the pooling read and write."""


@dataclass(frozen=True)
class Dense:
    """A layer behind the pooling: activation(x W^T + b)."""

    name: str
    """Its folder in the checkpoint."""
    weights: Weights
    inputs: int
    outputs: int
    bias: bool
    activation: str
    """One of ACTIVATIONS."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, path: str, width: int) -> Dense:
        """Reads the module's configuration, with sentence-transformers' defaults; it is fed `width` values."""
        config = checkpoint.settings(checkpoint.folder / path / "config.json")
        config.require("use_residual", False)
        config.require("module_input_name", VECTOR)
        config.require("module_output_name", VECTOR)
        activation = config.word("activation_function", default="torch.nn.modules.activation.Tanh").rsplit(".", 1)[
            -1
        ]
        if activation not in ACTIVATIONS:
            raise BuildError(
                f"{config.path} asks for {activation}; the pooling graph is written for {', '.join(ACTIVATIONS)}"
            )
        inputs = config.integer("in_features", default=width)
        if inputs != width:
            raise BuildError(f"{config.path} has in_features = {inputs}, but is given {width} values")
        return cls(
            path,
            checkpoint.weights(checkpoint.folder / path),
            inputs,
            config.integer("out_features"),
            config.flag("bias", default=True),
            activation,
        )


@dataclass(frozen=True)
class Pooling:
    """The modules of a checkpoint's `modules.json` behind its transformer."""

    mode: str
    """One of MODES."""
    hidden_size: int
    """Of what is pooled."""
    dense: tuple[Dense, ...]
    normalise: bool

    @property
    def width(self) -> int:
        """Of the vector behind the modules."""
        return self.dense[-1].outputs if self.dense else self.hidden_size

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, hidden_size: int, mode: str | None = None, normalise: bool | None = None
    ) -> Pooling:
        """Reads the modules, `mode` and `normalise` in place of theirs where given.

        Raises BuildError on what these graphs do not write, naming it, and without modules or a `mode`.
        """
        if checkpoint.modules:
            said = cls._of_modules(checkpoint, hidden_size)
        elif mode is not None:
            said = cls(mode, hidden_size, (), normalise=False)
        else:
            raise BuildError(
                f"the checkpoint has no modules.json (looked in {checkpoint.folder}), so nothing says how the "
                "vectors of a text's tokens become one: say it as the model card does with --pooling mean, cls or "
                "last, and --normalise for unit length"
            )
        return replace(
            said,
            mode=said.mode if mode is None else mode,
            normalise=said.normalise if normalise is None else normalise,
        )

    @classmethod
    def _of_modules(cls, checkpoint: Checkpoint, hidden_size: int) -> Pooling:
        # Dropout does nothing outside of training.
        modules = [module for module in checkpoint.modules if module.kind != "Dropout"]
        kinds = [module.kind for module in modules]
        layers = [module.path for module in modules if module.kind == "Dense"]
        is_normalised = kinds[-1:] == ["Normalize"]
        if kinds != ["Transformer", "Pooling", *["Dense"] * len(layers), *["Normalize"] * is_normalised]:
            raise BuildError(
                f"{checkpoint.folder / 'modules.json'} lists {', '.join(kinds)}; the pooling graph is written for "
                f"Transformer, Pooling, any number of Dense, Normalize{_instead(kinds)}"
            )
        dense: list[Dense] = []
        for path in layers:
            dense.append(Dense.of(checkpoint, path, dense[-1].outputs if dense else hidden_size))
        if is_normalised and is_listed(own := checkpoint.folder / modules[-1].path / "config.json"):
            config = checkpoint.settings(own)
            config.require("module_input_name", VECTOR)
            config.require("module_output_name", VECTOR)
        return cls(_mode(checkpoint, modules[1].path, hidden_size), hidden_size, tuple(dense), is_normalised)


def _instead(kinds: list[str]) -> str:
    """What would help where modules are of other kinds of models."""
    if {"Router", "Asym"} & set(kinds):
        return ": it is several models in one; build the folder of the one that you want, with --pooling"
    return ""


def _mode(checkpoint: Checkpoint, path: str, hidden_size: int) -> str:
    """What a Pooling module asks for, one of MODES."""
    config = checkpoint.settings(checkpoint.folder / path / "config.json")
    width = config.integer("embedding_dimension", "word_embedding_dimension", default=hidden_size)
    if width != hidden_size:
        raise BuildError(f"{config.path} pools vectors of {width} values, but the encoder gives {hidden_size}")
    config.require("include_prompt", True)
    config.require("output_key", VECTOR)
    flags = [mode for key, mode in FLAGS.items() if config.flag(key, default=False)]
    said = config.find("pooling_mode")
    # Where it says nothing, sentence-transformers takes the mean.
    modes = flags or ["mean"] if said is None else said if isinstance(said, list) else [said]
    if len(modes) != 1 or modes[0] not in MODES:
        raise BuildError(
            f"{config.path} asks for pooling by {' and '.join(map(str, modes))}; "
            f"the pooling graph is written for one of {', '.join(MODES)}"
        )
    return str(modes[0])


def write_pooling(g: OnnxGraph, pooling: Pooling, dimensions: int) -> None:
    """Writes the modules behind a transformer, cut to `dimensions`."""
    pooled = POOL[pooling.mode](g, *state_inputs(g, pooling.hidden_size))
    for layer in pooling.dense:
        pooled = _dense(g, pooled, layer)
    if dimensions < pooling.width:
        first, end, axis = ([bound] for bound in (0, dimensions, 1))
        pooled = g.op("Slice", pooled, *(g.constant(bound, np.int64) for bound in (first, end, axis)))
    if pooling.normalise:
        pooled = normalise(g, pooled)
    g.output("embeddings", pooled, TensorProto.FLOAT, ["batch", dimensions])


def mean_of_tokens(g: OnnxGraph, states: str, input_ids: str, lengths: str) -> str:
    """[T, H] -> [B, H]: the mean over the tokens of each item, special tokens included."""
    if g.feed.packed:
        return g.op("MeanOfTexts", states, lengths, domain=PACKED)
    slot, real = _tokens(g, input_ids, lengths)
    # As a product: ONNX Runtime's own sum over an axis is taken in another order in rows of another width.
    row = g.op("Unsqueeze", real, g.constant([1], np.int64))
    total = g.op("Squeeze", g.op("MatMul", row, g.op("Gather", states, slot)), g.constant([1], np.int64))
    count = g.op("ReduceSum", real, g.constant([1], np.int64), keepdims=1)
    return g.op("Div", total, g.op("Max", count, g.constant(1, np.float32)))


def first_token(g: OnnxGraph, states: str, input_ids: str, lengths: str) -> str:
    """[T, H] -> [B, H]: the vector of each item's first token."""
    if g.feed.packed:
        return g.op("Gather", states, g.op("CumSum", lengths, g.constant(0, np.int64), exclusive=1))
    slot, _ = _tokens(g, input_ids, lengths)
    return g.op("Gather", states, g.op("Gather", slot, g.constant(0, np.int64), axis=1))


def last_token(g: OnnxGraph, states: str, input_ids: str, lengths: str) -> str:
    """[T, H] -> [B, H]: the vector of each item's last token."""
    if g.feed.packed:
        ends = g.op("CumSum", lengths, g.constant(0, np.int64))
        return g.op("Gather", states, g.op("Sub", ends, g.constant(1, np.int32)))
    slot, real = _tokens(g, input_ids, lengths)
    count = g.op("Cast", g.op("ReduceSum", real, g.constant([1], np.int64), keepdims=1), to=TensorProto.INT64)
    place = g.op("Sub", count, g.constant(1, np.int64))
    last = g.op("GatherElements", slot, g.op("Max", place, g.constant(0, np.int64)), axis=1)
    return g.op("Gather", states, g.op("Squeeze", last, g.constant([1], np.int64)))


POOL: dict[str, Callable[[OnnxGraph, str, str, str], str]] = {
    "cls": first_token,
    "mean": mean_of_tokens,
    "lasttoken": last_token,
}


def _dense(g: OnnxGraph, vectors: str, layer: Dense) -> str:
    """For every row of [B, D]."""
    shapes = {"weight": (layer.outputs, layer.inputs), **({"bias": (layer.outputs,)} if layer.bias else {})}
    parts = (
        g.weight(f"{layer.name}.{part}", layer.weights.tensor(f"linear.{part}", *shape))
        for part, shape in shapes.items()
    )
    out = g.linear(vectors, *parts)
    return out if (kind := ACTIVATIONS[layer.activation]) is None else g.op(kind, out)


def normalise(g: OnnxGraph, vectors: str) -> str:
    """x / max(|x|, 1e-12) for every row of [B, D], as torch.nn.functional.normalize defines it."""
    # Not ReduceL2, which takes its axes otherwise in the newer opsets of adopted graphs.
    squares = g.op("ReduceSum", g.op("Mul", vectors, vectors), g.constant([1], np.int64), keepdims=1)
    length = g.op("Sqrt", squares)
    return g.op("Div", vectors, g.op("Max", length, g.constant(1e-12, np.float32)))


def _tokens(g: OnnxGraph, input_ids: str, lengths: str) -> tuple[str, str]:
    """Slots of every item [B, S] INT64, and 1 where one holds a token [B, S] FP32."""
    slot, inside = item_rows(g, lengths)
    is_token = g.op("GreaterOrEqual", g.op("Gather", input_ids, slot), g.constant(0, np.int32))
    return slot, g.op("Cast", g.op("And", inside, is_token), to=TensorProto.FLOAT)
