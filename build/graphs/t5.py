"""T5's encoder (Raffel et al., 2019, arXiv:1910.10683), as sentence-t5 and GTR have it.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H] after the final norm, zeros in slots without a token

No positions, and no other biases than those that attention has by distance, one for each head and bucket of
distances, which the first layer holds for all. Scores are not scaled; RMSNorm before each block; ReLU, or GeGLU
from version 1.1 on. Attention adds them to each score, so it needs rows
[B, heads, S, S]: `torch` does not run this graph.

Hidden states grow past FP16. There they, and the layer that makes the largest of them, stay FP32: transformers
keeps the same layer so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from build.errors import BuildError
from build.graphs.blocks import attention, gelu_tanh, relative_mask
from build.graphs.dimensions import Dimensions
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.parameters import Parameters
from build.graphs.ragged import last_hidden_state, ragged, ragged_inputs
from build.sources.settings import Settings
from build.sources.weights import Weights

WINDOW = 8192
"""Tokens of a text at most where no file has a window: attention's biases are as many times as many."""
KINDS = {"relu": ("relu", False), "gated-gelu": ("gelu_new", True)}
"""`feed_forward_proj` -> its activation, and whether that is of a gate."""


@dataclass(frozen=True, kw_only=True)
class T5(Dimensions):
    """The keys of a checkpoint's `config.json` that shape the graph; defaults are transformers' own."""

    layers: int
    heads: int
    width: int
    """Width of a head."""
    inner: int
    epsilon: float
    is_gated: bool
    buckets: int
    """Of distances, both sides together."""
    farthest: int
    """The distance from which on all are alike."""

    @classmethod
    def of(cls, config: Settings) -> T5:
        """Reads the configuration; raises BuildError on what this graph does not compute, naming the key."""
        config.require("is_decoder", False)
        config.require("feed_forward_proj", *KINDS)
        activation, is_gated = KINDS[config.word("feed_forward_proj", default="relu")]
        config.require("dense_act_fn", activation)
        config.require("is_gated_act", is_gated)
        buckets = config.integer("relative_attention_num_buckets", default=32)
        farthest = config.integer("relative_attention_max_distance", default=128)
        if buckets % 4 or farthest <= buckets // 4:
            raise BuildError(
                f"{config.path} has {buckets} relative_attention_num_buckets for distances of up to {farthest}; "
                "the graph is written for a multiple of 4, and for distances over a fourth of it"
            )
        return cls(
            hidden_size=config.integer("d_model", "hidden_size", default=512),
            vocab_size=config.integer("vocab_size", default=32128),
            positions=WINDOW,
            layers=config.integer("num_layers", "num_hidden_layers", default=6),
            heads=config.integer("num_heads", "num_attention_heads", default=8),
            width=config.integer("d_kv", "head_dim", default=64),
            inner=config.integer("d_ff", default=2048),
            epsilon=config.number("layer_norm_epsilon", default=1e-6),
            is_gated=is_gated,
            buckets=buckets,
            farthest=farthest,
        )


def write_t5(g: OnnxGraph, t5: T5, weights: Weights) -> None:
    """Writes the encoder into `g`, reading one tensor at a time."""
    p, hidden, width, epsilon = Parameters(g, weights), t5.hidden_size, t5.heads * t5.width, t5.epsilon
    # Where states are FP32, what is added to them is widened.
    is_wide = g.dtype == np.float16
    widen = g.widen if is_wide else lambda x: x

    def project(x: str, name: str, outputs: int, inputs: int) -> str:
        return p.linear(x, name, outputs, inputs, bias=False)

    def norm(x: str, name: str) -> str:
        weight = g.wide_weight(f"{name}.weight", weights.tensor(f"{name}.weight", hidden))
        scaled = g.op("RMSNormalization", x if is_wide else g.widen(x), weight, epsilon=epsilon)
        return g.narrow(scaled)

    r = ragged(g, *ragged_inputs(g))
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    offsets = np.arange(-t5.farthest, t5.farthest + 1)
    biases = weights.tensor(name, t5.buckets, t5.heads)[buckets(offsets, t5.buckets, t5.farthest)]
    mask = relative_mask(g, r, g.weight(name, np.ascontiguousarray(biases.T)[None]), t5.farthest)
    words = p.table("shared" if "shared.weight" in weights else "encoder.embed_tokens", t5.vocab_size, hidden)
    x = widen(g.op("Gather", words, r.token_ids))
    for i in range(t5.layers):
        layer = f"encoder.block.{i}.layer.0"
        h = norm(x, f"{layer}.layer_norm")
        q, k, v = (project(h, f"{layer}.SelfAttention.{part}", width, hidden) for part in "qkv")
        context = attention(g, q, k, v, r, mask, 1.0, t5.heads, t5.heads)
        x = g.op("Add", x, widen(project(context, f"{layer}.SelfAttention.o", hidden, width)))
        layer = f"encoder.block.{i}.layer.1"
        h = norm(x, f"{layer}.layer_norm")
        if t5.is_gated:
            gate = gelu_tanh(g, project(h, f"{layer}.DenseReluDense.wi_0", t5.inner, hidden))
            h = g.op("Mul", gate, project(h, f"{layer}.DenseReluDense.wi_1", t5.inner, hidden))
        else:
            h = g.op("Relu", project(h, f"{layer}.DenseReluDense.wi", t5.inner, hidden))
        name = f"{layer}.DenseReluDense.wo"
        weight = weights.tensor(f"{name}.weight", hidden, t5.inner)
        outer = (g.wide_weight if is_wide else g.weight)(f"{name}.weight", weight)
        x = g.op("Add", x, g.linear(widen(h), outer))
    last_hidden_state(g, norm(x, "encoder.final_layer_norm"), r, hidden)


def buckets(offsets: npt.NDArray[np.int64], count: int, farthest: int) -> npt.NDArray[np.int64]:
    """The bucket of each offset of a key from its query: of `count` half for either side.

    Half of those are one place wide, the others grow by a factor up to `farthest`, rounded as the reference does.
    """
    side = count // 2
    exact = side // 2
    distance = np.abs(offsets)
    ratio = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
    steps = np.log(ratio) / np.float32(math.log(farthest / exact)) * np.float32(side - exact)
    own = np.where(distance < exact, distance, np.minimum(exact + steps.astype(np.int64), side - 1))
    return np.asarray(own + side * (offsets > 0), np.int64)
