"""Puts another graph into ours: the nodes that are needed, under names of their own, between new ends."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper

from build.graphs.exported import INLINE
from build.graphs.onnx_graph import OnnxGraph
from build.sources.onnx_file import data_files, external_tensors, nodes, subgraphs

PREFIX = "adopted/"
"""Put before every name of the old graph, so that it meets none of ours."""


def graft(
    g: OnnxGraph, path: Path, model: onnx.ModelProto, feeds: Mapping[str, str], outputs: Sequence[str]
) -> list[str]:
    """Adds to `g` what the `outputs` of `model`, which was read from `path`, follow from; returns their new names.

    `feeds` has for each input of the old graph the value of ours that takes its place.
    """
    old_nodes, weights = _needed(model.graph, outputs)
    _rename(old_nodes, weights, feeds)
    g.graft(model, old_nodes, _moved(g, path, model, weights))
    return [feeds.get(name, PREFIX + name) for name in outputs]


def _needed(graph: onnx.GraphProto, outputs: Collection[str]) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """The nodes, in order, and weights that `outputs` follow from."""
    needed, kept = {*outputs}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(name for inner in nodes([node]) for name in inner.input)
            kept.append(node)
    return kept[::-1], [tensor for tensor in graph.initializer if tensor.name in needed]


def _rename(old: Iterable[onnx.NodeProto], weights: Iterable[TensorProto], feeds: Mapping[str, str]) -> None:
    """Gives everything its PREFIX, and values that are fed the name of what feeds them."""

    def renamed(names: Iterable[str]) -> list[str]:
        # An empty name stands for an optional input or output that is left out.
        return [name and feeds.get(name, PREFIX + name) for name in names]

    for tensor in weights:
        tensor.name = PREFIX + tensor.name
    for node in old:
        node.name = node.name and PREFIX + node.name
        node.input[:], node.output[:] = renamed(node.input), renamed(node.output)
        # Exporters note where in their source, on their disk, a node came from.
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
        for graph in subgraphs(node):
            for value in (*graph.input, *graph.output):
                value.name = renamed([value.name])[0]
            del graph.value_info[:]
            _rename(graph.node, graph.initializer, feeds)


def _moved(g: OnnxGraph, path: Path, model: onnx.ModelProto, weights: Iterable[TensorProto]) -> list[TensorProto]:
    """Copies files of weights whole, and large weights of the model file into ours; returns the others."""
    names = {name: g.copy(path.parent / name, name) for name in data_files(model)}
    for tensor in external_tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = names[entry.value]
    others = []
    for tensor in weights:
        # Unlike where a type packs several values into a byte.
        size = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * math.prod(tensor.dims)
        if INLINE < len(tensor.raw_data) == size:
            g.own_weight(tensor.name, numpy_helper.to_array(tensor))
        else:
            others.append(tensor)
    return others
