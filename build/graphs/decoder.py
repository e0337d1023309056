"""The decoder of Llama and of those after it, as an encoder of texts, on packed tokens.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H] after the final norm, zeros in slots without a token

Llama (Touvron et al., 2023, arXiv:2302.13971) has RMSNorm before each block, rotary positions and SwiGLU. Mistral
(Jiang et al., 2023, arXiv:2310.06825) adds a window, Qwen2 (Qwen Team, 2024, arXiv:2407.10671) biases of queries,
keys and values, Qwen3 (Qwen Team, 2025, arXiv:2505.09388) norms of the first two. Several queries share keys.
voyage-4-nano is a Qwen3 whose every token sees the whole text, with a matrix behind the final norm. Of Qwen3-VL
(Qwen Team, 2025, arXiv:2511.21631) the half that reads text is a Qwen3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, repeat

from build.errors import BuildError
from build.graphs.blocks import (
    Mask,
    attention,
    causal_mask,
    key_mask,
    rotary_angles,
    rotate,
    silu,
    split_heads,
    window_mask,
)
from build.graphs.dimensions import FULL, SLIDING, Dimensions, layer_types, shared_evenly, split_evenly
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.parameters import Parameters
from build.graphs.ragged import Packed, last_hidden_state, ragged, ragged_inputs
from build.graphs.rope import Rotation, rotation
from build.sources.settings import Settings
from build.sources.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Decoder(Dimensions):
    """The keys of a checkpoint's `config.json` that shape the graph; defaults are transformers' own."""

    windows: tuple[int | None, ...]
    """Of each layer: how many tokens up to itself one sees, or None for all of them."""
    is_causal: bool
    """Whether a token sees none of those behind it; else it sees as far there as before it."""
    heads: int
    key_value_heads: int
    width: int
    """Of a head."""
    inner: int
    epsilon: float
    rotation: Rotation
    inside: int
    """Width of what passes from layer to layer."""
    has_biases: bool
    """Of queries, keys and values."""
    has_norms: bool
    """Of queries and keys."""
    has_linear: bool = False
    """Whether a matrix behind the final norm makes the states; without, they have the width inside."""

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.windows)


LAYERS = 32
POOLINGS = {"avg": "mean", "cls": "cls", "last": "lasttoken"}
"""What NVIDIA's code calls them -> what `build.graphs.pooling` does."""


def read_llama(config: Settings) -> Decoder:
    """Llama's configuration; BuildError on what this graph does not compute, naming the key."""
    config.require("mlp_bias", False)
    config.require("attention_bias", False)
    return _read(config, vocab_size=32000, positions=2048, inner=11008)


def read_llama_bidirectional(config: Settings) -> Decoder:
    """Of NVIDIA's own code, whose every token sees the whole text, and which pools what its classifier reads."""
    config.require("is_causal", False)
    config.require("pooling", *POOLINGS)
    pooling = POOLINGS[config.word("pooling", default="avg")]
    temperature = config.number("temperature", default=1.0)
    return replace(read_llama(config), is_causal=False, head_pooling=pooling, head_temperature=temperature)


def read_mistral(config: Settings) -> Decoder:
    """Mistral's: all layers are alike, and one without a window says so by null."""
    window = None if config.is_null("sliding_window") else config.integer("sliding_window", default=4096)
    return _read(config, vocab_size=32000, positions=131072, inner=14336, groups=8, windows=repeat(window))


def read_qwen2(config: Settings) -> Decoder:
    """Qwen2's; gte-Qwen2's own code passes over what is said of these, and every token sees the whole text."""
    code = config.find("auto_map") or {}
    has_code = "AutoModel" in code
    if code and not has_code:
        raise BuildError(f"{config.path} has auto_map without AutoModel: which code computes vectors is not said")
    if has_code:
        config.require("is_causal", False)
        config.require("use_sliding_window", False)
        config.require("rope_scaling", None)
        config.require("rope_parameters", None)
    read = _read_qwen(config, windows=_windows(config), has_biases=True)
    return replace(read, is_causal=False) if has_code else read


def read_qwen3(config: Settings) -> Decoder:
    """Qwen3's; voyage-4's own code has every token see the whole text, and a matrix of as many rows as labels."""
    config.require("attention_bias", False)
    has_code = "AutoModel" in (config.find("auto_map") or {})
    if has_code:
        config.require("use_bidirectional_attention", True)
        config.require("use_sliding_window", False)
        config.require("is_causal", False)
    read = _read_qwen(config, windows=_windows(config), width=128, has_norms=True)
    if not has_code:
        return read
    return replace(read, is_causal=False, has_linear=True, hidden_size=config.integer("num_labels"))


def read_qwen3_vl(config: Settings) -> Decoder:
    """Of Qwen3-VL's the half for text; whether its head is its table of words is said of the whole."""
    text = config.inner("text_config") or Settings(config.path, {}, "text_config.")
    text.require("model_type", "qwen3_vl_text")
    text.require("attention_bias", False)
    tied = config.flag("tie_word_embeddings", default=False)
    text.require("tie_word_embeddings", tied)
    # Which of a head's pairs turn by time, by height and by width: a text's places are the same on all three.
    if (said := text.inner("rope_parameters", "rope_scaling")) is not None:
        said.skip(["mrope_section", "mrope_interleaved"])
    read = _read_qwen(text, positions=128000, width=128, theta=500_000.0, has_norms=True)
    return replace(read, tied=tied)


def _windows(config: Settings) -> list[int | None]:
    """Qwen's, of layers from one on or by their types."""
    layers = config.integer("num_hidden_layers", default=LAYERS)
    window = None
    if config.flag("use_sliding_window", default=False) and not config.is_null("sliding_window"):
        window = config.integer("sliding_window", default=4096)
    config.skip(["sliding_window"])
    first = config.integer("max_window_layers", default=28, least=0)
    kinds = layer_types(config, [FULL if window is None or i < first else SLIDING for i in range(layers)])
    if window is None and SLIDING in kinds:
        raise BuildError(f"{config.path} has layer_types with {SLIDING}, but no use_sliding_window and its window")
    return [window if kind == SLIDING else None for kind in kinds]


def _read(
    config: Settings,
    *,
    vocab_size: int,
    positions: int,
    inner: int,
    groups: int | None = None,
    width: int | None = None,
    theta: float = 10_000.0,
    windows: Iterable[int | None] = repeat(None),
    has_biases: bool = False,
    has_norms: bool = False,
) -> Decoder:
    config.require("hidden_act", "silu")
    hidden_size = config.integer("hidden_size", default=4096)
    heads = config.integer("num_attention_heads", default=32)
    positions = config.integer("max_position_embeddings", default=positions)
    width = config.integer("head_dim", default=width or split_evenly(config, hidden_size, heads))
    layers = config.integer("num_hidden_layers", default=LAYERS)
    # Null is as many as of queries, and not the default of the key.
    own = heads if config.is_null("num_key_value_heads") else groups or heads
    groups = config.integer("num_key_value_heads", default=own)
    return Decoder(
        hidden_size=hidden_size,
        vocab_size=config.integer("vocab_size", default=vocab_size),
        positions=positions,
        tied=config.flag("tie_word_embeddings", default=False),
        head_padding=config.integer("pad_token_id", least=-1) if "pad_token_id" in config else None,
        windows=tuple(islice(windows, layers)),
        # Told that it is not, transformers 5 lets every token see those behind it; 4 does not.
        is_causal=config.flag("is_causal", default=True),
        inside=hidden_size,
        heads=heads,
        key_value_heads=shared_evenly(config, heads, groups),
        width=width,
        inner=config.integer("intermediate_size", default=inner),
        epsilon=config.number("rms_norm_eps", default=1e-6),
        rotation=rotation(config, width, positions, theta),
        has_biases=has_biases,
        has_norms=has_norms,
    )


_read_qwen = partial(_read, vocab_size=151936, positions=32768, inner=22016, groups=32)


def write_decoder(g: OnnxGraph, decoder: Decoder, weights: Weights) -> None:
    """Writes the decoder into `g`, reading one tensor at a time."""
    p, hidden, width, epsilon = Parameters(g, weights), decoder.inside, decoder.width, decoder.epsilon
    heads, groups = decoder.heads, decoder.key_value_heads
    r = ragged(g, *ragged_inputs(g))
    # Where no text is longer than a window, it hides nothing.
    longest = decoder.longest or decoder.positions
    windows = [window if window and window < longest else None for window in decoder.windows]
    masks = {window: _mask(g, r, decoder.is_causal, window) for window in dict.fromkeys(windows)}
    angles = rotary_angles(g, r, decoder.rotation)

    def project(x: str, name: str, count: int) -> str:
        return split_heads(g, p.linear(x, name, count * width, hidden, bias=decoder.has_biases), count, width)

    def norm(x: str, name: str) -> str:
        return p.rms_norm(x, name, width, epsilon) if decoder.has_norms else x

    x = g.op("Gather", p.table("embed_tokens", decoder.vocab_size, hidden), r.token_ids)
    for i, window in enumerate(windows):
        layer = f"layers.{i}"
        h = p.rms_norm(x, f"{layer}.input_layernorm", hidden, epsilon)
        q, k, v = (
            project(h, f"{layer}.self_attn.{name}_proj", count)
            for name, count in (("q", heads), ("k", groups), ("v", groups))
        )
        q = rotate(g, norm(q, f"{layer}.self_attn.q_norm"), angles, width)
        k = rotate(g, norm(k, f"{layer}.self_attn.k_norm"), angles, width)
        context = attention(g, q, k, v, r, masks[window], width**-0.5, heads, groups)
        x = g.op("Add", x, p.linear(context, f"{layer}.self_attn.o_proj", hidden, heads * width, bias=False))
        h = p.rms_norm(x, f"{layer}.post_attention_layernorm", hidden, epsilon)
        gate = silu(g, p.linear(h, f"{layer}.mlp.gate_proj", decoder.inner, hidden, bias=False))
        up = p.linear(h, f"{layer}.mlp.up_proj", decoder.inner, hidden, bias=False)
        down = p.linear(g.op("Mul", gate, up), f"{layer}.mlp.down_proj", hidden, decoder.inner, bias=False)
        x = g.op("Add", x, down)
    x = p.rms_norm(x, "norm", hidden, epsilon)
    if decoder.has_linear:
        x = p.linear(x, "linear", decoder.hidden_size, hidden, bias=False)
    last_hidden_state(g, x, r, decoder.hidden_size)


def _mask(g: OnnxGraph, r: Packed, is_causal: bool, window: int | None) -> Mask:
    if window is None:
        return causal_mask(g, r) if is_causal else key_mask(g, r)
    # A causal window counts the token itself, one to both sides only the others.
    return window_mask(g, r, window if is_causal else window + 1, is_causal)
