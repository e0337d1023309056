"""GTE (Zhang et al., 2024, arXiv:2407.19669), the encoder of gte-multilingual, on packed tokens.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H], zeros in slots without a token

BERT with rotary positions and GeGLU in place of learned positions and GELU. Names are those of the published
checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from build.graphs.blocks import attention, gelu, halves, key_mask, rotary_angles, rotate, split_merged
from build.graphs.dimensions import Dimensions, split_evenly
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.parameters import Parameters
from build.graphs.ragged import last_hidden_state, ragged, ragged_inputs
from build.graphs.rope import Rotation, rope_theta
from build.settings import Settings
from build.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Gte(Dimensions):
    """The keys of a checkpoint's `config.json` that shape the graph; defaults are transformers' own."""

    layers: int
    heads: int
    width: int
    """Of a head."""
    inner: int
    epsilon: float
    theta: float

    @classmethod
    def of(cls, config: Settings) -> Gte:
        """Reads the configuration; raises BuildError on what this page does not write, naming the key."""
        config.require("hidden_act", "gelu")
        hidden_size = config.integer("hidden_size", default=768)
        heads = config.integer("num_attention_heads", default=12)
        width = split_evenly(config, hidden_size, heads)
        config.require("head_dim", width)
        return cls(
            hidden_size=hidden_size,
            vocab_size=config.integer("vocab_size", default=250048),
            positions=config.integer("max_position_embeddings", default=8192),
            token_types=config.integer("type_vocab_size", default=1, least=0),
            layers=config.integer("num_hidden_layers", default=12),
            heads=heads,
            width=width,
            inner=config.integer("intermediate_size", default=3072),
            epsilon=config.number("layer_norm_eps", default=1e-12),
            theta=rope_theta(config, 160_000.0),
        )


def write_gte(g: OnnxGraph, gte: Gte, weights: Weights) -> None:
    """Writes the encoder into `g`, reading one tensor at a time."""
    p, hidden, width, heads = Parameters(g, weights), gte.hidden_size, gte.width, gte.heads
    r = ragged(g, *ragged_inputs(g))
    mask = key_mask(g, r)
    angles = rotary_angles(g, r, Rotation.plain(gte.theta, width))

    segment = None
    if gte.token_types:
        # One segment per text, so its embedding is folded into every word.
        segment = weights.tensor("embeddings.token_type_embeddings.weight", gte.token_types, hidden)[0]
    words = p.table("embeddings.word_embeddings", gte.vocab_size, hidden, plus=segment)
    x = p.layer_norm(g.op("Gather", words, r.token_ids), "embeddings.LayerNorm", hidden, gte.epsilon)
    for i in range(gte.layers):
        layer = f"encoder.layer.{i}"
        q, k, v = split_merged(g, p.linear(x, f"{layer}.attention.qkv_proj", 3 * hidden, hidden), heads, width)
        q, k = rotate(g, q, angles, width), rotate(g, k, angles, width)
        context = attention(g, q, k, v, r, mask, width**-0.5, heads, heads)
        projected = p.linear(context, f"{layer}.attention.o_proj", hidden, hidden)
        x = p.layer_norm(g.op("Add", x, projected), f"{layer}.attn_ln", hidden, gte.epsilon)
        merged = p.linear(x, f"{layer}.mlp.up_gate_proj", 2 * gte.inner, hidden, bias=False)
        up, gate = halves(g, merged, 2 * gte.inner, axis=1)
        down = p.linear(g.op("Mul", gelu(g, gate), up), f"{layer}.mlp.down_proj", hidden, gte.inner)
        x = p.layer_norm(g.op("Add", x, down), f"{layer}.mlp_ln", hidden, gte.epsilon)
    last_hidden_state(g, x, r, hidden)
