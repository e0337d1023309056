"""Sparse vectors: what a masked language model would put in each place of a text, as weights of its vocabulary.

Input   last_hidden_state FP32 [T * H], input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.pooling`)
Output  indices INT32 [B, N], ascending in each row; values FP32 [B, N]: what is not zero of a vector of the
        vocabulary's size V. N is that of the row with most, and others are filled up with -1 and 0

SPLADE (Formal et al., 2021, arXiv:2107.05720 and arXiv:2109.10086): log(1 + max(logits, 0)) of the language
model's head, its maximum or sum over a text's tokens, special ones included. No [B, V] leaves the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from build.errors import BuildError
from build.graphs.blocks import gelu
from build.graphs.dimensions import Dimensions
from build.graphs.onnx_graph import PACKED, OnnxGraph
from build.graphs.parameters import Parameters
from build.graphs.pooling import token_rows
from build.graphs.ragged import state_inputs
from build.sources.checkpoint import SPLADE, Checkpoint
from build.sources.files import is_listed
from build.sources.settings import Settings
from build.sources.weights import Weights

LINEAR = "sparse_linear"
"""The file of bge-m3's layer that weighs words, but for what follows its dot."""
UNWEIGHED = {"cls": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}
"""Special tokens whose weight bge-m3 drops -> what XLM-RoBERTa calls them."""
LOGARITHMS = {"relu": 1, "log1p_relu": 2}
"""`activation_function` -> how often log(1 + x) is taken."""


@dataclass(frozen=True)
class MaskedHead:
    """What the parts of a masked language model's head are called; a tied one takes the table of words."""

    dense: str
    norm: str
    decoder: str
    bias: str
    words: str = "embeddings.word_embeddings.weight"
    biases: bool = True
    """Of its dense layer and norm."""


ROBERTAS = MaskedHead("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias")
"""RoBERTa's, and that of all of its kind."""


@dataclass(frozen=True)
class Splade:
    """How the logits of a text's tokens become one vector."""

    strategy: str = "max"
    logarithms: int = 1

    @classmethod
    def of(cls, checkpoint: Checkpoint, vocabulary: int) -> Splade:
        """Reads the module, or takes SPLADE's own where there are none; BuildError on what is not written."""
        if not checkpoint.modules:
            return cls()
        kinds = [module.kind for module in checkpoint.modules]
        if kinds[1:] != [SPLADE]:
            raise BuildError(
                f"{checkpoint.folder / 'modules.json'} lists {', '.join(kinds)}; sparse vectors are written for "
                f"Transformer, {SPLADE}"
            )
        config = checkpoint.settings(checkpoint.folder / checkpoint.modules[1].path / "config.json")
        width = config.integer("embedding_dimension", "word_embedding_dimension", default=vocabulary)
        if width != vocabulary:
            raise BuildError(f"{config.path} pools {width} logits, but the language model gives {vocabulary}")
        config.skip(["chunk_size"])  # how much is computed at a time
        strategy = config.word("pooling_strategy", default="max")
        activation = config.word("activation_function", default="relu")
        if strategy not in ("max", "sum") or activation not in LOGARITHMS:
            raise BuildError(
                f"{config.path} asks for {strategy} of {activation}; it is written for max or sum of "
                f"{' or '.join(LOGARITHMS)}"
            )
        return cls(strategy, LOGARITHMS[activation])


def is_tied(config: Settings) -> bool:
    """Whether a language model's head takes the table of words."""
    return config.flag("tie_word_embeddings", default=True)


def write_splade(
    g: OnnxGraph, encoder: Dimensions, weights: Weights, head: MaskedHead, splade: Splade, tied: bool
) -> None:
    """Writes the language model's head, the pooling over tokens and what is left of it."""
    states, input_ids, lengths = state_inputs(g, encoder.hidden_size)
    hidden, size = encoder.hidden_size, encoder.vocab_size
    p = Parameters(g, weights)
    inner = gelu(g, p.linear(states, head.dense, hidden, hidden, bias=head.biases))
    x = p.layer_norm(inner, head.norm, hidden, encoder.head_epsilon, bias=head.biases)
    table = g.weight("decoder.weight", _table(weights, head, size, hidden, tied))
    bias = g.weight("decoder.bias", _bias(weights, head, size, tied))

    if g.traits.packed_attention:
        logits = g.linear(x, table, bias)
        if splade.strategy == "max":
            best = g.op("MaxOfTexts", logits, lengths, domain=PACKED)
            scores = _logarithms(g, g.op("Relu", best), splade.logarithms)
        else:
            each = _logarithms(g, g.op("Relu", logits), splade.logarithms)
            count = g.op("Unsqueeze", g.op("Cast", lengths, to=TensorProto.FLOAT), g.constant([1], np.int64))
            scores = g.op("Mul", g.op("MeanOfTexts", each, lengths, domain=PACKED), count)
        write_sparse(g, scores, size)
        return
    slot, real = token_rows(g, input_ids, lengths)
    rows = g.op("Flatten", g.op("Gather", x, slot), axis=2)
    logits = g.linear(rows, table, bias)
    shape = g.op("Concat", g.op("Shape", slot), g.constant([size], np.int64), axis=0)
    logits = g.op("Reshape", logits, shape)

    if splade.strategy == "max":
        # The logarithm keeps the order, so that it is taken of one row of logits for each text.
        weight = g.op("Unsqueeze", real, g.constant([2], np.int64))
        scores = g.op(
            "ReduceMax", g.op("Relu", g.op("Mul", logits, weight)), g.constant([1], np.int64), keepdims=0
        )
        scores = _logarithms(g, scores, splade.logarithms)
    else:
        # As a product: ONNX Runtime's own sum over an axis is taken in another order in rows of another width.
        each = _logarithms(g, g.op("Relu", logits), splade.logarithms)
        weight = g.op("Unsqueeze", real, g.constant([1], np.int64))
        scores = g.op("Squeeze", g.op("MatMul", weight, each), g.constant([1], np.int64))
    write_sparse(g, scores, size)


def lexical_weights(checkpoint: Checkpoint) -> Weights:
    """The layer that weighs words; BuildError where it is not there, or only as a pickle."""
    folder = checkpoint.transformer
    if not is_listed(folder / f"{LINEAR}.safetensors"):
        raise BuildError(
            f"{folder} has no {LINEAR}.safetensors, the layer that weighs words; {LINEAR}.pt, as in bge-m3, is "
            "a pickle, which can run code when it is read: save what it holds with safetensors, and build that"
        )
    return checkpoint.weights(folder, file=f"{LINEAR}.safetensors")


def _linear(g: OnnxGraph, weights: Weights, layer: str, hidden: int) -> list[str]:
    shapes = {"weight": (1, hidden), "bias": (1,)}
    return [g.weight(f"{LINEAR}.{part}", weights.tensor(layer + part, *shape)) for part, shape in shapes.items()]


def unweighed(checkpoint: Checkpoint) -> list[int]:
    """Ids of the special tokens that have no weight, in bge-m3 and in gte-multilingual-base."""
    words = [checkpoint.named_token(name) or usual for name, usual in UNWEIGHED.items()]
    return sorted({i for word in words if (i := checkpoint.tokenizer.token_to_id(word)) is not None})


def write_lexical(g: OnnxGraph, encoder: Dimensions, weights: Weights, layer: str, dropped: list[int]) -> None:
    """Writes bge-m3's weights of words (Chen et al., 2024, arXiv:2402.03216), or gte-multilingual-base's.

    max(w h + b, 0) of each token's state, the largest of those with one id; the `dropped` ids have none. The names
    of w and b start with `layer`.
    """
    states, input_ids, lengths = state_inputs(g, encoder.hidden_size)
    each = g.op("Relu", g.linear(states, *_linear(g, weights, layer, encoder.hidden_size)))
    ids = g.op("Cast", g.op("Max", input_ids, g.constant(0, np.int32)), to=TensorProto.INT64)
    kept = np.ones(encoder.vocab_size, np.float32)
    kept[dropped] = 0
    own = g.op(
        "Mul", g.op("Reshape", each, g.constant([-1], np.int64)), g.op("Gather", g.weight("kept", kept), ids)
    )
    if g.traits.packed_attention:
        largest = g.op("LargestOfIds", own, ids, lengths, domain=PACKED, size=encoder.vocab_size)
        write_sparse(g, largest, encoder.vocab_size)
        return
    slot, real = token_rows(g, input_ids, lengths)
    places, found = g.op("Gather", ids, slot), g.op("Mul", g.op("Gather", own, slot), real)
    batch = g.op("Shape", slot, start=0, end=1)
    shape = g.op("Concat", batch, g.constant([encoder.vocab_size], np.int64), axis=0)
    nothing = g.op("Expand", g.constant(0, np.float32), shape)
    write_sparse(g, g.op("ScatterElements", nothing, places, found, axis=1, reduction="max"), encoder.vocab_size)


def write_sparse(g: OnnxGraph, scores: str, size: int) -> None:
    """Declares the outputs `indices` and `values`: what is above zero of `scores` [B, `size`]."""
    if g.traits.packed_attention:
        above = g.op("PlacesAboveZero", scores, domain=PACKED)
        g.output("indices", above, TensorProto.INT32, ["batch", "most"])
        values = g.op("AtPlaces", scores, above, domain=PACKED)
        g.output("values", values, TensorProto.FLOAT, ["batch", "most"])
        return
    places, place, _ = compacted(g, g.op("Greater", scores, g.constant(0, np.float32)))
    flat = g.op("Reshape", scores, g.constant([-1], np.int64))
    ids = g.op("Mod", places, g.constant(size, np.int64))
    indices = g.op("Concat", g.op("Cast", ids, to=TensorProto.INT32), g.constant([-1], np.int32), axis=0)
    values = g.op("Concat", g.op("Gather", flat, places), g.constant([0], np.float32), axis=0)
    g.output("indices", g.op("Gather", indices, place), TensorProto.INT32, ["batch", "most"])
    g.output("values", g.op("Gather", values, place), TensorProto.FLOAT, ["batch", "most"])


def compacted(g: OnnxGraph, found: str) -> tuple[str, str, str]:
    """What is true of BOOL [B, K], row after row, all INT64: (cells [n] of [B * K], place [B, N], counts [B, 1]).

    `place` is where in `cells` a row's own stand; past its end it is n, where a filling is to stand.
    """
    one, first, every = g.constant(1, np.int64), g.constant(0, np.int64), g.constant([-1], np.int64)
    cells = g.op("Reshape", g.op("NonZero", g.op("Reshape", found, every)), every)
    counts = g.op("ReduceSum", g.op("Cast", found, to=TensorProto.INT64), g.constant([1], np.int64), keepdims=1)
    starts = g.op("CumSum", counts, first, exclusive=1)
    column = g.op("Range", first, g.op("Max", g.op("ReduceMax", counts, keepdims=0), one), one)
    end = g.op("Squeeze", g.op("Shape", cells))
    place = g.op("Where", g.op("Less", column, counts), g.op("Add", starts, column), end)
    return cells, place, counts


def _logarithms(g: OnnxGraph, x: str, times: int) -> str:
    """log(1 + x), exact where 1 + x is rounded to 1 or near it (Kahan; Goldberg, 1991, theorem 4)."""
    one = g.constant(1, np.float32)
    for _ in range(times):
        u = g.op("Add", x, one)
        rest = g.op("Sub", u, one)
        is_lost = g.op("Equal", rest, g.constant(0, np.float32))
        exact = g.op("Div", g.op("Mul", g.op("Log", u), x), g.op("Where", is_lost, one, rest))
        x = g.op("Where", is_lost, x, exact)
    return x


def _bias(weights: Weights, head: MaskedHead, size: int, tied: bool) -> npt.NDArray[np.float32]:
    """What is added to the logits: the decoder's own, which is the head's where they are tied."""
    own = f"{head.decoder}.bias"
    if own == head.bias or (tied and own not in weights):
        return weights.tensor(head.bias, size)
    bias = weights.tensor(own, size)
    if tied and head.bias in weights and not np.array_equal(weights.tensor(head.bias, size), bias):
        raise BuildError(
            f"the weights in {weights.folder} have {own} beside another {head.bias}, but config.json ties them: "
            "say tie_word_embeddings = false there if the head has one of its own"
        )
    return bias


def _table(weights: Weights, head: MaskedHead, size: int, hidden: int, tied: bool) -> npt.NDArray[np.float32]:
    """The rows that a state is multiplied by; BuildError where two that are said to be one differ."""
    own = f"{head.decoder}.weight"
    if not tied:
        return weights.tensor(own, size, hidden)
    table = weights.tensor(head.words, size, hidden)
    if own in weights and not np.array_equal(weights.tensor(own, size, hidden), table):
        raise BuildError(
            f"the weights in {weights.folder} have {own} beside another {head.words}, but config.json ties them: "
            "say tie_word_embeddings = false there if the head has a table of its own"
        )
    return table
