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
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.ragged import item_rows, state_inputs

MODES = ("cls", "mean", "lasttoken")
ACTIVATIONS = {"Identity": None, "Tanh": "Tanh"}


@dataclass(frozen=True)
class Pooling:
    """The modules of a checkpoint's `modules.json` behind its transformer."""

    mode: str
    """One of MODES."""
    dense: tuple[str, ...]
    """Folders of Dense modules, in order."""
    width: int
    """Of the vector behind them."""
    normalise: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint, mode: str | None = None, normalise: bool | None = None) -> Pooling:
        """Reads the modules, `mode` and `normalise` in place of theirs where given.

        Raises BuildError on what these graphs do not write, naming it, and without modules or a `mode`.
        """
        if (checkpoint.folder / "modules.json").exists():
            said = cls._of_modules(checkpoint)
        elif mode is not None:
            said = cls(mode, (), checkpoint.hidden_size, normalise=False)
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
    def _of_modules(cls, checkpoint: Checkpoint) -> Pooling:
        modules = [(m["type"].rsplit(".", 1)[-1], m.get("path", "")) for m in checkpoint.json("modules.json")]
        kinds = [kind for kind, _ in modules]
        dense = tuple(path for kind, path in modules if kind == "Dense")
        normalise = kinds[-1:] == ["Normalize"]
        if kinds != ["Transformer", "Pooling", *["Dense"] * len(dense), *["Normalize"] * normalise]:
            raise BuildError(
                f"{checkpoint.folder / 'modules.json'} lists {', '.join(kinds)}; the pooling graph is written for "
                "Transformer, Pooling, any number of Dense, Normalize"
            )
        name = f"{modules[1][1]}/config.json"
        config = checkpoint.json(name)
        flags = [key.split("_")[2] for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
        modes = [config["pooling_mode"]] if "pooling_mode" in config else flags
        if len(modes) != 1 or modes[0] not in MODES:
            raise BuildError(
                f"{checkpoint.folder / name} asks for {', '.join(modes) or 'no pooling'}; "
                f"the pooling graph is written for one of {', '.join(MODES)}"
            )
        widths = [int(checkpoint.json(f"{path}/config.json")["out_features"]) for path in dense]
        return cls(modes[0], dense, [checkpoint.hidden_size, *widths][-1], normalise)


def write_pooling(g: OnnxGraph, checkpoint: Checkpoint, pooling: Pooling, dimensions: int) -> None:
    """Writes the modules of `checkpoint` behind its transformer, cut to `dimensions`."""
    pooled = POOL[pooling.mode](g, *state_inputs(g, checkpoint.hidden_size))
    for path in pooling.dense:
        pooled = dense(g, pooled, checkpoint, path)
    if dimensions < pooling.width:
        first, end, axis = ([bound] for bound in (0, dimensions, 1))
        pooled = g.op("Slice", pooled, *(g.constant(bound, np.int64) for bound in (first, end, axis)))
    if pooling.normalise:
        pooled = normalise(g, pooled)
    g.output("embeddings", pooled, TensorProto.FLOAT, ["batch", dimensions])


def mean_of_tokens(g: OnnxGraph, states: str, input_ids: str, lengths: str) -> str:
    """[T, H] -> [B, H]: the mean over the tokens of each item, special tokens included."""
    slot, real = _tokens(g, input_ids, lengths)
    # As a product: ONNX Runtime's own sum over an axis is taken in another order in rows of another width.
    row = g.op("Unsqueeze", real, g.constant([1], np.int64))
    total = g.op("Squeeze", g.op("MatMul", row, g.op("Gather", states, slot)), g.constant([1], np.int64))
    count = g.op("ReduceSum", real, g.constant([1], np.int64), keepdims=1)
    return g.op("Div", total, g.op("Max", count, g.constant(1, np.float32)))


def first_token(g: OnnxGraph, states: str, input_ids: str, lengths: str) -> str:
    """[T, H] -> [B, H]: the vector of each item's first token."""
    slot, _ = _tokens(g, input_ids, lengths)
    return g.op("Gather", states, g.op("Gather", slot, g.constant(0, np.int64), axis=1))


def last_token(g: OnnxGraph, states: str, input_ids: str, lengths: str) -> str:
    """[T, H] -> [B, H]: the vector of each item's last token."""
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


def dense(g: OnnxGraph, vectors: str, checkpoint: Checkpoint, path: str) -> str:
    """A Dense module: activation(x W^T + b) for every row of [B, D]."""
    config = checkpoint.json(f"{path}/config.json")
    activation = config["activation_function"].rsplit(".", 1)[-1]
    if activation not in ACTIVATIONS:
        raise BuildError(
            f"{checkpoint.folder / path / 'config.json'} asks for {activation}; "
            f"the pooling graph is written for {', '.join(ACTIVATIONS)}"
        )
    module = Checkpoint(checkpoint.folder / path)
    parts = ("weight", "bias") if config["bias"] else ("weight",)
    weights = [g.weight(f"{path}.{part}", module.tensor(f"linear.{part}")) for part in parts]
    out = g.linear(vectors, *weights)
    return out if (kind := ACTIVATIONS[activation]) is None else g.op(kind, out)


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
