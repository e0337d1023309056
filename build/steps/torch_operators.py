"""What computes each operator of a graph in torch, but for attention.

ONNX has none for packed tokens, so these are of a domain `packed`:

packed.MeanOfTexts  x FP32 [T, H], lengths INT32 [B] -> [B, H]: the mean over each text's tokens
packed.KeptOfTexts  x FP32 [T, D], ids INT32 [T], lengths INT32 [B] -> [B, N, D]: each text's rows whose id is not
                    -1, and zeros behind them; N is that of the text with most, at least 1
packed.CountOfKept  ids INT32 [T], lengths INT32 [B] -> INT32 [B, 1]: how many those are
packed.LargestOfIds x FP32 [T], ids INT64 [T], lengths INT32 [B] -> [B, `size`]: of each text's tokens of an id
                    the largest x, 0 where it has none or all are less
packed.PlacesAboveZero  x FP32 [B, K] -> INT32 [B, N]: of each row, ascending; N is that of the row with most, at
                    least 1, and -1 fills others up
packed.AtPlaces     x FP32 [B, K], such places -> [B, N]: the values there, 0 where there is no place
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

PACKED = "packed"

DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
}

Number: TypeAlias = "int | float | list[int]"
"""A small constant of a graph, which is compiled in."""


def _gather(x: Tensor, index: Tensor | Number, axis: int = 0) -> Tensor:
    if isinstance(index, int):
        return x.select(axis, index)
    if isinstance(index, list):
        return x.narrow(axis, index[0], len(index))
    return functional.embedding(index, x) if axis == 0 and x.dim() > 1 else x.index_select(axis, index)


def _slice(x: Tensor, starts: list[int], ends: list[int], axes: list[int]) -> Tensor:
    for start, end, axis in zip(starts, ends, axes, strict=True):
        x = x.narrow(axis, start, min(end, x.shape[axis]) - start)
    return x


def _unsqueeze(x: Tensor, axes: list[int]) -> Tensor:
    for axis in sorted(axes):
        x = x.unsqueeze(axis)
    return x


def linear_by(tile: int) -> Callable[..., Tensor]:
    """A linear layer on so many rows at a time, the last ones filled up: no row depends on how many there are."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        rows = functional.pad(x, (0, 0, 0, -len(x) % tile))
        return torch.cat([functional.linear(part, weight, bias) for part in rows.split(tile)])[: len(x)]

    return linear


def _divide(a: Tensor, b: Tensor | float) -> Tensor:
    """Of one shape or broadcast; integers are divided towards 0, as ONNX's Div does it."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _running_sum(x: Tensor, axis: int, exclusive: int = 0) -> Tensor:
    """In the shape and dtype of x; without the value itself where it is `exclusive`."""
    return x.cumsum(axis, dtype=x.dtype) - x * exclusive


def _weighted_mean(x: Tensor, lengths: Tensor) -> Tensor:
    """The mean of each text's rows, of which the n-th counts n times."""
    ends = lengths.cumsum(0)
    row = torch.arange(len(x), device=x.device)
    start = (ends - lengths)[torch.searchsorted(ends, row, right=True).clamp(max=len(lengths) - 1)]
    total = torch.segment_reduce(x * (row - start + 1)[:, None], "sum", lengths=lengths, unsafe=True)
    count = lengths.to(x.dtype)[:, None]
    return total / (count * (count + 1) * 0.5)


def _text_of_token(lengths: Tensor) -> Tensor:
    """INT64 [T]: the text that each token is of."""
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def _count_of_kept(ids: Tensor, lengths: Tensor) -> Tensor:
    kept = _text_of_token(lengths)[ids >= 0]
    return torch.bincount(kept, minlength=len(lengths)).to(torch.int32)[:, None]


def _kept_of_texts(x: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """As `_places_above_zero`, it has a GPU waited for."""
    row, counts = _text_of_token(lengths)[ids >= 0], _count_of_kept(ids, lengths)[:, 0]
    column = torch.arange(len(row), device=x.device) - (counts.cumsum(0) - counts)[row]
    found = x.new_zeros(len(lengths), max(1, int(counts.max())), x.shape[1])
    found[row, column] = x[ids >= 0]
    return found


def _largest_of_ids(x: Tensor, ids: Tensor, lengths: Tensor, size: int) -> Tensor:
    row = _text_of_token(lengths)
    flat = x.new_zeros(len(lengths) * size)
    return flat.scatter_reduce(0, row * size + ids, x, "amax").reshape(-1, size)


def _places_above_zero(x: Tensor) -> Tensor:
    """Its size only the values know, so a GPU is waited for."""
    row, place = (x > 0).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(x))
    column = torch.arange(len(row), device=x.device) - (counts.cumsum(0) - counts)[row]
    found = torch.full((len(x), max(1, int(counts.max()))), -1, dtype=torch.int32, device=x.device)
    found[row, column] = place.to(torch.int32)
    return found


def _at_places(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(1, places.clamp(min=0).to(torch.int64)) * (places >= 0)


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "And": torch.logical_and,
    "Cast": lambda x, to: x.to(DTYPES[to]),
    "Clip": torch.clamp,
    "Concat": lambda *xs, axis: torch.cat(xs, axis),
    "Cos": torch.cos,
    "CumSum": _running_sum,
    "Div": _divide,
    "Equal": operator.eq,
    "Gather": _gather,
    "Gelu": lambda x, approximate="none": functional.gelu(x, approximate=approximate),
    "Gemm": lambda x, weight, bias=None, **_: functional.linear(x, weight, bias),
    "Greater": operator.gt,
    "Identity": lambda x: x,
    "LayerNormalization": lambda x, scale, bias=None, *, epsilon: functional.layer_norm(
        x, scale.shape, scale, bias, epsilon
    ),
    "Less": operator.lt,
    "Log": torch.log,
    "Max": lambda x, least: x.clamp(min=least),
    "MatMul": torch.matmul,
    "Mod": operator.mod,
    "Mul": operator.mul,
    "Or": torch.logical_or,
    "RMSNormalization": lambda x, scale, epsilon: functional.rms_norm(x, scale.shape, scale, epsilon),
    "Relu": torch.relu,
    "Range": lambda start, end, step: torch.arange(int(start), int(end), int(step)),
    "ReduceMax": lambda x, axes, keepdims=1: x.amax(axes, keepdim=bool(keepdims)),
    "ReduceSum": lambda x, axes, keepdims=1: x.sum(axes, keepdim=bool(keepdims)),
    "Reshape": lambda x, shape: x.reshape(shape),
    "Shape": lambda x: torch.tensor(x.shape),
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Softmax": lambda x, axis: x.softmax(axis),
    "Slice": _slice,
    "Sqrt": torch.sqrt,
    "Sub": operator.sub,
    "Tanh": torch.tanh,
    "Transpose": lambda x, perm: x.permute(perm),
    "Unsqueeze": _unsqueeze,
    "Where": torch.where,
    f"{PACKED}.AtPlaces": _at_places,
    f"{PACKED}.CountOfKept": _count_of_kept,
    f"{PACKED}.KeptOfTexts": _kept_of_texts,
    f"{PACKED}.LargestOfIds": _largest_of_ids,
    f"{PACKED}.MaxOfTexts": lambda x, lengths: torch.segment_reduce(x, "max", lengths=lengths, unsafe=True),
    f"{PACKED}.MeanOfTexts": lambda x, lengths: torch.segment_reduce(x, "mean", lengths=lengths, unsafe=True),
    f"{PACKED}.PlacesAboveZero": _places_above_zero,
    f"{PACKED}.WeightedMeanOfTexts": _weighted_mean,
    # Not written by any graph: a part of linear layers that were joined.
    f"{PACKED}.Part": lambda x, start, width: x.narrow(-1, start, width),
}
"""Operator, with its domain unless that is ONNX's own -> what computes it."""
