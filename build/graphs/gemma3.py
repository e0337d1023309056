"""Gemma 3 (Gemma Team, 2025, arXiv:2503.19786) as EmbeddingGemma's encoder, on packed tokens.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H] after the final norm, zeros in slots without a token

Bidirectional (Vera et al., 2025, arXiv:2509.20354): full layers see the whole text, sliding layers a window around
each token. Scaled embeddings, RMSNorm by 1 + weight before and after each block, GeGLU.
"""

from __future__ import annotations

from build.checkpoint import Checkpoint
from build.graphs.blocks import (
    attention,
    gelu_tanh,
    key_mask,
    rms_norm,
    rotary_angles,
    rotate,
    split_heads,
    window_mask,
)
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.ragged import last_hidden_state, ragged, ragged_inputs

SLIDING, FULL = "sliding_attention", "full_attention"


def write_gemma3(g: OnnxGraph, checkpoint: Checkpoint) -> None:
    """Writes the encoder of `checkpoint` into `g`, reading one tensor at a time."""
    config = checkpoint.config
    checkpoint.require("hidden_activation", "gelu_pytorch_tanh")
    checkpoint.require("use_bidirectional_attention", True)
    checkpoint.require("attention_bias", False, default=False)
    heads, key_value_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width, epsilon = config["head_dim"], config["rms_norm_eps"]
    scale = config["query_pre_attn_scalar"] ** -0.5

    def linear(x: str, name: str) -> str:
        return g.linear(x, g.weight(name, checkpoint.tensor(f"{name}.weight")))

    def norm(x: str, name: str) -> str:
        return rms_norm(g, x, g.wide_weight(name, 1 + checkpoint.tensor(f"{name}.weight")), epsilon)

    r = ragged(g, *ragged_inputs(g))
    # The window of the checkpoint spans both sides; distances up to half of it are inside.
    masks = {SLIDING: window_mask(g, r, config["sliding_window"] // 2 + 1), FULL: key_mask(g, r)}
    thetas = {SLIDING: checkpoint.rope_theta(SLIDING), FULL: checkpoint.rope_theta(FULL)}
    angles = {kind: rotary_angles(g, r, theta, width) for kind, theta in thetas.items()}

    words = g.op("Gather", g.weight("embed_tokens", checkpoint.tensor("embed_tokens.weight")), r.token_ids)
    x = g.op("Mul", words, g.scalar(config["hidden_size"] ** 0.5))
    for i, kind in enumerate(config["layer_types"]):
        layer = f"layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q = split_heads(g, linear(h, f"{layer}.self_attn.q_proj"), heads, width)
        k = split_heads(g, linear(h, f"{layer}.self_attn.k_proj"), key_value_heads, width)
        v = split_heads(g, linear(h, f"{layer}.self_attn.v_proj"), key_value_heads, width)
        q = rotate(g, norm(q, f"{layer}.self_attn.q_norm"), angles[kind], width)
        k = rotate(g, norm(k, f"{layer}.self_attn.k_norm"), angles[kind], width)
        context = attention(g, q, k, v, r, masks[kind], scale, heads, key_value_heads)
        projected = linear(context, f"{layer}.self_attn.o_proj")
        x = g.op("Add", x, norm(projected, f"{layer}.post_attention_layernorm"))
        h = norm(x, f"{layer}.pre_feedforward_layernorm")
        gate = gelu_tanh(g, linear(h, f"{layer}.mlp.gate_proj"))
        up = linear(h, f"{layer}.mlp.up_proj")
        inner = linear(g.op("Mul", gate, up), f"{layer}.mlp.down_proj")
        x = g.op("Add", x, norm(inner, f"{layer}.post_feedforward_layernorm"))
    last_hidden_state(g, norm(x, "norm"), r, config["hidden_size"])
