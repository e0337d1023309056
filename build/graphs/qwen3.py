"""Qwen3 (Qwen Team, 2025, arXiv:2505.09388), the decoder of Qwen3-Embedding and Qwen3-Reranker, on packed tokens.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H] after the final norm, zeros in slots without a token

Causal, grouped-query attention with normalised queries and keys, rotary positions, SwiGLU, RMSNorm, no biases.
"""

from __future__ import annotations

from build.checkpoint import Checkpoint
from build.graphs.blocks import (
    attention,
    causal_mask,
    rms_norm,
    rotary_angles,
    rotate,
    silu,
    split_heads,
)
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.ragged import last_hidden_state, ragged, ragged_inputs


def write_qwen3(g: OnnxGraph, checkpoint: Checkpoint) -> None:
    """Writes the decoder of `checkpoint` into `g`, reading one tensor at a time."""
    config = checkpoint.config
    checkpoint.require("hidden_act", "silu")
    checkpoint.require("attention_bias", False, default=False)
    checkpoint.require("use_sliding_window", False, default=False)
    heads, key_value_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width, epsilon = config["head_dim"], config["rms_norm_eps"]

    def linear(x: str, name: str) -> str:
        return g.linear(x, g.weight(name, checkpoint.tensor(f"{name}.weight")))

    def norm(x: str, name: str) -> str:
        return rms_norm(g, x, g.wide_weight(name, checkpoint.tensor(f"{name}.weight")), epsilon)

    r = ragged(g, *ragged_inputs(g))
    mask = causal_mask(g, r)
    angles = rotary_angles(g, r, checkpoint.rope_theta(), width)

    x = g.op("Gather", g.weight("embed_tokens", checkpoint.tensor("embed_tokens.weight")), r.token_ids)
    for i in range(config["num_hidden_layers"]):
        layer = f"layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q = split_heads(g, linear(h, f"{layer}.self_attn.q_proj"), heads, width)
        k = split_heads(g, linear(h, f"{layer}.self_attn.k_proj"), key_value_heads, width)
        v = split_heads(g, linear(h, f"{layer}.self_attn.v_proj"), key_value_heads, width)
        q = rotate(g, norm(q, f"{layer}.self_attn.q_norm"), angles, width)
        k = rotate(g, norm(k, f"{layer}.self_attn.k_norm"), angles, width)
        context = attention(g, q, k, v, r, mask, width**-0.5, heads, key_value_heads)
        x = g.op("Add", x, linear(context, f"{layer}.self_attn.o_proj"))
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate = silu(g, linear(h, f"{layer}.mlp.gate_proj"))
        up = linear(h, f"{layer}.mlp.up_proj")
        x = g.op("Add", x, linear(g.op("Mul", gate, up), f"{layer}.mlp.down_proj"))
    last_hidden_state(g, norm(x, "norm"), r, config["hidden_size"])
