"""Reads an ONNX file as data: its graph, and which files beside it hold weights, which stay unread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from build.errors import BuildError


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model in `path`, its external data left where it is.

    Raises BuildError when the file is no ONNX model, and when a file of its weights is missing, too short or
    outside the model's folder.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BuildError(f"{path} is not a readable ONNX model: {error}") from None
    # Any bytes may parse, such as the pointer that git leaves in place of a large file.
    if not model.graph.node or not model.opset_import:
        raise BuildError(f"{path} is not a readable ONNX model: it has no graph")
    for location, size in _external_data(model).items():
        if Path(location).is_absolute() or ".." in Path(location).parts:
            raise BuildError(f"{path} asks for weights outside of its folder, in {location!r}")
        file = path.parent / location
        if not file.is_file():
            raise BuildError(f"{path} has weights in {location}, which is not there: get that file too")
        if (found := file.stat().st_size) < size:
            raise BuildError(f"{file} has {found} bytes, but {path.name} has weights up to {size}: get it again")
    return model


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


def external_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor whose values lie in another file: weights, and constants of nodes wherever they are."""
    found: list[TensorProto] = list(model.graph.initializer)
    inside = list(nodes(model.graph.node))
    for function in model.functions:
        inside += nodes(function.node)
    for node in inside:
        for graph in subgraphs(node):
            found += graph.initializer
        for attribute in node.attribute:
            found += attribute.tensors
            if attribute.HasField("t"):
                found.append(attribute.t)
    return (tensor for tensor in found if tensor.data_location == TensorProto.EXTERNAL)


def _external_data(model: onnx.ModelProto) -> dict[str, int]:
    """File of weights -> the bytes that it must have at least."""
    sizes: dict[str, int] = {}
    for tensor in external_tensors(model):
        entry = {item.key: item.value for item in tensor.external_data}
        end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
        location = entry.get("location", "")
        sizes[location] = max(end, sizes.get(location, 0))
    return sizes
