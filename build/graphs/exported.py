"""A graph as somebody else exported it: what it takes, runs and is made of, and whether that can be adopted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.version_converter
from onnx import TensorProto, helper, numpy_helper

from build.errors import BuildError
from build.sources.onnx_file import nodes, tensors

OPSETS = range(13, 24)
"""What the nodes written here mean the same in, up to the newest that ONNX Runtime and OpenVINO both run."""

OLDER = range(11, OPSETS[0])
"""What many published graphs are of: carried to the first of OPSETS by onnx's own converter."""

INLINE = 1024
"""Weights of more bytes go to a data file: a model file that holds them ends at 2 GB."""

PART = 1 << 20
"""Values that are looked at together."""

AGAIN = "export the model again with opset 17"
ONNX_DOMAINS = ("", "ai.onnx")

IDS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
PAST = "past_key_values."
INTEGERS = (TensorProto.INT32, TensorProto.INT64)
FLOATS: dict[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


def opset(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators, 0 where none is said."""
    return next((one.version for one in model.opset_import if one.domain in ONNX_DOMAINS), 0)


def converted(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in one of OPSETS."""
    if opset(model) in OPSETS:
        return model
    weights, kept = list(model.graph.initializer), {}
    # The converter copies everything several times over, so it gets no more than the names of large weights.
    for i, tensor in enumerate(weights):
        if len(tensor.raw_data) > INLINE:
            kept[tensor.name] = tensor
            weights[i] = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            weights[i].data_location = TensorProto.EXTERNAL
            weights[i].external_data.add(key="location", value="kept")
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)
    try:
        newer = onnx.version_converter.convert_version(model, OPSETS[0])
    except Exception as error:  # it raises what its C++ does
        cause = " ".join(str(error).split())[-300:]
        raise BuildError(f"{path} is of opset {opset(model)} and cannot be converted: {cause}; {AGAIN}") from None
    weights = [kept.get(tensor.name, tensor) for tensor in newer.graph.initializer]
    del newer.graph.initializer[:]
    newer.graph.initializer.extend(weights)
    return newer


def operators(model: onnx.ModelProto) -> set[tuple[str, str]]:
    """(domain, name) of every operator that the model runs; ONNX's own have "" for their domain."""
    functions = {(function.domain, function.name) for function in model.functions}
    bodies = (node for function in model.functions for node in function.node)
    used = {(node.domain, node.op_type) for node in nodes([*model.graph.node, *bodies])} - functions
    return {("" if domain in ONNX_DOMAINS else domain, name) for domain, name in used}


def precision(model: onnx.ModelProto) -> str:
    """What most floating-point weights are: `fp32`, `fp16` or `bf16`."""
    values = Counter({"fp32": 0})
    for tensor in tensors(model):
        if tensor.data_type in FLOATS:
            values[FLOATS[tensor.data_type]] += math.prod(tensor.dims)
    return values.most_common(1)[0][0]


def quantisation(used: set[tuple[str, str]]) -> str:
    """How the operators `used` round values to INT8: `dynamic`, by the largest of a batch, `static`, or ""."""
    kinds = (("dynamic", "DynamicQuantizeLinear"), ("static", "QuantizeLinear"))
    return next((kind for kind, name in kinds if ("", name) in used), "")


def check_operators(path: Path, model: onnx.ModelProto, used: set[tuple[str, str]]) -> None:
    """Raises BuildError for an opset or operators that cannot be adopted."""
    if (version := opset(model)) not in (*OLDER, *OPSETS):
        known = f"opsets {OLDER[0]} to {OPSETS[-1]} can be adopted"
        raise BuildError(f"{path} is of opset {version}; {known}: {AGAIN}")
    if foreign := sorted(".".join(name) for name in used if name[0]):
        # OpenVINO takes some of ONNX Runtime's own operators and gives wrong numbers, without a word.
        raise BuildError(
            f"{path} has the operators {', '.join(foreign)}, which are not ONNX's own and which OpenVINO does not "
            "run right: take the model as it was exported, before it was optimised"
        )


def check_inputs(path: Path, model: onnx.ModelProto) -> None:
    """Raises BuildError for inputs that cannot be fed, and for want of those that must be."""
    # Old files list their weights among the inputs.
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: value for value in model.graph.input if value.name not in weights}
    for name, value in inputs.items():
        dtype, shape = value.type.tensor_type.elem_type, shape_of(value)
        if name in IDS:
            if dtype not in INTEGERS or len(shape) != 2:
                raise BuildError(
                    f"{path} declares {name} {_declared(value)}; INT32 or INT64 of two dimensions is fed"
                )
            if shape[1]:
                raise BuildError(
                    f"{path} declares {name} {_declared(value)}, so it was exported for texts of {shape[1]} "
                    "tokens alone: export it again with dynamic axes for batch and sequence"
                )
        elif name.startswith(PAST):
            if dtype not in FLOATS or len(shape) != 4 or not (shape[1] and shape[3]):
                raise BuildError(
                    f"{path} declares {name} {_declared(value)}; FP32, FP16 or BF16 [B, heads, 0, width] is fed, "
                    "heads and width being numbers"
                )
        else:
            raise BuildError(f"{path} has the input {name}; only {', '.join(IDS)} and {PAST}* can be fed")
    for name in IDS[:2]:
        if name not in inputs:
            raise BuildError(f"{path} has no input {name}, so it cannot tell a token from padding")


def check_numbers(path: Path, tensor: TensorProto) -> None:
    """Raises BuildError for a weight with values that are no numbers, which need not show in a trial.

    Infinite ones are left: exporters write them where attention is to see nothing.
    """
    if tensor.data_type not in FLOATS or not tensor.dims:
        return
    if any(np.isnan(part).any() for part in _parts(path, tensor)):
        raise BuildError(f"{path} has values in {tensor.name} that are not numbers: get it again")


def _parts(path: Path, tensor: TensorProto) -> Iterator[npt.NDArray[Any]]:
    """A tensor's values, PART at a time where they lie in another file."""
    if tensor.data_location != TensorProto.EXTERNAL:
        yield numpy_helper.to_array(tensor)
        return
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    start, count = int(place.get("offset", 0)), math.prod(tensor.dims)
    for i in range(0, count, PART):
        file = path.parent / place["location"]
        yield np.fromfile(file, dtype, min(PART, count - i), offset=start + i * dtype.itemsize)


def shape_of(value: onnx.ValueInfoProto) -> list[int]:
    """The declared dimensions, 0 for those that have no number."""
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _declared(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type
    dims = [dim.dim_param or str(dim.dim_value) for dim in kind.shape.dim]
    names = {number: name for name, number in TensorProto.DataType.items()}
    return f"{names.get(kind.elem_type, kind.elem_type)} [{', '.join(dims)}]"
