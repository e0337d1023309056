"""Gemma 3 (Gemma Team, 2025, arXiv:2503.19786) as EmbeddingGemma's encoder, on packed tokens.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H] after the final norm, zeros in slots without a token

Bidirectional (Vera et al., 2025, arXiv:2509.20354): full layers see the whole text, sliding layers a window around
each token. Scaled embeddings, RMSNorm by 1 + weight before and after each block, GeGLU.
"""

from __future__ import annotations

from dataclasses import dataclass

from build.errors import BuildError
from build.graphs.blocks import attention, gelu_tanh, key_mask, rotary_angles, rotate, split_heads, window_mask
from build.graphs.dimensions import FULL, SLIDING, Dimensions, layer_types, shared_evenly
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.parameters import Parameters
from build.graphs.ragged import last_hidden_state, ragged, ragged_inputs
from build.graphs.rope import Rotation, rope_theta, thetas_by_type
from build.sources.settings import Settings
from build.sources.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Gemma3(Dimensions):
    """The keys of a checkpoint's `config.json` that shape the graph; defaults are transformers' own."""

    layer_types: tuple[str, ...]
    """SLIDING or FULL, of each layer."""
    heads: int
    key_value_heads: int
    width: int
    """Of a head."""
    inner: int
    epsilon: float
    scale: float
    """Of the products of queries and keys."""
    window: int
    """A token of a sliding layer sees those fewer than so many places away."""
    thetas: dict[str, float]
    """Layer type -> base of its rotary positions."""

    @classmethod
    def of(cls, config: Settings) -> Gemma3:
        """Reads the configuration; raises BuildError on what this graph does not compute, naming the key."""
        config.require("hidden_activation", "gelu_pytorch_tanh")
        config.require("attention_bias", False)
        config.require("attn_logit_softcapping", None)
        if not config.flag("use_bidirectional_attention", default=False):
            raise BuildError(
                f"{config.path} has use_bidirectional_attention = false, as of a model that writes text; the "
                "graph is written for true only"
            )
        heads = config.integer("num_attention_heads", default=8)
        return cls(
            hidden_size=config.integer("hidden_size", default=2304),
            vocab_size=config.integer("vocab_size", default=262208),
            positions=config.integer("max_position_embeddings", default=131072),
            layer_types=_layer_types(config),
            heads=heads,
            key_value_heads=shared_evenly(config, heads, config.integer("num_key_value_heads", default=4)),
            width=config.integer("head_dim", default=256),
            inner=config.integer("intermediate_size", default=9216),
            epsilon=config.number("rms_norm_eps", default=1e-6),
            scale=config.number("query_pre_attn_scalar", default=256) ** -0.5,
            # The window of the checkpoint spans both sides; distances up to half of it are inside.
            window=config.integer("sliding_window", default=4096) // 2 + 1,
            thetas=_thetas(config),
        )


def _layer_types(config: Settings) -> tuple[str, ...]:
    layers = config.integer("num_hidden_layers", default=26)
    # Before layers were named one by one, every so many-th saw the whole text.
    period = config.integer("sliding_window_pattern", default=6)
    return layer_types(config, [SLIDING if (i + 1) % period else FULL for i in range(layers)])


def _thetas(config: Settings) -> dict[str, float]:
    """One object for each type of layer in transformers 5; two keys in 4, where scaling is of full layers only."""
    local = config.number("rope_local_base_freq", default=10_000.0)
    said = config.inner("rope_parameters")
    if said is None or not (SLIDING in said or FULL in said):
        return {SLIDING: local, FULL: rope_theta(config, 1_000_000.0)}
    return thetas_by_type(said, {SLIDING: local, FULL: config.number("rope_theta", default=1_000_000.0)})


def write_gemma3(g: OnnxGraph, gemma3: Gemma3, weights: Weights) -> None:
    """Writes the encoder into `g`, reading one tensor at a time."""
    p, hidden, width, epsilon = Parameters(g, weights), gemma3.hidden_size, gemma3.width, gemma3.epsilon
    heads, groups = gemma3.heads, gemma3.key_value_heads

    def norm(x: str, name: str, size: int = hidden) -> str:
        return p.rms_norm(x, name, size, epsilon, plus=1)

    def project(x: str, name: str, count: int) -> str:
        return split_heads(g, p.linear(x, name, count * width, hidden, bias=False), count, width)

    r = ragged(g, *ragged_inputs(g))
    masks = {SLIDING: window_mask(g, r, gemma3.window), FULL: key_mask(g, r)}
    angles = {kind: rotary_angles(g, r, Rotation.plain(theta, width)) for kind, theta in gemma3.thetas.items()}

    words = g.op("Gather", p.table("embed_tokens", gemma3.vocab_size, hidden), r.token_ids)
    x = g.op("Mul", words, g.scalar(hidden**0.5))
    for i, kind in enumerate(gemma3.layer_types):
        layer = f"layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (
            project(h, f"{layer}.self_attn.{name}_proj", count)
            for name, count in (("q", heads), ("k", groups), ("v", groups))
        )
        q = rotate(g, norm(q, f"{layer}.self_attn.q_norm", width), angles[kind], width)
        k = rotate(g, norm(k, f"{layer}.self_attn.k_norm", width), angles[kind], width)
        context = attention(g, q, k, v, r, masks[kind], gemma3.scale, heads, groups)
        projected = p.linear(context, f"{layer}.self_attn.o_proj", hidden, heads * width, bias=False)
        x = g.op("Add", x, norm(projected, f"{layer}.post_attention_layernorm"))
        h = norm(x, f"{layer}.pre_feedforward_layernorm")
        gate = gelu_tanh(g, p.linear(h, f"{layer}.mlp.gate_proj", gemma3.inner, hidden, bias=False))
        up = p.linear(h, f"{layer}.mlp.up_proj", gemma3.inner, hidden, bias=False)
        down = p.linear(g.op("Mul", gate, up), f"{layer}.mlp.down_proj", hidden, gemma3.inner, bias=False)
        x = g.op("Add", x, norm(down, f"{layer}.post_feedforward_layernorm"))
    last_hidden_state(g, norm(x, "norm"), r, hidden)
