"""Nomic BERT (Nussbaum et al., 2024, arXiv:2402.01613), the encoder of nomic-embed-text, on packed tokens.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H], zeros in slots without a token

BERT with rotary positions and SwiGLU in place of learned positions and GELU, and without biases. Names are those
of the published checkpoint, whose code is not run.
"""

from __future__ import annotations

from dataclasses import dataclass

from build.graphs.blocks import attention, key_mask, rotary_angles, rotate, silu, split_merged
from build.graphs.dimensions import Dimensions, split_evenly
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.parameters import Parameters
from build.graphs.ragged import last_hidden_state, ragged, ragged_inputs
from build.graphs.rope import Rotation, rope_theta
from build.settings import Settings
from build.weights import Weights


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

    @classmethod
    def of(cls, config: Settings) -> NomicBert:
        """Reads the configuration; raises BuildError on what this page does not write, naming the key."""
        config.require("activation_function", "swiglu")
        config.require("hidden_act", "silu")
        for name in ("prenorm", "causal", "use_rms_norm", "parallel_block", "parallel_block_tied_norm"):
            config.require(name, False)
        for name in ("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias", "add_cross_attention", "is_decoder"):
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
        )


def write_nomic_bert(g: OnnxGraph, nomic: NomicBert, weights: Weights) -> None:
    """Writes the encoder into `g`, reading one tensor at a time."""
    p, hidden, width, heads = Parameters(g, weights), nomic.hidden_size, nomic.width, nomic.heads

    def linear(x: str, name: str, outputs: int, inputs: int) -> str:
        return p.linear(x, name, outputs, inputs, bias=False)

    r = ragged(g, *ragged_inputs(g))
    mask = key_mask(g, r)
    angles = rotary_angles(g, r, Rotation.plain(nomic.theta, width))

    # One segment per text, so its embedding is folded into every word.
    segment = weights.tensor("embeddings.token_type_embeddings.weight", nomic.token_types, hidden)[0]
    words = p.table("embeddings.word_embeddings", nomic.vocab_size, hidden, plus=segment)
    x = p.layer_norm(g.op("Gather", words, r.token_ids), "emb_ln", hidden, nomic.epsilon)
    for i in range(nomic.layers):
        layer = f"encoder.layers.{i}"
        q, k, v = split_merged(g, linear(x, f"{layer}.attn.Wqkv", 3 * hidden, hidden), heads, width)
        q, k = rotate(g, q, angles, width), rotate(g, k, angles, width)
        context = attention(g, q, k, v, r, mask, width**-0.5, heads, heads)
        projected = linear(context, f"{layer}.attn.out_proj", hidden, hidden)
        x = p.layer_norm(g.op("Add", x, projected), f"{layer}.norm1", hidden, nomic.epsilon)
        gate = silu(g, linear(x, f"{layer}.mlp.fc12", nomic.inner, hidden))
        up = linear(x, f"{layer}.mlp.fc11", nomic.inner, hidden)
        down = linear(g.op("Mul", gate, up), f"{layer}.mlp.fc2", hidden, nomic.inner)
        x = p.layer_norm(g.op("Add", x, down), f"{layer}.norm2", hidden, nomic.epsilon)
    last_hidden_state(g, x, r, hidden)
