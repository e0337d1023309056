"""Qwen3 (Qwen Team, 2025, arXiv:2505.09388), the decoder of Qwen3-Embedding and Qwen3-Reranker, on packed tokens.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H] after the final norm, zeros in slots without a token

Causal, grouped-query attention with normalised queries and keys, rotary positions, SwiGLU, RMSNorm, no biases.
"""

from __future__ import annotations

from dataclasses import dataclass

from build.errors import BuildError
from build.graphs.blocks import attention, causal_mask, rotary_angles, rotate, silu, split_heads
from build.graphs.dimensions import Dimensions, shared_evenly
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.parameters import Parameters
from build.graphs.ragged import last_hidden_state, ragged, ragged_inputs
from build.graphs.rope import rope_theta
from build.settings import Settings
from build.weights import Weights

FULL = "full_attention"


@dataclass(frozen=True, kw_only=True)
class Qwen3(Dimensions):
    """The keys of a checkpoint's `config.json` that shape the graph; defaults are transformers' own."""

    layers: int
    heads: int
    key_value_heads: int
    width: int
    """Of a head."""
    inner: int
    epsilon: float
    theta: float

    @classmethod
    def of(cls, config: Settings) -> Qwen3:
        """Reads the configuration; raises BuildError on what this page does not write, naming the key."""
        config.require("hidden_act", "silu")
        config.require("attention_bias", False)
        # Told so, transformers 5 lets every token see those behind it; 4 does not.
        config.require("is_causal", True)
        config.require("use_sliding_window", False)
        config.skip(["sliding_window", "max_window_layers"])
        layers = config.integer("num_hidden_layers", default=32)
        if config.words("layer_types", default=[FULL] * layers) != [FULL] * layers:
            raise BuildError(f"{config.path} has layer_types other than {layers} of {FULL}")
        heads = config.integer("num_attention_heads", default=32)
        groups = config.integer("num_key_value_heads", default=32)
        return cls(
            hidden_size=config.integer("hidden_size", default=4096),
            vocab_size=config.integer("vocab_size", default=151936),
            positions=config.integer("max_position_embeddings", default=32768),
            tied=config.flag("tie_word_embeddings", default=False),
            layers=layers,
            heads=heads,
            key_value_heads=shared_evenly(config, heads, groups),
            width=config.integer("head_dim", default=128),
            inner=config.integer("intermediate_size", default=22016),
            epsilon=config.number("rms_norm_eps", default=1e-6),
            theta=rope_theta(config, 10_000.0),
        )


def write_qwen3(g: OnnxGraph, qwen3: Qwen3, weights: Weights) -> None:
    """Writes the decoder into `g`, reading one tensor at a time."""
    p, hidden, width, epsilon = Parameters(g, weights), qwen3.hidden_size, qwen3.width, qwen3.epsilon
    heads, groups = qwen3.heads, qwen3.key_value_heads
    r = ragged(g, *ragged_inputs(g))
    mask = causal_mask(g, r)
    angles = rotary_angles(g, r, qwen3.theta, width)

    def project(x: str, name: str, count: int) -> str:
        return split_heads(g, p.linear(x, name, count * width, hidden, bias=False), count, width)

    x = g.op("Gather", p.table("embed_tokens", qwen3.vocab_size, hidden), r.token_ids)
    for i in range(qwen3.layers):
        layer = f"layers.{i}"
        h = p.rms_norm(x, f"{layer}.input_layernorm", hidden, epsilon)
        q, k, v = (
            project(h, f"{layer}.self_attn.{name}_proj", count)
            for name, count in (("q", heads), ("k", groups), ("v", groups))
        )
        q = rotate(g, p.rms_norm(q, f"{layer}.self_attn.q_norm", width, epsilon), angles, width)
        k = rotate(g, p.rms_norm(k, f"{layer}.self_attn.k_norm", width, epsilon), angles, width)
        context = attention(g, q, k, v, r, mask, width**-0.5, heads, groups)
        x = g.op("Add", x, p.linear(context, f"{layer}.self_attn.o_proj", hidden, heads * width, bias=False))
        h = p.rms_norm(x, f"{layer}.post_attention_layernorm", hidden, epsilon)
        gate = silu(g, p.linear(h, f"{layer}.mlp.gate_proj", qwen3.inner, hidden, bias=False))
        up = p.linear(h, f"{layer}.mlp.up_proj", qwen3.inner, hidden, bias=False)
        down = p.linear(g.op("Mul", gate, up), f"{layer}.mlp.down_proj", hidden, qwen3.inner, bias=False)
        x = g.op("Add", x, down)
    last_hidden_state(g, p.rms_norm(x, "norm", hidden, epsilon), r, hidden)
