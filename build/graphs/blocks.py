"""The blocks that transformer encoders share, on packed tokens [T', ...]; only attention opens them into rows."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from build.graphs.onnx_graph import OnnxGraph
from build.graphs.ragged import Ragged


def split_heads(g: OnnxGraph, x: str, heads: int, width: int) -> str:
    """[T', heads * width] -> [T', heads, width]."""
    return g.op("Reshape", x, g.constant([-1, heads, width], np.int64))


def attention(g: OnnxGraph, q: str, k: str, v: str, r: Ragged, mask: str, scale: float) -> str:
    """softmax(scale q k^T + mask) v for every head (Vaswani et al., 2017, arXiv:1706.03762).

    q [T', heads, d], k and v [T', heads, d] -> [T', heads * d]; `mask` FP32 [B, 1, 1 or S, S] is added to the
    scores, and their softmax is taken in FP32 too.
    """

    def rows(x: str, perm: list[int]) -> str:
        return g.op("Transpose", g.op("Gather", x, r.token_of_cell), perm=perm)

    q = g.op("Mul", rows(q, [0, 2, 1, 3]), g.scalar(scale))
    scores = g.op("Add", g.widen(g.op("MatMul", q, rows(k, [0, 2, 3, 1]))), mask)
    shares = g.narrow(g.op("Softmax", scores, axis=-1))
    context = g.op("MatMul", shares, rows(v, [0, 2, 1, 3]))
    cells = g.op("Transpose", context, perm=[0, 2, 1, 3])
    # [B, S, heads, d] -> [B * S, heads * d]
    merged = g.op("Reshape", cells, g.constant([0, 0, -1], np.int64))
    flat = g.op("Flatten", merged, axis=2)
    return g.op("Gather", flat, r.cell_of_token)


def repeat_heads(g: OnnxGraph, x: str, key_value_heads: int, heads: int) -> str:
    """[T', key_value_heads, d] -> [T', heads, d], each head as often as queries share it.

    Grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245).
    """
    if key_value_heads == heads:
        return x
    shared = np.repeat(np.arange(key_value_heads), heads // key_value_heads)
    return g.op("Gather", x, g.constant(shared, np.int64), axis=1)


def key_mask(g: OnnxGraph, r: Ragged) -> str:
    """[B, 1, 1, S]: every token sees every token of its own text."""
    return _additive(g, g.op("Unsqueeze", r.real, g.constant([1, 2], np.int64)))


def causal_mask(g: OnnxGraph, r: Ragged) -> str:
    """[B, 1, S, S]: every token sees itself and those before it.

    Empty cells come after the tokens of a row, so no token sees one.
    """
    return _additive(g, g.op("LessOrEqual", *_cell_pairs(g, r)))


def window_mask(g: OnnxGraph, r: Ragged, window: int) -> str:
    """[B, 1, S, S]: every token sees those of its own text fewer than `window` places away, on either side."""
    key, query = _cell_pairs(g, r)
    near = g.op("Less", g.op("Abs", g.op("Sub", key, query)), g.constant(window, np.int64))
    real = g.op("Unsqueeze", r.real, g.constant([1, 2], np.int64))
    # An empty cell may see nothing at all; its scores are all the lowest float and nothing reads the result.
    return _additive(g, g.op("And", near, real))


def _cell_pairs(g: OnnxGraph, r: Ragged) -> tuple[str, str]:
    """Columns of keys [1, 1, 1, S] and of queries [1, 1, S, 1]."""
    return (
        g.op("Unsqueeze", r.column, g.constant([0, 1, 2], np.int64)),
        g.op("Unsqueeze", r.column, g.constant([0, 1, 3], np.int64)),
    )


def _additive(g: OnnxGraph, seen: str) -> str:
    """0 where `seen`, the lowest float elsewhere."""
    lowest = g.constant(np.finfo(np.float32).min, np.float32)
    return g.op("Where", seen, g.constant(0, np.float32), lowest)


def rotary_angles(g: OnnxGraph, r: Ragged, theta: float, width: int) -> tuple[str, str]:
    """(cos, sin) [T', 1, width / 2] of every token's position (Su et al., 2021, arXiv:2104.09864)."""
    frequencies = theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    places = g.op("Cast", r.positions, to=TensorProto.FLOAT)
    column = g.op("Unsqueeze", places, g.constant([1, 2], np.int64))
    angles = g.op("Mul", column, g.constant(frequencies[None, None], np.float32))
    return g.narrow(g.op("Cos", angles)), g.narrow(g.op("Sin", angles))


def rotate(g: OnnxGraph, x: str, angles: tuple[str, str], width: int) -> str:
    """Rotates [T', heads, width] by its tokens' angles; the pairs are a head's first and second half."""
    cos, sin = angles
    axis, middle = g.constant([2], np.int64), g.constant([width // 2], np.int64)
    first = g.op("Slice", x, g.constant([0], np.int64), middle, axis)
    second = g.op("Slice", x, middle, g.constant([width], np.int64), axis)
    turned = (
        g.op("Sub", g.op("Mul", first, cos), g.op("Mul", second, sin)),
        g.op("Add", g.op("Mul", second, cos), g.op("Mul", first, sin)),
    )
    return g.op("Concat", *turned, axis=2)


def layer_norm(g: OnnxGraph, x: str, scale: str, bias: str, epsilon: float) -> str:
    """(x - mean) / sqrt(variance + epsilon) scale + bias, last axis, in FP32 (Ba et al., 2016, arXiv:1607.06450).

    `scale` and `bias` are FP32.
    """
    return g.narrow(g.op("LayerNormalization", g.widen(x), scale, bias, epsilon=epsilon))


def rms_norm(g: OnnxGraph, x: str, scale: str, epsilon: float) -> str:
    """x / sqrt(mean(x^2) + epsilon) scale, last axis, in FP32 (Zhang and Sennrich, 2019, arXiv:1910.07467).

    `scale` is FP32.
    """
    x = g.widen(x)
    square = g.op("ReduceMean", g.op("Pow", x, g.constant(2, np.float32)), axes=[-1])
    root = g.op("Sqrt", g.op("Add", square, g.constant(epsilon, np.float32)))
    return g.narrow(g.op("Mul", g.op("Div", x, root), scale))


def gelu(g: OnnxGraph, x: str) -> str:
    """0.5 x (1 + erf(x / sqrt(2))), the exact form (Hendrycks and Gimpel, 2016, arXiv:1606.08415)."""
    erf = g.op("Erf", g.op("Mul", x, g.scalar(2**-0.5)))
    scaled = g.op("Mul", x, g.op("Add", erf, g.scalar(1)))
    return g.op("Mul", scaled, g.scalar(0.5))


def gelu_tanh(g: OnnxGraph, x: str) -> str:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the same paper's approximation."""
    cube = g.op("Mul", g.op("Mul", g.op("Mul", x, x), x), g.scalar(0.044715))
    inner = g.op("Mul", g.op("Add", x, cube), g.scalar((2 / np.pi) ** 0.5))
    scaled = g.op("Mul", x, g.op("Add", g.op("Tanh", inner), g.scalar(1)))
    return g.op("Mul", scaled, g.scalar(0.5))


def silu(g: OnnxGraph, x: str) -> str:
    """x sigmoid(x); gating a linear layer with it is SwiGLU (Shazeer, 2020, arXiv:2002.05202)."""
    return g.op("Mul", x, g.op("Sigmoid", x))
