"""GTE (Zhang et al., 2024, arXiv:2407.19669), the encoder of gte-multilingual, on packed tokens.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H], zeros in slots without a token

BERT with rotary positions and GeGLU in place of learned positions and GELU. Names are those of the published
checkpoints, whose own code (Alibaba-NLP/new-impl) calls it "new"; transformers calls it "gte".
"""

from __future__ import annotations

from dataclasses import dataclass

from build.graphs.bert import embed_words
from build.graphs.blocks import attention, gelu, halves, key_mask, rotary_angles, rotate, split_merged
from build.graphs.dimensions import Dimensions, split_evenly
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.parameters import Parameters
from build.graphs.ragged import last_hidden_state, ragged, ragged_inputs
from build.graphs.rope import KINDS, Rotation, rotation
from build.sources.settings import Settings
from build.sources.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Gte(Dimensions):
    """The keys of a checkpoint's `config.json` that shape the graph; defaults are transformers' own."""

    layers: int
    heads: int
    width: int
    """Of a head."""
    inner: int
    epsilon: float
    rotation: Rotation

    @classmethod
    def of(cls, config: Settings) -> Gte:
        """Reads transformers' configuration, or that of the code beside it; BuildError on what is not written."""
        if "auto_map" in config:
            return cls.of_new(config)
        return _read(config, vocab_size=250048, positions=8192, theta=160_000.0)

    @classmethod
    def of_new(cls, config: Settings) -> Gte:
        """Reads the configuration of the published code, with its defaults; BuildError on what is not written."""
        return _read(config, vocab_size=30528, positions=2048, theta=10_000.0, kinds=("default", "ntk"))


def _read(
    config: Settings, *, vocab_size: int, positions: int, theta: float, kinds: tuple[str, ...] = KINDS
) -> Gte:
    config.require("hidden_act", "gelu")
    config.require("layer_norm_type", "layer_norm")
    config.require("position_embedding_type", "rope")
    config.require("pack_qkv", True)
    config.require("logn_attention_scale", False)
    hidden_size = config.integer("hidden_size", default=768)
    heads = config.integer("num_attention_heads", default=12)
    width = split_evenly(config, hidden_size, heads)
    config.require("head_dim", width)
    positions = config.integer("max_position_embeddings", default=positions)
    return Gte(
        hidden_size=hidden_size,
        vocab_size=config.integer("vocab_size", default=vocab_size),
        positions=positions,
        token_types=config.integer("type_vocab_size", default=1, least=0),
        layers=config.integer("num_hidden_layers", default=12),
        heads=heads,
        width=width,
        inner=config.integer("intermediate_size", default=3072),
        epsilon=config.number("layer_norm_eps", default=1e-12),
        rotation=rotation(config, width, positions, theta, kinds),
    )


def write_gte(g: OnnxGraph, gte: Gte, weights: Weights) -> None:
    """Writes the encoder into `g`, reading one tensor at a time."""
    p, hidden, width, heads = Parameters(g, weights), gte.hidden_size, gte.width, gte.heads
    r = ragged(g, *ragged_inputs(g))
    mask = key_mask(g, r)
    angles = rotary_angles(g, r, gte.rotation)
    x = embed_words(p, gte, r, gte.epsilon)
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
