"""Nomic BERT (Nussbaum et al., 2024, arXiv:2402.01613), the encoder of nomic-embed-text, on packed tokens.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H], zeros in slots without a token

BERT with rotary positions and SwiGLU in place of learned positions and GELU, and without biases. Names are those
of the published checkpoint, whose code is not run.
"""

from __future__ import annotations

import numpy as np

from build.checkpoint import Checkpoint
from build.graphs.blocks import attention, key_mask, layer_norm, rotary_angles, rotate, silu, split_heads
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.ragged import last_hidden_state, ragged, ragged_inputs


def write_nomic_bert(g: OnnxGraph, checkpoint: Checkpoint) -> None:
    """Writes the encoder of `checkpoint` into `g`, reading one tensor at a time."""
    config = checkpoint.config
    # The published checkpoint's own names come second.
    if "n_embd" in config:
        checkpoint.require("activation_function", "swiglu")
        checkpoint.require("prenorm", False)
        checkpoint.require("rotary_emb_fraction", 1.0)
        checkpoint.require("rotary_emb_interleaved", False)
    else:
        checkpoint.require("hidden_act", "silu")
    heads = int(checkpoint.field("num_attention_heads", "n_head"))
    theta = config["rotary_emb_base"] if "n_embd" in config else checkpoint.rope_theta()
    width = checkpoint.hidden_size // heads
    epsilon = checkpoint.field("layer_norm_eps", "layer_norm_epsilon")

    def linear(x: str, name: str) -> str:
        return g.linear(x, g.weight(name, checkpoint.tensor(f"{name}.weight")))

    def norm(x: str, name: str) -> str:
        scale, bias = (
            g.wide_weight(f"{name}.{part}", checkpoint.tensor(f"{name}.{part}")) for part in ("weight", "bias")
        )
        return layer_norm(g, x, scale, bias, epsilon)

    r = ragged(g, *ragged_inputs(g))
    mask = key_mask(g, r)
    angles = rotary_angles(g, r, theta, width)

    # One segment per text, so its embedding is folded into every word.
    segment = checkpoint.tensor("embeddings.token_type_embeddings.weight")[0]
    table = checkpoint.tensor("embeddings.word_embeddings.weight") + segment
    x = norm(g.op("Gather", g.weight("embeddings.word_embeddings", table), r.token_ids), "emb_ln")
    for i in range(checkpoint.field("num_hidden_layers", "n_layer")):
        layer = f"encoder.layers.{i}"
        merged = split_heads(g, linear(x, f"{layer}.attn.Wqkv"), 3 * heads, width)
        q, k, v = (
            g.op("Gather", merged, g.constant(np.arange(part * heads, (part + 1) * heads), np.int64), axis=1)
            for part in range(3)
        )
        q, k = rotate(g, q, angles, width), rotate(g, k, angles, width)
        context = attention(g, q, k, v, r, mask, width**-0.5, heads, heads)
        x = norm(g.op("Add", x, linear(context, f"{layer}.attn.out_proj")), f"{layer}.norm1")
        gate = silu(g, linear(x, f"{layer}.mlp.fc12"))
        up = linear(x, f"{layer}.mlp.fc11")
        x = norm(g.op("Add", x, linear(g.op("Mul", gate, up), f"{layer}.mlp.fc2")), f"{layer}.norm2")
    last_hidden_state(g, x, r, checkpoint.hidden_size)
