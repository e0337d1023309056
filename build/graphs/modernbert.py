"""ModernBERT (Warner et al., 2024, arXiv:2412.13663), gte-modernbert's encoder, on packed tokens.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H] after the final norm, zeros in slots without a token

Full layers see the whole text, the sliding ones between them a window around each token; each type has its own
base of rotary positions. LayerNorm before each block, GeGLU, no biases.
"""

from __future__ import annotations

from dataclasses import dataclass

from build.graphs.blocks import attention, gelu, halves, key_mask, rotary_angles, rotate, split_merged, window_mask
from build.graphs.dimensions import FULL, SLIDING, Dimensions, layer_types, split_evenly
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.parameters import Parameters
from build.graphs.ragged import last_hidden_state, ragged, ragged_inputs, with_unseen
from build.graphs.rope import Rotation, thetas_by_type
from build.sources.settings import Settings
from build.sources.weights import Weights


@dataclass(frozen=True, kw_only=True)
class ModernBert(Dimensions):
    """The keys of a checkpoint's `config.json` that shape the graph; defaults are transformers' own."""

    layer_types: tuple[str, ...]
    """SLIDING or FULL, of each layer."""
    heads: int
    width: int
    """Of a head."""
    inner: int
    epsilon: float
    thetas: dict[str, float]
    """Layer type -> base of its rotary positions."""

    @classmethod
    def of(cls, config: Settings) -> ModernBert:
        """Reads the configuration; raises BuildError on what this graph does not compute, naming the key."""
        config.require("hidden_activation", "gelu")
        config.require("classifier_activation", "gelu")
        for name in ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"):
            config.require(name, False)
        config.require("rope_scaling", None)
        config.require("classifier_pooling", "cls", "mean")
        hidden_size = config.integer("hidden_size", default=768)
        heads = config.integer("num_attention_heads", default=12)
        layers = config.integer("num_hidden_layers", default=22)
        # transformers 4 names no layers one by one, and no bases by their type.
        period = config.integer("global_attn_every_n_layers", default=3)
        thetas = {
            FULL: config.number("global_rope_theta", default=160_000.0),
            SLIDING: config.number("local_rope_theta", default=10_000.0),
        }
        epsilon = config.number("norm_eps", default=1e-5)
        return cls(
            hidden_size=hidden_size,
            vocab_size=config.integer("vocab_size", default=50368),
            positions=config.integer("max_position_embeddings", default=8192),
            head_pooling=config.word("classifier_pooling", default="cls"),
            head_epsilon=epsilon,
            layer_types=layer_types(config, [SLIDING if i % period else FULL for i in range(layers)]),
            heads=heads,
            width=split_evenly(config, hidden_size, heads),
            inner=config.integer("intermediate_size", default=1152),
            epsilon=epsilon,
            # The window of the checkpoint spans both sides; distances up to half of it are inside.
            window=config.integer("local_attention", default=128) // 2 + 1,
            thetas=thetas_by_type(config.inner("rope_parameters"), thetas),
        )


def write_modernbert(g: OnnxGraph, modernbert: ModernBert, weights: Weights) -> None:
    """Writes the encoder into `g`, reading one tensor at a time."""
    p, hidden, width, heads = Parameters(g, weights), modernbert.hidden_size, modernbert.width, modernbert.heads

    def norm(x: str, name: str) -> str:
        return p.layer_norm(x, name, hidden, modernbert.epsilon, bias=False)

    def linear(x: str, name: str, outputs: int, inputs: int) -> str:
        return p.linear(x, name, outputs, inputs, bias=False)

    r = with_unseen(g, ragged(g, *ragged_inputs(g)), modernbert.unseen_offset)
    masks = {SLIDING: window_mask(g, r, modernbert.window), FULL: key_mask(g, r)}
    angles = {kind: rotary_angles(g, r, Rotation.plain(theta, width)) for kind, theta in modernbert.thetas.items()}

    words = p.table("embeddings.tok_embeddings", modernbert.vocab_size, hidden)
    x = norm(g.op("Gather", words, r.token_ids), "embeddings.norm")
    for i, kind in enumerate(modernbert.layer_types):
        layer = f"layers.{i}"
        # The embeddings come normalised to the first layer.
        h = norm(x, f"{layer}.attn_norm") if i else x
        q, k, v = split_merged(g, linear(h, f"{layer}.attn.Wqkv", 3 * hidden, hidden), heads, width)
        q, k = rotate(g, q, angles[kind], width), rotate(g, k, angles[kind], width)
        context = attention(g, q, k, v, r, masks[kind], width**-0.5, heads, heads)
        x = g.op("Add", x, linear(context, f"{layer}.attn.Wo", hidden, hidden))
        merged = linear(norm(x, f"{layer}.mlp_norm"), f"{layer}.mlp.Wi", 2 * modernbert.inner, hidden)
        gate, up = halves(g, merged, 2 * modernbert.inner, axis=1)
        x = g.op("Add", x, linear(g.op("Mul", gelu(g, gate), up), f"{layer}.mlp.Wo", hidden, modernbert.inner))
    last_hidden_state(g, norm(x, "final_norm"), r, hidden)
