"""A mixture of experts (Shazeer et al., 2017, arXiv:1701.06538; Fedus et al., 2021, arXiv:2101.03961).

Each token goes through the few feed-forward layers that a router chooses for it, weighed by the router's softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from onnx import TensorProto

from build.graphs.onnx_graph import OnnxGraph
from build.graphs.ragged import STEP


def choose(g: OnnxGraph, logits: str, experts: int, top: int) -> tuple[str, str]:
    """(BOOL [T', experts], FP32 [T', experts]): the `top` likeliest of each token; their softmax, 0 for others.

    The shares of those that are chosen do not add up to 1. Of equal ones the first is chosen.
    """
    share = g.op("Softmax", g.widen(logits), axis=1)
    own, other = (g.op("Unsqueeze", share, g.constant([axis], np.int64)) for axis in (2, 1))
    earlier = g.constant(np.tri(experts, k=-1), np.bool_)
    is_before = g.op("Or", g.op("Greater", other, own), g.op("And", g.op("Equal", other, own), earlier))
    rank = g.op("ReduceSum", g.op("Cast", is_before, to=TensorProto.INT64), g.constant([2], np.int64), keepdims=0)
    chosen = g.op("Less", rank, g.constant(top, np.int64))
    return chosen, g.op("Mul", share, g.op("Cast", chosen, to=TensorProto.FLOAT))


def mixture(g: OnnxGraph, x: str, chosen: str, shares: str, experts: Iterable[Callable[[str], str]]) -> str:
    """[T', H]: for every token of x [T', H] the sum of what its `experts` make of it, by their `shares`.

    Each expert takes and gives [any number of rows, H]. It sees the tokens that chose it alone, where shapes may
    follow from values. Where they may not, it sees all of them, and most count for nothing.
    """
    shares = g.narrow(shares)
    total = ""
    for i, expert in enumerate(experts):
        column = g.constant([i], np.int64)
        if g.traits.packed_attention or g.traits.needs_width:
            found = expert(x)
        else:
            found = _for_some(g, x, g.op("Gather", chosen, column, axis=1), expert)
        part = g.op("Mul", found, g.op("Gather", shares, column, axis=1))
        total = g.op("Add", total, part) if total else part
    return total


def _for_some(g: OnnxGraph, x: str, chosen: str, expert: Callable[[str], str]) -> str:
    """[T', H]: the expert's rows for tokens that are `chosen` BOOL [T', 1]; any of its rows for others."""
    flat, zero, step = g.constant([-1], np.int64), g.constant(0, np.int64), g.constant([STEP], np.int64)
    chosen = g.op("Reshape", chosen, flat)
    tokens = g.op("Reshape", g.op("NonZero", chosen), flat)
    # The first token fills the rows up to a multiple of STEP, as in `ragged`, and is there if none is chosen.
    missing = g.op("Sub", step, g.op("Mod", g.op("Shape", tokens), step))
    tokens = g.op("Pad", tokens, g.op("Concat", g.constant([0], np.int64), missing, axis=0))
    place = g.op("CumSum", g.op("Cast", chosen, to=TensorProto.INT64), zero, exclusive=1)
    return g.op("Gather", expert(g.op("Gather", x, tokens)), place)
