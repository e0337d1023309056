"""Nomic BERT (Nussbaum et al., 2024, arXiv:2402.01613), the encoder of nomic-embed-text, on packed tokens.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H], zeros in slots without a token

BERT with rotary positions and SwiGLU in place of learned positions and GELU, and without biases. In the second
version (Nussbaum and Duderstadt, 2025, arXiv:2502.07972) GELU and biases are back, and every second layer has
experts. Names are those of the published checkpoints, whose code is not run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from build.errors import BuildError
from build.graphs.blocks import attention, gelu, key_mask, rotary_angles, rotate, silu, split_merged
from build.graphs.dimensions import Dimensions, split_evenly
from build.graphs.experts import choose, mixture
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.parameters import Parameters
from build.graphs.ragged import last_hidden_state, ragged, ragged_inputs
from build.graphs.rope import Rotation, rope_theta
from build.sources.settings import Settings
from build.sources.weights import Weights


@dataclass(frozen=True, kw_only=True)
class NomicBert(Dimensions):
    """The keys of a checkpoint's `config.json` that shape the graph.

    They go by two sets of names: the published checkpoint's own, after GPT-2's, and transformers', whose defaults
    hold for both.
    """

    layers: int
    heads: int
    width: int
    """Of a head."""
    inner: int
    epsilon: float
    theta: float
    is_gated: bool
    attention_bias: bool
    inner_bias: bool
    outer_bias: bool
    period: int = 0
    """The second of so many layers has experts; none has where it is 0."""
    experts: int = 0
    top: int = 0
    """Experts that a token goes through."""

    @classmethod
    def of(cls, config: Settings) -> NomicBert:
        """Reads the configuration; raises BuildError on what this graph does not compute, naming the key."""
        config.require("activation_function", "swiglu", "gelu")
        config.require("hidden_act", "silu")
        for name in ("prenorm", "causal", "use_rms_norm", "parallel_block", "parallel_block_tied_norm"):
            config.require(name, False)
        for name in ("add_cross_attention", "is_decoder"):
            config.require(name, False)
        config.require("rotary_emb_fraction", 1.0, 1)
        config.require("rotary_emb_interleaved", False)
        config.require("rotary_emb_scale_base", None)
        config.require("rotary_scaling_factor", None)
        config.require("scale_attn_weights", True)
        config.require("scale_attn_by_inverse_layer_idx", False)
        hidden_size = config.integer("n_embd", "hidden_size", default=768)
        heads = config.integer("n_head", "num_attention_heads", default=12)
        width = split_evenly(config, hidden_size, heads)
        config.require("head_dim", width)
        # The published checkpoint has both, and gives as the second one what it was trained on.
        config.skip(["max_position_embeddings", "max_trained_positions"])
        period, experts, top = _experts(config)
        return cls(
            hidden_size=hidden_size,
            vocab_size=config.integer("vocab_size", default=30528),
            positions=config.integer(
                "n_positions" if "n_positions" in config else "max_position_embeddings", default=2048
            ),
            token_types=config.integer("type_vocab_size", default=2),
            layers=config.integer("n_layer", "num_hidden_layers", default=12),
            heads=heads,
            width=width,
            inner=config.integer("n_inner", "intermediate_size", default=3072),
            epsilon=config.number("layer_norm_epsilon", "layer_norm_eps", default=1e-12),
            theta=rope_theta(config, config.number("rotary_emb_base", default=1000.0)),
            is_gated=config.word("activation_function", default="swiglu") == "swiglu",
            attention_bias=config.flag("qkv_proj_bias", default=False),
            inner_bias=config.flag("mlp_fc1_bias", default=False),
            outer_bias=config.flag("mlp_fc2_bias", default=False),
            period=period,
            experts=experts,
            top=top,
        )

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in place of one feed-forward part."""
        return self.period > 1 and layer % self.period == 1


def _experts(config: Settings) -> tuple[int, int, int]:
    """(period, experts, top)."""
    period = config.integer("moe_every_n_layers", default=0, least=0)
    if period == 0:
        return 0, 0, 0
    config.require("activation_function", "gelu", default="swiglu")
    config.require("moe_normalize_expert_weights", False)
    config.require("expert_choice_router", False)
    config.require("num_shared_experts", 0)
    config.require("ffn_div", 1, 1.0)
    experts, top = config.integer("num_experts"), config.integer("moe_top_k")
    if top > experts:
        raise BuildError(f"{config.path} has moe_top_k = {top}, but num_experts = {experts}")
    return period, experts, top


def write_nomic_bert(g: OnnxGraph, nomic: NomicBert, weights: Weights) -> None:
    """Writes the encoder into `g`, reading one tensor at a time."""
    p, hidden, width, heads = Parameters(g, weights), nomic.hidden_size, nomic.width, nomic.heads
    r = ragged(g, *ragged_inputs(g))
    mask = key_mask(g, r)
    angles = rotary_angles(g, r, Rotation.plain(nomic.theta, width))

    # One segment per text, so its embedding is folded into every word.
    segment = weights.tensor("embeddings.token_type_embeddings.weight", nomic.token_types, hidden)[0]
    words = p.table("embeddings.word_embeddings", nomic.vocab_size, hidden, plus=segment)
    x = p.layer_norm(g.op("Gather", words, r.token_ids), "emb_ln", hidden, nomic.epsilon)
    for i in range(nomic.layers):
        layer = f"encoder.layers.{i}"
        merged = p.linear(x, f"{layer}.attn.Wqkv", 3 * hidden, hidden, nomic.attention_bias)
        q, k, v = split_merged(g, merged, heads, width)
        q, k = rotate(g, q, angles, width), rotate(g, k, angles, width)
        context = attention(g, q, k, v, r, mask, width**-0.5, heads, heads)
        projected = p.linear(context, f"{layer}.attn.out_proj", hidden, hidden, nomic.attention_bias)
        x = p.layer_norm(g.op("Add", x, projected), f"{layer}.norm1", hidden, nomic.epsilon)
        forward = _mixture if nomic.has_experts(i) else _feed_forward
        x = g.op("Add", x, forward(p, nomic, x, f"{layer}.mlp"))
        x = p.layer_norm(x, f"{layer}.norm2", hidden, nomic.epsilon)
    last_hidden_state(g, x, r, hidden)


def _feed_forward(p: Parameters, nomic: NomicBert, x: str, name: str) -> str:
    g, hidden = p.g, nomic.hidden_size
    if nomic.is_gated:
        gate = silu(g, p.linear(x, f"{name}.fc12", nomic.inner, hidden, nomic.inner_bias))
        inner = g.op("Mul", gate, p.linear(x, f"{name}.fc11", nomic.inner, hidden, nomic.inner_bias))
    else:
        inner = gelu(g, p.linear(x, f"{name}.fc1", nomic.inner, hidden, nomic.inner_bias))
    return p.linear(inner, f"{name}.fc2", hidden, nomic.inner, nomic.outer_bias)


def _mixture(p: Parameters, nomic: NomicBert, x: str, name: str) -> str:
    """The experts' matrices lie one under the other, both of them [experts * inner, H]; they share one bias."""
    g, hidden = p.g, nomic.hidden_size
    logits = p.linear(x, f"{name}.router.layer", nomic.experts, hidden, bias=False)
    chosen, shares = choose(g, logits, nomic.experts, nomic.top)
    first, second = (
        p.weights.tensor(f"{name}.experts.mlp.{part}", nomic.experts * nomic.inner, hidden)
        for part in ("w1", "w2")
    )

    def expert(i: int) -> Callable[[str], str]:
        own = slice(i * nomic.inner, (i + 1) * nomic.inner)

        def weight(part: str, values: npt.NDArray[np.float32]) -> str:
            return g.weight(f"{name}.experts.{i}.{part}", values)

        return lambda rows: g.linear(
            gelu(g, g.linear(rows, weight("w1", first[own]))), weight("w2", second[own].T)
        )

    total = mixture(g, x, chosen, shares, map(expert, range(nomic.experts)))
    return g.op("Add", total, g.weight(f"{name}.experts.bias", p.weights.tensor(f"{name}.experts.bias", hidden)))
