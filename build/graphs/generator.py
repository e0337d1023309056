"""A language model with a cache of keys and values, as OpenVINO IR that openvino-genai batches continuously.

Input   input_ids, attention_mask, position_ids INT64 [B, S], beam_idx INT32 [B]
Output  logits FP32 [B, S, vocabulary], moved so that the lowest is MOST_PENALTY
State   keys and values of each layer, FP32 [B, groups, tokens so far, width]

The decoder is that of `build.graphs.decoder`: Llama (arXiv:2302.13971), Qwen2 (arXiv:2407.10671) and Qwen3
(arXiv:2505.09388). openvino-genai puts paged attention (Kwon et al., 2023, arXiv:2309.06180) in the place of cache
and attention, which it knows by their nodes: so these are written as it expects them, and not by ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import openvino as ov
import openvino.opset13 as op
from openvino.op.util import Variable, VariableInfo

from build.errors import BuildError
from build.graphs.decoder import Decoder

Node: TypeAlias = Any
"""A node of OpenVINO's graph, which has no types."""

MODEL = "openvino_model.xml"
"""How openvino-genai finds the graph; its weights lie beside it."""

MOST_PENALTY = 2.0
"""Of presence, in OpenAI's API; that of frequency comes behind it."""

LAST = np.iinfo(np.int64).max


class Tensors(Protocol):
    """What a decoder's weights are read from, by transformers' names without the prefix `model.`."""

    def __contains__(self, name: str) -> bool: ...

    def tensor(self, name: str, /, *shape: int) -> npt.NDArray[np.float32]:
        """One tensor; BuildError when there is none of that shape."""
        ...


def write_least(decoder: Decoder, vocabulary: int, path: Path) -> None:
    """Writes a graph that answers nothing, for a vocabulary of that size: grammars are tried on it."""
    least = replace(
        decoder,
        vocab_size=vocabulary,
        hidden_size=1,
        inner=1,
        heads=1,
        key_value_heads=1,
        windows=decoder.windows[:1],
        tied=True,
    )
    ov.save_model(_Writer(least, _Zeros(), "fp32").model(), path, compress_to_fp16=False)


class _Zeros:
    """Tensors of any name."""

    def __contains__(self, name: str) -> bool:
        return True

    def tensor(self, _: str, *shape: int) -> npt.NDArray[np.float32]:
        return np.zeros(shape, np.float32)


def write_generator(decoder: Decoder, weights: Tensors, longest: int, precision: str, path: Path) -> None:
    """Writes the graph, and its weights in a `precision` beside it, fp32 or bf16.

    Raises BuildError for a window that hides something in a text of `longest` tokens, and for attention to both
    sides.
    """
    if not decoder.is_causal or any(window is not None and window < longest for window in decoder.windows):
        raise BuildError(
            "a language model is written with causal attention to all tokens before, and this one has other"
        )
    ov.save_model(_Writer(decoder, weights, precision).model(), path, compress_to_fp16=False)


class _Writer:
    """Writes one graph."""

    def __init__(self, decoder: Decoder, weights: Tensors, precision: str) -> None:
        self.d, self.weights, self.precision = decoder, weights, precision
        self.sinks: list[Node] = []
        self.ids, self.mask, self.places = (_input(n, [-1, -1], ov.Type.i64) for n in NAMES)
        self.beams = _input("beam_idx", [-1], ov.Type.i32)
        self.batch = op.gather(op.shape_of(self.ids), _whole([0]), _whole(0))

    def model(self) -> ov.Model:
        d = self.d
        visible = self._visible()
        angles = self._angles()
        table = self._weight("embed_tokens.weight", d.vocab_size, d.hidden_size)
        x = op.gather(table, self.ids, _whole(0))
        for i in range(d.layers):
            x = self._layer(x, f"layers.{i}", i, visible, angles)
        head = table if d.tied else self._weight("lm_head.weight", d.vocab_size, d.hidden_size)
        logits = op.matmul(self._norm(x, "norm", d.hidden_size), head, False, True)
        # openvino-genai takes a penalty from logits of 0 and more, and adds it to others: so all are made such.
        least = op.reduce_min(logits, _whole([-1]), True)
        logits = op.add(logits, op.subtract(_real(MOST_PENALTY), least))
        logits.output(0).set_names({"logits"})
        return ov.Model(
            [op.result(logits)], self.sinks, [self.ids, self.mask, self.places, self.beams], "generator"
        )

    def _layer(self, x: Node, layer: str, i: int, visible: Node, angles: tuple[Node, Node]) -> Node:
        d, attention = self.d, f"{layer}.self_attn"
        h = self._norm(x, f"{layer}.input_layernorm", d.hidden_size)
        q, k, v = (
            op.reshape(
                self._linear(h, f"{attention}.{name}_proj", count * d.width, d.hidden_size, d.has_biases),
                _whole([0, 0, count, d.width]),
                True,
            )
            for name, count in (("q", d.heads), ("k", d.key_value_heads), ("v", d.key_value_heads))
        )
        if d.has_norms:
            q, k = self._norm(q, f"{attention}.q_norm", d.width), self._norm(k, f"{attention}.k_norm", d.width)
        q, k, v = (op.transpose(t, _whole([0, 2, 1, 3])) for t in (q, k, v))
        k = self._remembered(_rotated(k, angles, d.width), f"past_key_values.{i}.key")
        v = self._remembered(v, f"past_key_values.{i}.value")
        scale = op.constant(np.float32(d.width**-0.5))
        context = op.scaled_dot_product_attention(
            _rotated(q, angles, d.width), self._repeated(k), self._repeated(v), visible, scale, causal=False
        )
        joined = op.reshape(op.transpose(context, _whole([0, 2, 1, 3])), _whole([0, 0, d.heads * d.width]), True)
        x = op.add(x, self._linear(joined, f"{attention}.o_proj", d.hidden_size, d.heads * d.width))
        h = self._norm(x, f"{layer}.post_attention_layernorm", d.hidden_size)
        gate = op.swish(self._linear(h, f"{layer}.mlp.gate_proj", d.inner, d.hidden_size))
        up = self._linear(h, f"{layer}.mlp.up_proj", d.inner, d.hidden_size)
        return op.add(x, self._linear(op.multiply(gate, up), f"{layer}.mlp.down_proj", d.hidden_size, d.inner))

    def _visible(self) -> Node:
        """[B, 1, S, all]: 0 for the tokens that one sees, those before it and itself; else the least number."""
        new = op.gather(op.shape_of(self.ids), _whole(1), _whole(0))
        total = op.gather(op.shape_of(self.mask), _whole(1), _whole(0))
        rows = op.range(op.subtract(total, new), total, _whole(1), ov.Type.i64)
        columns = op.range(_whole(0), total, _whole(1), ov.Type.i64)
        before = op.less_equal(op.unsqueeze(columns, _whole(0)), op.unsqueeze(rows, _whole(1)))
        there = op.unsqueeze(op.convert(self.mask, ov.Type.boolean), _whole([1, 2]))
        seen = op.logical_and(there, op.unsqueeze(before, _whole([0, 1])))
        return op.select(seen, _real(0), _real(np.finfo(np.float32).min))

    def _angles(self) -> tuple[Node, Node]:
        """Cosines and sines of every place, [B, 1, S, width]."""
        rotation = self.d.rotation
        frequencies = np.array(rotation.frequencies, np.float32)[None, None]
        places = op.unsqueeze(op.convert(self.places, ov.Type.f32), _whole(2))
        half = op.matmul(places, op.constant(frequencies), False, False)
        angles = op.unsqueeze(op.concat([half, half], -1), _whole(1))
        cos, sin = op.cos(angles), op.sin(angles)
        if rotation.scale != 1:
            cos, sin = (op.multiply(one, _real(rotation.scale)) for one in (cos, sin))
        return cos, sin

    def _remembered(self, x: Node, name: str) -> Node:
        """The keys or values of all tokens so far, which are kept."""
        shape = [-1, self.d.key_value_heads, -1, self.d.width]
        info = VariableInfo()
        info.data_shape, info.data_type, info.variable_id = ov.PartialShape(shape), ov.Type.f32, name
        variable = Variable(info)
        nothing = op.concat([self.batch, _whole([shape[1]]), _whole([0]), _whole([shape[3]])], 0)
        before = op.read_value(op.broadcast(_real(0), nothing), variable)
        x = op.concat([op.gather(before, self.beams, _whole(0)), x], 2)
        self.sinks.append(op.assign(x, variable))
        return x

    def _repeated(self, x: Node) -> Node:
        """Keys or values for each head of queries."""
        heads, groups = self.d.heads, self.d.key_value_heads
        if heads == groups:
            return x
        batch, rest = (op.gather(op.shape_of(x), _whole(axes), _whole(0)) for axes in ([0, 1], [2, 3]))
        wide = op.concat([batch, _whole([heads // groups]), rest], 0)
        wide = op.broadcast(op.unsqueeze(x, _whole(2)), wide, broadcast_spec="BIDIRECTIONAL")
        first = op.gather(op.shape_of(x), _whole([0]), _whole(0))
        return op.reshape(wide, op.concat([first, _whole([heads]), rest], 0), False)

    def _norm(self, x: Node, name: str, width: int) -> Node:
        mean = op.reduce_mean(op.multiply(x, x), _whole([-1]), True)
        unit = op.multiply(x, op.divide(_real(1), op.sqrt(op.add(mean, _real(self.d.epsilon)))))
        return op.multiply(unit, self._weight(f"{name}.weight", width))

    def _linear(self, x: Node, name: str, outputs: int, inputs: int, bias: bool = False) -> Node:
        x = op.matmul(x, self._weight(f"{name}.weight", outputs, inputs), False, True)
        return op.add(x, self._weight(f"{name}.bias", outputs)) if bias else x

    def _weight(self, name: str, *shape: int) -> Node:
        values = self.weights.tensor(name, *shape)
        if self.precision == "fp32" or len(shape) == 1:
            return op.constant(values)
        return op.convert(op.constant(values, ov.Type.bf16), ov.Type.f32)


NAMES = ("input_ids", "attention_mask", "position_ids")


def _rotated(x: Node, angles: tuple[Node, Node], width: int) -> Node:
    """Each pair of values, half a head apart, turned by its angle."""
    half, axis, one = width // 2, _whole([3]), _whole([1])
    first = op.slice(x, _whole([0]), _whole([half]), one, axis)
    second = op.slice(x, _whole([half]), _whole([LAST]), one, axis)
    turned = op.concat([op.multiply(second, _real(-1)), first], -1)
    return op.add(op.multiply(x, angles[0]), op.multiply(turned, angles[1]))


def _input(name: str, shape: Sequence[int], kind: ov.Type) -> Node:
    node = op.parameter(shape, kind, name=name)
    node.output(0).set_names({name})
    return node


def _whole(value: int | list[int]) -> Node:
    return op.constant(np.asarray(value, np.int64))


def _real(value: float | np.floating[Any]) -> Node:
    return op.constant(np.asarray(value, np.float32))
