"""Reads an ONNX file as data: its graph, and which files beside it hold weights, which stay unread."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto, helper

from build.errors import BuildError
from build.sources.files import homes

LARGEST = 2 << 30
"""Bytes of a protobuf message."""

PACKED: dict[int, int] = {
    TensorProto.UINT4: 2,
    TensorProto.INT4: 2,
    TensorProto.FLOAT4E2M1: 2,
    TensorProto.UINT2: 4,
    TensorProto.INT2: 4,
}
"""Type -> how many of its values are in a byte, where it is several."""

SIZES = {
    number: int(helper.tensor_dtype_to_np_dtype(number).itemsize)
    for name, number in TensorProto.DataType.items()
    if name != "UNDEFINED"
}
"""Type -> bytes of a value, or of as many as are in a byte."""


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model in `path`, its external data left where it is.

    Raises BuildError when the file is no ONNX model or contradicts itself, and when a file of its weights is
    missing, too short, the model itself or outside the model's folder.
    """
    model = parse_onnx(path)
    for location, size in _external_data(model).items():
        if Path(location).is_absolute() or ".." in Path(location).parts:
            raise BuildError(f"{path} asks for weights outside of its folder, in {location!r}")
        file = path.parent / location
        try:
            is_there = file.is_file()
        except (OSError, ValueError):  # no file can have such a name
            is_there = False
        if not is_there:
            raise BuildError(f"{path} has weights in {location!r}, which is not there: get that file too")
        real = file.resolve()
        if not any(real.is_relative_to(home) for home in homes(path.parent)):
            raise BuildError(f"{path} asks for weights outside of its folder: {file} is a link to {real}")
        if real == path.resolve():
            raise BuildError(f"{path} asks for weights in itself: export the model again")
        if (found := file.stat().st_size) < size:
            raise BuildError(f"{file} has {found} bytes, but {path.name} has weights up to {size}: get it again")
    return model


def parse_onnx(path: Path) -> onnx.ModelProto:
    """The same without a look at other files."""
    try:
        if path.stat().st_size > LARGEST:
            raise BuildError(
                f"{path} is over 2 GB, which no ONNX file may be: large weights lie in files beside it"
            )
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BuildError(f"{path} is not a readable ONNX model: {error}") from None
    # Any bytes may parse, such as the pointer that git leaves in place of a large file.
    if not model.graph.node or not model.opset_import:
        raise BuildError(f"{path} is not a readable ONNX model: it has no graph")
    # In this order: what comes later takes texts for texts.
    for problem in chain(_texts(model), _cycle(model), _sizes(model)):
        raise BuildError(f"{path} is damaged: {problem}; get it again")
    return model


def _texts(message: Message) -> Iterator[str]:
    """What is no text where a text belongs; protobuf itself hands it over as bytes."""
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        if field.message_type is not None:
            for one in values:
                yield from _texts(one)
        elif field.type == field.TYPE_STRING:
            yield from (f"{one!r} is not UTF-8" for one in values if isinstance(one, bytes))


def _cycle(model: onnx.ModelProto) -> Iterator[str]:
    """A function that calls itself, through others or not: readers that put bodies in place never end."""
    calls = {
        (function.domain, function.name): {(node.domain, node.op_type) for node in nodes(function.node)}
        for function in model.functions
    }
    while calls:
        leaves = [name for name, called in calls.items() if not called & calls.keys()]
        if not leaves:
            yield f"its function {min(calls)[1]} calls itself"
            return
        for name in leaves:
            del calls[name]


def _sizes(model: onnx.ModelProto) -> Iterator[str]:
    """Tensors whose bytes are not those of their type and shape."""
    for tensor in tensors(model):
        if tensor.data_type not in SIZES:
            yield f"{tensor.name} is of a type that is not known, {tensor.data_type}"
        elif any(dim < 0 for dim in tensor.dims):
            yield f"{tensor.name} has the shape {list(tensor.dims)}"
        elif tensor.data_location == TensorProto.EXTERNAL:
            yield from _place(tensor)
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != _size(tensor):
            yield f"{tensor.name} has {len(tensor.raw_data)} bytes of the {_size(tensor)} of its shape"


def _place(tensor: TensorProto) -> Iterator[str]:
    """What is wrong with where a tensor's values lie."""
    entry = {item.key: item.value for item in tensor.external_data}
    if not entry.get("location"):
        yield f"{tensor.name} lies in another file, which it does not name"
    for key in ("offset", "length"):
        if not entry.get(key, "0").isdecimal():
            yield f"{tensor.name} has the {key} {entry[key]!r}"
            return
    if int(entry.get("length", 0)) not in (0, _size(tensor)):
        yield f"{tensor.name} has {entry['length']} bytes of the {_size(tensor)} of its shape"


def _size(tensor: TensorProto) -> int:
    """Bytes of a tensor's values."""
    values: int = math.prod(tensor.dims)
    return -(-SIZES[tensor.data_type] * values // PACKED.get(tensor.data_type, 1))


def data_files(model: onnx.ModelProto) -> list[str]:
    """Names of the files that hold weights of `model`, as it writes them: relative to its folder."""
    return sorted(_external_data(model))


def nodes(of: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and all that lie inside them, in the branches of an If or the body of a Loop."""
    for node in of:
        yield node
        for graph in subgraphs(node):
            yield from nodes(graph.node)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node holds as attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor: weights, and constants of nodes wherever they are."""
    yield from model.graph.initializer
    inside = list(nodes(model.graph.node))
    for function in model.functions:
        inside += nodes(function.node)
    for node in inside:
        for graph in subgraphs(node):
            yield from graph.initializer
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t


def external_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor whose values lie in another file."""
    return (tensor for tensor in tensors(model) if tensor.data_location == TensorProto.EXTERNAL)


def _external_data(model: onnx.ModelProto) -> dict[str, int]:
    """File of weights -> the bytes that it must have at least."""
    sizes: dict[str, int] = {}
    for tensor in external_tensors(model):
        entry = {item.key: item.value for item in tensor.external_data}
        end, location = int(entry.get("offset", 0)) + _size(tensor), entry["location"]
        sizes[location] = max(end, sizes.get(location, 0))
    return sizes
