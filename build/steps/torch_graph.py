"""Runs a graph on packed tokens with torch: attention apart, all between compiled on a GPU.

The nodes between two attentions are one `torch.fx` module. Layers are alike, so a module is made and compiled once
for all that differ in nothing but their weights, which it takes as arguments. Linear layers that read the same
values become one matrix product. Attention runs between the modules, on tokens of texts end to end:

packed.Attention    q [T, heads * d], k and v [T, kv_heads * d] or with their heads apart, lengths INT32 [B] ->
                    [T, heads * d]: softmax(scale q k^T) v within each text, over the keys up to the query
                    (`is_causal`) or all of them, and no more than `window` places away; tokens of a text that
                    are seen by none come last and are no keys

FP32 is computed in FP32, without TF32, and sums of 16-bit products are kept in FP32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from .torch_operators import DTYPES, OPERATORS, PACKED, Number, linear_by

ATTENTION = f"{PACKED}.Attention"


@dataclass(frozen=True)
class Texts:
    """How the tokens of a batch divide into texts."""

    counts: Sequence[int]
    """Tokens of each."""
    device: torch.device
    seen: Sequence[int] | None = None
    """Of these, those that others see, which come first; None for all."""

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(self.counts)

    @cached_property
    def ends(self) -> Tensor:
        """INT32 [B + 1]: where texts end, after a first 0."""
        ends = torch.tensor([0, *self.counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return to_device(ends, self.device)

    @cached_property
    def keys(self) -> Tensor | None:
        """INT32 [B]: those that are seen, where there are others."""
        return None if self.seen is None else to_device(torch.tensor(self.seen, dtype=torch.int32), self.device)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor without waiting for what the GPU is doing."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@dataclass(frozen=True)
class Node:
    """One operator of a graph."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stretch:
    """Nodes between two attentions, as one function."""

    run: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dead: tuple[str, ...]
    """Values that nothing reads after it."""


@dataclass(frozen=True)
class Attention:
    """One attention."""

    node: Node
    dead: tuple[str, ...]


class TorchGraph:
    """A graph on one device."""

    def __init__(self, path: Path, device: torch.device, compiled: bool = False, tile: int | None = None) -> None:
        """Reads it, weights one at a time; raises ValueError on an operator that it does not know.

        With a `tile`, linear layers take so many rows at a time, and their kernel is always the same.
        """
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        graph = onnx.load(path, load_external_data=False).graph
        self._weights = Weights(path, graph.initializer)
        self._device = device
        self._compiled = compiled
        self._operators = OPERATORS | ({"Gemm": linear_by(tile)} if tile else {})
        self.outputs = [value.name for value in graph.output]
        nodes = [_node(node) for node in graph.node]
        for node in nodes:
            if node.kind not in (*OPERATORS, ATTENTION):
                raise ValueError(f"{path} has the operator {node.kind}, which is not written for torch")
        self.modules: dict[str, Callable[..., tuple[Tensor, ...]]] = {}
        """What tells stretches apart -> the function that they share."""
        self._program = list(self._divide(nodes))
        self._weights.move(device)

    def __call__(self, feeds: Mapping[str, Tensor], texts: Texts | None = None) -> dict[str, Tensor]:
        """Every output by name, for inputs by name; a graph with attention needs to know the `texts`."""
        values = dict(feeds)
        for step in self._program:
            if isinstance(step, Attention):
                assert texts is not None
                q, k, v = (values[name] for name in step.node.inputs[:3])
                values[step.node.output] = attend(q, k, v, texts, **step.node.attributes)
            else:
                arguments = [values[n] if n in values else self._weights.tensors[n] for n in step.inputs]
                if self._compiled:
                    for name, argument in zip(step.inputs, arguments, strict=True):
                        if name in values:  # of any number of tokens
                            torch._dynamo.maybe_mark_dynamic(argument, 0)
                values.update(zip(step.outputs, step.run(*arguments), strict=True))
                del arguments
            for name in step.dead:
                del values[name]
        return {name: values[name] for name in self.outputs}

    def _divide(self, nodes: Sequence[Node]) -> Iterator[Stretch | Attention]:
        parts: list[list[Node]] = []
        for node in nodes:
            if node.kind == ATTENTION or not parts or parts[-1][0].kind == ATTENTION:
                parts.append([])
            parts[-1].append(node)
        # Backwards: what nobody reads later is dead.
        constants = self._weights.tensors.keys() | self._weights.numbers.keys()
        needed, program = set(self.outputs), list[tuple[list[Node], tuple[str, ...], tuple[str, ...]]]()
        for part in reversed(parts):
            made = [node.output for node in part]
            reads = dict.fromkeys(name for node in part for name in node.inputs if name not in constants)
            given = tuple(name for name in made if name in needed)
            dead = tuple(name for name in reads if name not in needed and name not in made)
            program.append((part, given, dead))
            needed |= reads.keys()
        for part, given, dead in reversed(program):
            if part[0].kind == ATTENTION:
                yield Attention(part[0], dead)
            else:
                yield self._stretch(self._joined(part), given, dead)

    def _joined(self, nodes: Sequence[Node]) -> list[Node]:
        """The nodes with one matrix product for all linear layers that read the same values."""
        groups: dict[tuple[str, int], list[Node]] = {}
        for node in nodes:
            if node.kind == "Gemm":
                groups.setdefault((node.inputs[0], len(node.inputs)), []).append(node)
        shared: dict[str, list[Node]] = {}
        for (x, _), group in groups.items():
            if len(group) == 1:
                continue
            widths = {node.inputs[1]: len(self._weights.tensors[node.inputs[1]]) for node in group}
            parameters = [
                self._weights.join(names, self._device)
                for names in zip(*(n.inputs[1:] for n in group), strict=True)
            ]
            together = Node("Gemm", (x, *parameters), f"{group[0].output} joined")
            shared[group[0].output], start = [together], 0
            for node in group:
                width = widths[node.inputs[1]]
                part = Node(f"{PACKED}.Part", (together.output,), node.output, {"start": start, "width": width})
                shared.setdefault(node.output, []).append(part)
                start += width
        return [replacement for node in nodes for replacement in shared.get(node.output, [node])]

    def _stretch(self, nodes: Sequence[Node], outputs: tuple[str, ...], dead: tuple[str, ...]) -> Stretch:
        made = {node.output: i for i, node in enumerate(nodes)}
        read = dict.fromkeys(name for node in nodes for name in node.inputs if name not in made)
        inputs = tuple(name for name in read if name not in self._weights.numbers)
        # A node's value by the node's place; an input by its own and, where it is a weight, its shape; a number.
        labels: dict[str, Any] = dict(self._weights.numbers)
        labels |= {name: ("input", i, self._weights.form(name)) for i, name in enumerate(inputs)}
        labels |= {name: ("node", i) for name, i in made.items()}
        written = [(n.kind, [labels[name] for name in n.inputs], dict(n.attributes)) for n in nodes]
        key = repr((written, [labels[name] for name in outputs]))
        if key not in self.modules:
            module = self._module(nodes, inputs, outputs)
            self.modules[key] = torch.compile(module) if self._compiled else module
        return Stretch(self.modules[key], inputs, outputs, dead)

    def _module(self, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str]) -> Any:
        graph = torch.fx.Graph()
        values: dict[str, Any] = dict(self._weights.numbers)
        values |= {name: graph.placeholder(f"input_{i}") for i, name in enumerate(inputs)}
        for node in nodes:
            arguments = tuple(values[name] for name in node.inputs)
            values[node.output] = graph.call_function(self._operators[node.kind], arguments, dict(node.attributes))
        graph.output(tuple(values[name] for name in outputs))
        return torch.fx.GraphModule(torch.nn.Module(), graph)


class Weights:
    """The constants of a graph by name."""

    def __init__(self, path: Path, initializers: Sequence[TensorProto]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.numbers: dict[str, Number] = {}
        data = path.with_name(f"{path.name}.data")
        # Mapped, not read: a CPU computes on it in place, a GPU gets one tensor after another.
        size = data.stat().st_size if data.exists() else 0
        mapped = torch.from_file(str(data), size=size, dtype=torch.uint8)
        for tensor in initializers:
            if tensor.data_location == TensorProto.EXTERNAL:
                place = {entry.key: entry.value for entry in tensor.external_data}
                start, length = int(place["offset"]), int(place["length"])
                values = mapped[start : start + length].view(DTYPES[tensor.data_type])
                self.tensors[tensor.name] = values.view(*tensor.dims)
                continue
            array = numpy_helper.to_array(tensor)
            if array.ndim == 0 or (array.ndim == 1 and array.dtype.kind == "i"):
                self.numbers[tensor.name] = array.tolist()
            else:
                self.tensors[tensor.name] = torch.from_numpy(array.copy())

    def form(self, name: str) -> tuple[Any, ...]:
        """What two weights of one function have in common; nothing of what is no weight."""
        weight = self.tensors.get(name)
        return () if weight is None else (weight.dtype, *weight.shape)

    def join(self, names: Sequence[str], device: torch.device) -> str:
        """Puts tensors into one, row after row, and lets go of them; returns its name."""
        parts = [self.tensors.pop(name) for name in names]
        joined = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype, device=device)
        for place, part in zip(joined.split([len(part) for part in parts]), parts, strict=True):
            place.copy_(part)
        name = " ".join(names)
        self.tensors[name] = joined
        return name

    def move(self, device: torch.device) -> None:
        """Moves every tensor there, one at a time."""
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor.to(device)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    texts: Texts,
    scale: float,
    q_num_heads: int,
    kv_num_heads: int,
    is_causal: int = 0,
    window: int | None = None,
) -> Tensor:
    """`packed.Attention`; what it gives for tokens behind the last text has no meaning."""
    q, k, v = (
        x.reshape(len(x), n, -1) for x, n in zip((q, k, v), (q_num_heads, *[kv_num_heads] * 2), strict=True)
    )
    shared = q_num_heads != kv_num_heads
    if q.is_cuda and q.dtype != torch.float32:
        before = -1 if window is None else window
        context = varlen_attn(
            *(q, k, v, texts.ends, texts.ends, texts.longest, texts.longest),
            scale=scale,
            window_size=(before, 0 if is_causal else before),
            enable_gqa=shared,
            # Its windows are counted from the last key: right, as a window is no narrower than such a text.
            seqused_k=texts.keys,
            # One order of sums for a text, whatever is beside it.
            num_splits=1,
        )
        return context.flatten(1)
    # There is no such kernel for a CPU or in FP32.
    context = torch.zeros_like(q)
    start = 0
    for count, keys in zip(texts.counts, texts.seen or texts.counts, strict=True):
        own, seen = slice(start, start + count), slice(start, start + keys)
        places = torch.arange(count, device=q.device)
        near = None
        if window is not None:
            distance = places[:, None] - places[:keys]
            near = (distance <= window) & (distance >= (0 if is_causal else -window))
        context[own] = functional.scaled_dot_product_attention(
            *(x[part].transpose(0, 1)[None] for x, part in ((q, own), (k, seen), (v, seen))),
            attn_mask=near,
            is_causal=bool(is_causal) and near is None,
            scale=scale,
            enable_gqa=shared,
        )[0].transpose(0, 1)
        start += count
    return context.flatten(1)


def _node(node: onnx.NodeProto) -> Node:
    kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    words = {key: value.decode() if isinstance(value, bytes) else value for key, value in attributes.items()}
    return Node(kind, tuple(node.input), node.output[0], words)
