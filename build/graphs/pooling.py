"""What sentence-transformers does after the transformer: token vectors in, one vector per text out.

Input   last_hidden_state FP32 [T * H], input_ids INT32 [T], lengths INT32 [B]: Triton hands every ragged input
        over flat, so the hidden states arrive as one dimension and are reshaped here; slots whose id is -1
        hold no token and are left out
Output  embeddings FP32 [B, D]

Pooling by mean, first, last or largest (Reimers and Gurevych, 2019, arXiv:1908.10084), or by a mean that weighs a
token by its place (Muennighoff, 2022, arXiv:2202.08904); of several kinds the vectors stand one behind the other.
Then the modules of `build.graphs.modules`, as far as the checkpoint asks for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from build.errors import BuildError
from build.graphs.modules import MODULES, VECTOR, Cut, Module, Normalize, check_vector, normalise, optional_config
from build.graphs.onnx_graph import PACKED, OnnxGraph
from build.graphs.ragged import item_rows, state_inputs
from build.sources.checkpoint import STATIC, Checkpoint

FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""How older checkpoints name the mode, in the order in which the vectors of several stand."""
LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Pooling:
    """The modules of a checkpoint's `modules.json` behind its transformer."""

    modes: tuple[str, ...]
    """Of POOL."""
    hidden_size: int
    """Of what is pooled."""
    modules: tuple[Module, ...]
    """What follows."""
    unit_tokens: bool = False
    """Whether the vectors that are pooled get unit length before."""

    @property
    def width(self) -> int:
        """Of the vector behind the modules."""
        return self.modules[-1].width if self.modules else len(self.modes) * self.hidden_size

    @property
    def unit_length(self) -> bool:
        """Whether that vector has it."""
        return bool(self.modules) and isinstance(self.modules[-1], Normalize)

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        hidden_size: int,
        mode: str | None = None,
        normalise: bool | None = None,
        dimensions: int | None = None,
    ) -> Pooling:
        """Reads the modules, `mode`, `normalise` and `dimensions` in place of what they say where given.

        Raises BuildError on what these graphs do not write, naming it, and without modules or a `mode`.
        """
        if checkpoint.is_static:
            said = cls._of_static(checkpoint, hidden_size, mode)
        elif checkpoint.modules:
            said = cls._of_modules(checkpoint, hidden_size, mode)
        elif mode is not None:
            said = cls((mode,), hidden_size, ())
        else:
            raise BuildError(
                f"the checkpoint has no modules.json (looked in {checkpoint.folder}), so nothing says how the "
                "vectors of a text's tokens become one: say it as the model card does with --pooling mean, cls or "
                "last, and --normalise for unit length"
            )
        modules, own = list(said.modules), checkpoint.truncate_dim
        if said.unit_length and normalise is False:
            modules.pop()
        if dimensions is not None and not 0 < dimensions <= said.width:
            raise BuildError(
                f"{dimensions} dimensions were asked for, but {checkpoint.folder} gives 1 to {said.width}"
            )
        is_unit = bool(modules) and isinstance(modules[-1], Normalize)
        if dimensions is not None and dimensions < said.width:
            modules[len(modules) - is_unit : len(modules)] = [Cut(dimensions), *[Normalize(dimensions)] * is_unit]
        elif dimensions is None and own is not None and own < said.width:
            # The reference cuts what its modules give, and leaves it at the length that it then has.
            modules.append(Cut(own))
            is_unit = False
        if normalise and not is_unit:
            modules.append(Normalize(modules[-1].width if modules else said.width))
        return cls(said.modes, hidden_size, tuple(modules), said.unit_tokens)

    @classmethod
    def _of_static(cls, checkpoint: Checkpoint, hidden_size: int, mode: str | None) -> Pooling:
        """The mean, and what follows it; of model2vec its own configuration says whether that is a norm."""
        if mode not in (None, "mean"):
            raise BuildError(
                f"{checkpoint.folder} holds static embeddings, which are pooled by their mean: leave --pooling out"
            )
        listed = checkpoint.modules[1:]
        kinds = [module.kind for module in checkpoint.modules]
        if checkpoint.is_model2vec:
            is_unit = checkpoint.config.flag("normalize", default=False)
            if kinds not in ([], [STATIC, *["Normalize"] * is_unit]):
                raise BuildError(
                    f"{checkpoint.folder / 'modules.json'} lists {', '.join(kinds)}, but {checkpoint.config.path} "
                    f"has normalize = {json.dumps(is_unit)}: libraries differ in which of them they follow; make "
                    "the two agree"
                )
            return cls(("mean",), hidden_size, (Normalize(hidden_size),) * is_unit)
        checkpoint.library.require("model_type", "SentenceTransformer")
        if wrong := next((kind for kind in kinds[1:] if kind not in MODULES), None):
            raise BuildError(
                f"{checkpoint.folder / 'modules.json'} lists {wrong} behind {STATIC}; the pooling graph is "
                f"written for any of {', '.join(MODULES)} there"
            )
        modules: list[Module] = []
        for module in listed:
            width = modules[-1].width if modules else hidden_size
            modules.append(MODULES[module.kind](checkpoint, module.path, width))
        return cls(("mean",), hidden_size, tuple(modules))

    @classmethod
    def _of_modules(cls, checkpoint: Checkpoint, hidden_size: int, mode: str | None) -> Pooling:
        listed = checkpoint.modules
        # Of the modules of other kinds the reference takes the transformer alone, and pools by its mean.
        checkpoint.library.require("model_type", "SentenceTransformer")
        for module in listed:
            if module.kind == "Dropout":  # which does nothing outside of training
                optional_config(checkpoint, module.path).skip(["dropout"])
        listed = [module for module in listed if module.kind != "Dropout"]
        kinds = [module.kind for module in listed]
        place = 2 if kinds[1:2] == ["Normalize"] else 1
        if kinds[:1] + kinds[place : place + 1] != ["Transformer", "Pooling"] or set(kinds[place + 1 :]) - set(
            MODULES
        ):
            raise BuildError(
                f"{checkpoint.folder / 'modules.json'} lists {', '.join(kinds)}; the pooling graph is written for "
                f"Transformer, Pooling and any of {', '.join(MODULES)}, Dropout behind it{_instead(kinds)}"
            )
        if place == 2:
            check_vector(optional_config(checkpoint, listed[1].path), "token_embeddings")
        modes = _modes(checkpoint, listed[place].path, hidden_size)
        modes = modes if mode is None else (mode,)
        modules: list[Module] = []
        for module in listed[place + 1 :]:
            width = modules[-1].width if modules else len(modes) * hidden_size
            modules.append(MODULES[module.kind](checkpoint, module.path, width))
        return cls(modes, hidden_size, tuple(modules), place == 2)


def _instead(kinds: list[str]) -> str:
    """What would help where modules are of other kinds of models."""
    if {"Router", "Asym"} & set(kinds):
        return ": it is several models in one; build the folder of the one that you want, with --pooling"
    return ""


def _modes(checkpoint: Checkpoint, path: str, hidden_size: int) -> tuple[str, ...]:
    """What a Pooling module asks for, of POOL."""
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
    if not modes or not all(isinstance(mode, str) and mode in POOL for mode in modes):
        raise BuildError(
            f"{config.path} asks for pooling by {' and '.join(map(str, modes)) or 'nothing'}; "
            f"the pooling graph is written for {', '.join(POOL)}"
        )
    return tuple(modes)


def write_pooling(g: OnnxGraph, pooling: Pooling) -> None:
    """Writes the modules behind a transformer."""
    states, input_ids, lengths = state_inputs(g, pooling.hidden_size)
    if pooling.unit_tokens:
        states = normalise(g, states)
    pooled = [POOL[mode](g, states, input_ids, lengths) for mode in pooling.modes]
    vectors = pooled[0] if len(pooled) == 1 else g.op("Concat", *pooled, axis=1)
    for module in pooling.modules:
        vectors = module.write(g, vectors)
    g.output("embeddings", vectors, TensorProto.FLOAT, ["batch", pooling.width])


def mean_of_tokens(g: OnnxGraph, states: str, input_ids: str, lengths: str) -> str:
    """[T, H] -> [B, H]: the mean over the tokens of each item, special tokens included."""
    if g.traits.packed_attention:
        return g.op("MeanOfTexts", states, lengths, domain=PACKED)
    slot, real = token_rows(g, input_ids, lengths)
    return g.op("Div", _sum(g, states, slot, real), _count(g, real))


def mean_by_root(g: OnnxGraph, states: str, input_ids: str, lengths: str) -> str:
    """[T, H] -> [B, H]: the sum over the tokens of each item by the square root of their number."""
    if g.traits.packed_attention:
        count = g.op("Unsqueeze", g.op("Cast", lengths, to=TensorProto.FLOAT), g.constant([1], np.int64))
        return g.op("Mul", g.op("MeanOfTexts", states, lengths, domain=PACKED), g.op("Sqrt", count))
    slot, real = token_rows(g, input_ids, lengths)
    return g.op("Div", _sum(g, states, slot, real), g.op("Sqrt", _count(g, real)))


def weighted_mean(g: OnnxGraph, states: str, input_ids: str, lengths: str) -> str:
    """[T, H] -> [B, H]: the mean over the tokens of each item, of which the n-th counts n times."""
    if g.traits.packed_attention:
        return g.op("WeightedMeanOfTexts", states, lengths, domain=PACKED)
    slot, real = token_rows(g, input_ids, lengths)
    place = g.op("CumSum", real, g.constant(1, np.int64))
    total, count, one = _sum(g, states, slot, g.op("Mul", place, real)), _count(g, real), g.constant(1, np.float32)
    # 1 + 2 + ... + n, and not summed up: past 2^24 a sum depends on its order.
    weight = g.op("Mul", g.op("Mul", count, g.op("Add", count, one)), g.constant(0.5, np.float32))
    return g.op("Div", total, weight)


def largest(g: OnnxGraph, states: str, input_ids: str, lengths: str) -> str:
    """[T, H] -> [B, H]: the largest value of each item's tokens."""
    if g.traits.packed_attention:
        return g.op("MaxOfTexts", states, lengths, domain=PACKED)
    slot, real = token_rows(g, input_ids, lengths)
    is_token = g.op("Cast", g.op("Unsqueeze", real, g.constant([2], np.int64)), to=TensorProto.BOOL)
    rows = g.op("Where", is_token, g.op("Gather", states, slot), g.constant(LOWEST, np.float32))
    return g.op("ReduceMax", rows, g.constant([1], np.int64), keepdims=0)


def first_token(g: OnnxGraph, states: str, input_ids: str, lengths: str) -> str:
    """[T, H] -> [B, H]: the vector of each item's first token."""
    if g.traits.packed_attention:
        return g.op("Gather", states, g.op("CumSum", lengths, g.constant(0, np.int64), exclusive=1))
    slot, _ = token_rows(g, input_ids, lengths)
    return g.op("Gather", states, g.op("Gather", slot, g.constant(0, np.int64), axis=1))


def last_token(g: OnnxGraph, states: str, input_ids: str, lengths: str) -> str:
    """[T, H] -> [B, H]: the vector of each item's last token."""
    if g.traits.packed_attention:
        ends = g.op("CumSum", lengths, g.constant(0, np.int64))
        return g.op("Gather", states, g.op("Sub", ends, g.constant(1, np.int32)))
    slot, real = token_rows(g, input_ids, lengths)
    count = g.op("Cast", g.op("ReduceSum", real, g.constant([1], np.int64), keepdims=1), to=TensorProto.INT64)
    place = g.op("Sub", count, g.constant(1, np.int64))
    last = g.op("GatherElements", slot, g.op("Max", place, g.constant(0, np.int64)), axis=1)
    return g.op("Gather", states, g.op("Squeeze", last, g.constant([1], np.int64)))


def last_but(g: OnnxGraph, passed: int, states: str, input_ids: str, lengths: str) -> str:
    """[T, H] -> [B, H]: the vector of each item's last token whose id is not `passed`; the first where all are."""
    is_passed, one = _whole(g, g.op("Equal", input_ids, g.constant(passed, np.int32))), g.constant(1, np.int64)
    counts = g.op("Sub", one, is_passed)
    if g.traits.packed_attention:
        zero, flat = g.constant(0, np.int64), g.constant([-1], np.int64)
        index = g.op("CumSum", g.op("Add", counts, is_passed), zero, exclusive=1)
        column = g.op("Cast", g.op("Mul", index, counts), to=TensorProto.FLOAT)
        rows = g.op("MaxOfTexts", g.op("Unsqueeze", column, g.constant([1], np.int64)), lengths, domain=PACKED)
        last = _whole(g, g.op("Reshape", rows, flat))
        start = _whole(g, g.op("CumSum", lengths, zero, exclusive=1))
        return g.op("Gather", states, g.op("Max", last, start))
    slot, real = token_rows(g, input_ids, lengths)
    inside = g.op("Mul", _whole(g, real), g.op("Gather", counts, slot))
    width = g.op("Gather", g.op("Shape", slot), g.constant(1, np.int64))
    place = g.op("Range", g.constant(0, np.int64), width, g.constant(1, np.int64))
    last = g.op("ReduceMax", g.op("Mul", inside, place), g.constant([1], np.int64), keepdims=1)
    found = g.op("Squeeze", g.op("GatherElements", slot, last, axis=1), g.constant([1], np.int64))
    return g.op("Gather", states, found)


def _whole(g: OnnxGraph, x: str) -> str:
    return g.op("Cast", x, to=TensorProto.INT64)


POOL: dict[str, Callable[[OnnxGraph, str, str, str], str]] = {
    "cls": first_token,
    "max": largest,
    "mean": mean_of_tokens,
    "mean_sqrt_len_tokens": mean_by_root,
    "weightedmean": weighted_mean,
    "lasttoken": last_token,
}
"""sentence-transformers' name for a mode -> what writes it."""


def token_rows(g: OnnxGraph, input_ids: str, lengths: str) -> tuple[str, str]:
    """Slots of every item [B, S] INT64, and 1 where one holds a token [B, S] FP32."""
    slot, inside = item_rows(g, lengths)
    is_token = g.op("GreaterOrEqual", g.op("Gather", input_ids, slot), g.constant(0, np.int32))
    return slot, g.op("Cast", g.op("And", inside, is_token), to=TensorProto.FLOAT)


def _sum(g: OnnxGraph, states: str, slot: str, weights: str) -> str:
    """[B, H]: each item's states, times `weights` [B, S]."""
    # As a product: ONNX Runtime's own sum over an axis is taken in another order in rows of another width.
    row = g.op("Unsqueeze", weights, g.constant([1], np.int64))
    return g.op("Squeeze", g.op("MatMul", row, g.op("Gather", states, slot)), g.constant([1], np.int64))


def _count(g: OnnxGraph, real: str) -> str:
    """[B, 1]: how many tokens an item has, 1 where it has none."""
    count = g.op("ReduceSum", real, g.constant([1], np.int64), keepdims=1)
    return g.op("Max", count, g.constant(1, np.float32))
