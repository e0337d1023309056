"""The blocks that transformer encoders share, on packed tokens [T', ...]; only attention opens them into rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from build.graphs.onnx_graph import PACKED, OnnxGraph
from build.graphs.ragged import Packed, Ragged
from build.graphs.rope import Rotation


def split_heads(g: OnnxGraph, x: str, heads: int, width: int) -> str:
    """[T', heads * width] -> [T', heads, width]."""
    return g.op("Reshape", x, g.constant([-1, heads, width], np.int64))


def split_merged(g: OnnxGraph, x: str, heads: int, width: int) -> Iterator[str]:
    """[T', 3 * heads * width] of one linear layer -> queries, keys and values, each [T', heads, width]."""
    merged = split_heads(g, x, 3 * heads, width)
    for part in range(3):
        yield g.op("Gather", merged, g.constant(np.arange(part * heads, (part + 1) * heads), np.int64), axis=1)


def halves(g: OnnxGraph, x: str, width: int, axis: int) -> tuple[str, str]:
    """The first and the second half of the `width` values along `axis`."""
    along, middle = g.constant([axis], np.int64), g.constant([width // 2], np.int64)
    first = g.op("Slice", x, g.constant([0], np.int64), middle, along)
    return first, g.op("Slice", x, middle, g.constant([width], np.int64), along)


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, in the words of ONNX's `Attention`."""

    inputs: tuple[str, ...] = ()
    """What follows q, k and v."""
    is_causal: int = 0
    window: int | None = None
    """Places to either side up to which keys are seen, for attention on packed tokens."""


def attention(
    g: OnnxGraph, q: str, k: str, v: str, r: Packed, mask: Mask, scale: float, heads: int, key_value_heads: int
) -> str:
    """softmax(scale q k^T) v over the keys that `mask` shows (Vaswani et al., 2017, arXiv:1706.03762).

    q [T', heads, d] or [T', heads * d], k and v alike of `key_value_heads`, each of which serves as many heads
    (Ainslie et al., 2023, arXiv:2305.13245) -> [T', heads * d]. One node: every engine runs its own fused kernel
    and keeps no scores of [B, heads, S, S].
    """
    counts = {"q_num_heads": heads, "kv_num_heads": key_value_heads}
    if not isinstance(r, Ragged):
        kind = {"scale": scale, "is_causal": mask.is_causal, "window": mask.window}
        return g.op("Attention", q, k, v, r.lengths, domain=PACKED, **counts, **kind)
    # Rows with all heads side by side: with heads first, bf16 in OpenVINO takes twice the time.
    rows = (g.op("Gather", g.op("Flatten", x), r.token_of_cell) for x in (q, k, v))
    context = g.op(
        "Attention",
        *(*rows, *mask.inputs),
        **counts,
        scale=scale,
        is_causal=mask.is_causal,
        softmax_precision=g.traits.softmax_precision,
    )
    # [B, S, heads * d] -> [B * S, heads * d]
    return g.op("Gather", g.op("Flatten", context, axis=2), r.cell_of_token)


def key_mask(g: OnnxGraph, r: Packed) -> Mask:
    """Every token sees every token of its own text."""
    if not isinstance(r, Ragged):
        return Mask()
    if g.traits.masks != "counts":
        return _mask(g, _keys(g, r))
    return Mask(("", "", "", _counts(g, r)))


def causal_mask(g: OnnxGraph, r: Packed) -> Mask:
    """Every token sees itself and those before it; empty cells come after the tokens of a row."""
    if isinstance(r, Ragged) and g.traits.masks == "boolean":
        return _mask(g, g.op("LessOrEqual", *_cell_pairs(g, r)))
    return Mask(is_causal=1)


def window_mask(g: OnnxGraph, r: Packed, window: int, is_causal: bool = False) -> Mask:
    """Every token sees those of its own text fewer than `window` places away, before it or on either side."""
    if not isinstance(r, Ragged):
        return Mask(is_causal=int(is_causal), window=window - 1)
    key, query = _cell_pairs(g, r)
    reach = g.constant(window, np.int64)
    # No differences of columns: a mask is of bytes, they would be of integers.
    if is_causal:
        before = g.op("LessOrEqual", key, query)
        return _mask(g, g.op("And", before, g.op("Less", query, g.op("Add", key, reach))))
    near = g.op("And", g.op("Less", key, g.op("Add", query, reach)), g.op("Less", query, g.op("Add", key, reach)))
    # An empty cell sees itself: a softmax over nothing is not a number.
    itself = g.op("Equal", key, query)
    if r.seen != r.real:
        itself = g.op("And", itself, g.op("Not", g.op("Unsqueeze", r.real, g.constant([1, 2], np.int64))))
    return _mask(g, g.op("And", near, g.op("Or", _keys(g, r), itself)))


def relative_mask(g: OnnxGraph, r: Packed, biases: str, reach: int) -> Mask:
    """Every token sees every token of its own text, with a bias on the score by how far away it is.

    `biases` [1, heads, 2 reach + 1] are for keys from `reach` places before a query to as many behind it, the
    outer ones for all beyond (Raffel et al., 2019, arXiv:1910.10683). They are a tensor [B or 1, heads, S, S],
    once for all layers.
    """
    assert isinstance(r, Ragged)
    offset = g.op("Sub", r.column, g.op("Unsqueeze", r.column, g.constant([1], np.int64)))
    limit = g.constant(reach, np.int64)
    place = g.op("Add", g.op("Max", g.op("Min", offset, limit), g.constant(-reach, np.int64)), limit)
    return biased_mask(g, r, g.op("Gather", biases, place, axis=2))


def biased_mask(g: OnnxGraph, r: Ragged, bias: str) -> Mask:
    """Every token sees every token of its own text, with a `bias` [B or 1, heads, S, S] on their scores."""
    if g.traits.masks == "counts":
        return Mask((bias, "", "", _counts(g, r)))
    return Mask((g.op("Add", bias, _summand(g, _keys(g, r))),))


def _mask(g: OnnxGraph, seen: str) -> Mask:
    """From BOOL [B or 1, 1, S or 1, S]."""
    if g.traits.masks == "additive":
        seen = _summand(g, seen)
    return Mask((seen,))


def _summand(g: OnnxGraph, seen: str) -> str:
    """What is added to scores: 0, or what makes their exponential 0 and is in the range of fp16."""
    return g.op("Where", seen, g.scalar(0), g.scalar(-30000))


def _counts(g: OnnxGraph, r: Ragged) -> str:
    """INT64 [B]: the keys that are seen, which come first."""
    g.raise_opset(24)  # the first that counts keys
    return g.op("ReduceSum", g.op("Cast", r.seen, to=TensorProto.INT64), g.constant([1], np.int64), keepdims=0)


def _keys(g: OnnxGraph, r: Ragged) -> str:
    """BOOL [B, 1, 1, S]: the keys that are seen."""
    return g.op("Unsqueeze", r.seen, g.constant([1, 2], np.int64))


def _cell_pairs(g: OnnxGraph, r: Ragged) -> tuple[str, str]:
    """Columns of keys [1, 1, 1, S] and of queries [1, 1, S, 1]."""
    axes = ([0, 1, 2], [0, 1, 3])
    key, query = (g.op("Unsqueeze", r.column, g.constant(one, np.int64)) for one in axes)
    return key, query


def rotary_angles(g: OnnxGraph, r: Packed, rotation: Rotation) -> tuple[str, str]:
    """(cos, sin) [T', 1, d / 2] of every token's position (Su et al., 2021, arXiv:2104.09864)."""
    places = g.op("Cast", r.positions, to=TensorProto.FLOAT)
    column = g.op("Unsqueeze", places, g.constant([1, 2], np.int64))
    angles = g.op("Mul", column, g.constant([[rotation.frequencies]], np.float32))
    cos, sin = g.op("Cos", angles), g.op("Sin", angles)
    if rotation.scale != 1:
        scale = g.constant(rotation.scale, np.float32)
        cos, sin = g.op("Mul", cos, scale), g.op("Mul", sin, scale)
    return g.narrow(cos), g.narrow(sin)


def rotate(g: OnnxGraph, x: str, angles: tuple[str, str], width: int) -> str:
    """Rotates [T', heads, width] by its tokens' angles; the pairs are a head's first and second half."""
    cos, sin = angles
    first, second = halves(g, x, width, axis=2)
    turned = (
        g.op("Sub", g.op("Mul", first, cos), g.op("Mul", second, sin)),
        g.op("Add", g.op("Mul", second, cos), g.op("Mul", first, sin)),
    )
    return g.op("Concat", *turned, axis=2)


def layer_norm(g: OnnxGraph, x: str, scale: str, *bias: str, epsilon: float) -> str:
    """(x - mean) / sqrt(variance + epsilon) scale + bias, last axis, in FP32 (Ba et al., 2016, arXiv:1607.06450).

    `scale` and `bias`, which may be left out, are FP32.
    """
    return g.narrow(g.op("LayerNormalization", g.widen(x), scale, *bias, epsilon=epsilon))


def rms_norm(g: OnnxGraph, x: str, scale: str, epsilon: float) -> str:
    """x / sqrt(mean(x^2) + epsilon) scale, last axis, in FP32 (Zhang and Sennrich, 2019, arXiv:1910.07467).

    `scale` is FP32.
    """
    return g.narrow(g.op("RMSNormalization", g.widen(x), scale, epsilon=epsilon))


def gelu(g: OnnxGraph, x: str) -> str:
    """0.5 x (1 + erf(x / sqrt(2))), the exact form (Hendrycks and Gimpel, 2016, arXiv:1606.08415)."""
    return g.op("Gelu", x)


def gelu_tanh(g: OnnxGraph, x: str) -> str:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the same paper's approximation."""
    return g.op("Gelu", x, approximate="tanh")


def silu(g: OnnxGraph, x: str) -> str:
    """x sigmoid(x); gating a linear layer with it is SwiGLU (Shazeer, 2020, arXiv:2002.05202)."""
    return g.op("Mul", x, g.op("Sigmoid", x))
