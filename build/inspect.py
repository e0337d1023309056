"""Shows what an ONNX model takes, gives and holds: `python -m build.inspect MODEL.onnx`."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of one model; returns 1 when the file is not one."""
    parser = argparse.ArgumentParser(prog="python -m build.inspect", description=__doc__)
    parser.add_argument("model", type=Path, help="an ONNX file; external data need not be there")
    path = parser.parse_args(arguments).model
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        print(f"error: {path} is not a readable ONNX model: {error}", file=sys.stderr)
        return 1
    print("\n".join(describe(model)))
    return 0


def describe(model: onnx.ModelProto) -> Iterator[str]:
    """Inputs, outputs, opsets, weights by dtype, and operators, a line each."""
    weights = model.graph.initializer
    yield from _tensors("input", model.graph.input)
    yield from _tensors("output", model.graph.output)
    for opset in model.opset_import:
        yield f"opset    {opset.domain or 'ai.onnx'} {opset.version}"
    for dtype in sorted({weight.data_type for weight in weights}):
        counts = [math.prod(weight.dims) for weight in weights if weight.data_type == dtype]
        size = sum(counts) * onnx.helper.tensor_dtype_to_np_dtype(dtype).itemsize
        name, values = TensorProto.DataType.Name(dtype), sum(counts)
        yield f"weights  {name}: {len(counts)} tensors, {values:,} values, {size / 1e6:.1f} MB"
    operators = Counter(node.op_type for node in model.graph.node)
    yield f"nodes    {len(model.graph.node)}: " + ", ".join(f"{n} {kind}" for kind, n in operators.most_common())


def _tensors(label: str, values: Iterable[onnx.ValueInfoProto]) -> Iterator[str]:
    for value in values:
        tensor = value.type.tensor_type
        shape = [dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim]
        yield f"{label:8} {value.name} {TensorProto.DataType.Name(tensor.elem_type)} [{', '.join(shape)}]"


if __name__ == "__main__":
    sys.exit(main())
