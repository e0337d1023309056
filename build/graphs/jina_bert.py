"""Jina BERT (Günther et al., 2023, arXiv:2310.19923), the encoder of jina-embeddings-v2 and jina-reranker-v1.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H], zeros in slots without a token

BERT without positions: a score is lowered by its tokens' distance, by so much for each head (ALiBi, Press et al.,
2021, arXiv:2108.12409). The feed-forward part has a gate. Names are those of the published checkpoints, by two
codes of their own: jinaai/jina-bert-implementation, and jinaai/jina-bert-v2-qk-post-norm with norms of queries and
keys.
Attention adds a bias to each score, so it needs rows [B, heads, S, S]: `torch` does not run this graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log2

import numpy as np

from build.graphs.bert import BERTS, Bert, embed_words
from build.graphs.blocks import attention, gelu, halves, relative_mask
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.parameters import Parameters
from build.graphs.ragged import last_hidden_state, ragged, ragged_inputs
from build.sources.settings import Settings
from build.sources.weights import Weights

GATES: dict[str, Callable[[OnnxGraph, str], str]] = {"geglu": gelu, "reglu": lambda g, x: g.op("Relu", x)}
"""`feed_forward_type` -> what its gate does."""


@dataclass(frozen=True, kw_only=True)
class JinaBert(Bert):
    """The keys of a checkpoint's `config.json` that shape the graph; defaults are those of its own code."""

    gate: str = "geglu"
    """One of GATES."""


def read_jina_bert(config: Settings) -> JinaBert:
    """Reads the configuration; raises BuildError on what this graph does not compute, naming the key."""
    read = JinaBert.of(config, positions="alibi")
    config.require("feed_forward_type", *GATES, default="original")
    return replace(read, gate=config.word("feed_forward_type"))


def write_jina_bert(g: OnnxGraph, jina: JinaBert, weights: Weights) -> None:
    """Writes the encoder into `g`, reading one tensor at a time."""
    p, hidden = Parameters(g, weights), jina.hidden_size
    r = ragged(g, *ragged_inputs(g))
    reach = jina.positions
    distances = np.abs(np.arange(-reach, reach + 1, dtype=np.float32))
    biases = -np.asarray(slopes(jina.heads), np.float32)[None, :, None] * distances
    mask = relative_mask(g, r, g.weight("alibi", biases), reach)
    has_norms = "encoder.layer.0.attention.self.layer_norm_q.weight" in weights

    x = embed_words(p, jina, r, jina.epsilon)
    for i in range(jina.layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            p.linear(x, f"{layer}.{name}", hidden, hidden) for name in (BERTS.query, BERTS.key, BERTS.value)
        )
        if has_norms:
            q, k = (
                p.layer_norm(one, f"{layer}.attention.self.layer_norm_{name}", hidden, jina.epsilon)
                for one, name in ((q, "q"), (k, "k"))
            )
        context = attention(g, q, k, v, r, mask, jina.width**-0.5, jina.heads, jina.heads)
        seen = g.op("Add", x, p.linear(context, f"{layer}.{BERTS.projection}", hidden, hidden))
        seen = p.layer_norm(seen, f"{layer}.{BERTS.attention_norm}", hidden, jina.epsilon)
        if has_norms:
            # This code adds what the layer reads once more.
            seen = p.layer_norm(g.op("Add", x, seen), f"{layer}.layer_norm_1", hidden, jina.epsilon)
        x = _feed_forward(p, jina, layer, seen, has_norms)
    last_hidden_state(g, x, r, hidden)


def _feed_forward(p: Parameters, jina: JinaBert, layer: str, x: str, has_norms: bool) -> str:
    """norm(x + W (act(U x) * V x) + b); the two codes differ in names, and in which of U and V comes first."""
    g, hidden, epsilon = p.g, jina.hidden_size, jina.epsilon
    names = ("mlp.gated_layers", "mlp.wo", "mlp.layernorm")
    if has_norms:
        names = ("mlp.up_gated_layer", "mlp.down_layer", "layer_norm_2")
    merged, outer, norm = (f"{layer}.{name}" for name in names)
    first, second = halves(g, p.linear(x, merged, 2 * jina.inner, hidden, bias=False), 2 * jina.inner, axis=1)
    gate, other = (second, first) if has_norms else (first, second)
    down = p.linear(g.op("Mul", GATES[jina.gate](g, gate), other), outer, hidden, jina.inner)
    return p.layer_norm(g.op("Add", x, down), norm, hidden, epsilon)


def slopes(heads: int) -> list[float]:
    """By how much each head lowers a score from place to place: 2^(-8 i / n) for i of 1 to n heads.

    Where n is no power of 2, the power below it comes first, then every other one of twice as many.
    """
    power = 2 ** int(log2(heads))
    own = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return own if power == heads else own + slopes(2 * power)[0::2][: heads - power]
