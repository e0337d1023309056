"""BERT (Devlin et al., 2018, arXiv:1810.04805), the encoder of MiniLM, BGE and E5, on packed tokens.

RoBERTa (Liu et al., 2019, arXiv:1907.11692), CamemBERT (Martin et al., 2019, arXiv:1911.03894) and XLM-RoBERTa
(Conneau et al., 2019, arXiv:1911.02116) are the same graph but for where positions start.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H], zeros in slots without a token

Linear layers and norms see only the T' real tokens; attention alone opens them into [B, heads, S, H / heads].
Every text is one segment (token type 0), but for cross-encoders that tell their two texts apart by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from onnx import TensorProto

from build.errors import BuildError
from build.graphs.blocks import Mask, attention, gelu, key_mask
from build.graphs.dimensions import Dimensions, split_evenly
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.parameters import Parameters
from build.graphs.ragged import Packed, last_hidden_state, ragged, ragged_inputs, with_unseen
from build.sources.settings import Settings
from build.sources.weights import Weights

B = TypeVar("B", bound="Bert")


@dataclass(frozen=True, kw_only=True)
class Bert(Dimensions):
    """The keys of a checkpoint's `config.json` that shape the graph; defaults are transformers' own."""

    layers: int
    heads: int
    width: int
    """Of a head."""
    inner: int
    epsilon: float
    embedding_size: int = 0
    """Width of the tables of words, positions and segments, 0 where it is that of the hidden states."""

    @classmethod
    def of(
        cls: type[B],
        config: Settings,
        first_position: int = 0,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        heads: int = 12,
        inner: int = 3072,
        positions: str = "absolute",
    ) -> B:
        """Reads the configuration; raises BuildError on what this graph does not compute, naming the key.

        The sizes are defaults for absent keys. `positions` is the value that `position_embedding_type` must have.
        """
        config.require("hidden_act", "gelu")
        config.require("position_embedding_type", positions, default="absolute")
        config.require("is_decoder", False)
        config.require("add_cross_attention", False)
        config.require("pruned_heads", {})
        hidden_size = config.integer("hidden_size", default=hidden_size)
        heads = config.integer("num_attention_heads", default=heads)
        rows = config.integer("max_position_embeddings", default=512)
        if rows <= first_position:
            raise BuildError(
                f"{config.path} has max_position_embeddings = {rows}, which leaves no token a position"
            )
        return cls(
            hidden_size=hidden_size,
            vocab_size=config.integer("vocab_size", default=vocab_size),
            positions=rows - first_position,
            token_types=config.integer("type_vocab_size", default=2),
            first_position=first_position,
            layers=config.integer("num_hidden_layers", default=12),
            heads=heads,
            width=split_evenly(config, hidden_size, heads),
            inner=config.integer("intermediate_size", default=inner),
            epsilon=config.number("layer_norm_eps", default=1e-12),
            head_epsilon=config.number("layer_norm_eps", default=1e-12),
        )

    @classmethod
    def of_roberta(cls, config: Settings, vocab_size: int = 30522) -> Bert:
        """Positions are counted from the padding token's id on, which is left out."""
        return cls.of(config, config.integer("pad_token_id", default=1, least=0) + 1, vocab_size)


@dataclass(frozen=True)
class Names:
    """What the parts of a layer are called."""

    layer: str = "encoder.layer"
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    projection: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    inner: str = "intermediate.dense"
    outer: str = "output.dense"
    norm: str = "output.LayerNorm"


BERTS = Names()

See: TypeAlias = Callable[[OnnxGraph, Packed], Mask]
"""Which keys a query sees."""


def write_bert(g: OnnxGraph, bert: Bert, weights: Weights, names: Names = BERTS, see: See = key_mask) -> None:
    """Writes the encoder into `g`, reading one tensor at a time."""
    p, hidden = Parameters(g, weights), bert.hidden_size
    r = with_unseen(g, ragged(g, *ragged_inputs(g)), bert.unseen_offset)
    mask = see(g, r)
    x = embed(p, bert, r)
    for i in range(bert.layers):
        layer = f"{names.layer}.{i}"
        q, k, v = (
            p.linear(x, f"{layer}.{name}", hidden, hidden) for name in (names.query, names.key, names.value)
        )
        context = attention(g, q, k, v, r, mask, bert.width**-0.5, bert.heads, bert.heads)
        x = behind_attention(p, bert, layer, names, x, context)
    last_hidden_state(g, x, r, hidden)


def embed(p: Parameters, bert: Bert, r: Packed) -> str:
    """[T', H]: the normed sum of each token's word, position and segment, which the first layer reads."""
    g, width = p.g, bert.embedding_size or bert.hidden_size
    places = p.weights.tensor("embeddings.position_embeddings.weight", bert.first_position + bert.positions, width)
    places = places[max(0, bert.first_position - 1) :]
    segments = (
        p.weights.tensor("embeddings.token_type_embeddings.weight", bert.token_types, width)
        if bert.token_types
        else np.zeros((1, width), np.float32)
    )
    token_ids, kinds = _segments(g, bert, r)
    positions = r.positions
    if bert.first_position:
        positions = counted_positions(g, r, token_ids, bert.first_position - 1)
    if kinds:
        x = g.op("Gather", g.weight("embeddings.token_type_embeddings.weight", segments), kinds)
        x = g.op("Add", x, g.op("Gather", g.weight("embeddings.position_embeddings.weight", places), positions))
    else:
        # One segment per text, so its embedding is folded into every position.
        table = g.weight("embeddings.position_embeddings.weight", places + segments[0])
        x = g.op("Gather", table, positions)
    words = g.op("Gather", p.table("embeddings.word_embeddings", bert.vocab_size, width), token_ids)
    x = p.layer_norm(g.op("Add", words, x), "embeddings.LayerNorm", width, bert.epsilon)
    return x if width == bert.hidden_size else p.linear(x, "embeddings_project", bert.hidden_size, width)


def _segments(g: OnnxGraph, encoder: Dimensions, r: Packed) -> tuple[str, str]:
    """[T'] token ids and the segment of each, "" where all are of one.

    The ids of a pair's second text come raised by the size of the vocabulary.
    """
    if not encoder.segment_offset:
        return r.token_ids, ""
    size = g.constant(encoder.segment_offset, np.int32)
    return g.op("Mod", r.token_ids, size), g.op("Div", r.token_ids, size)


def embed_words(p: Parameters, encoder: Dimensions, r: Packed, epsilon: float) -> str:
    """[T', H]: the normed sum of each token's word and segment, of models without a table of positions."""
    g, hidden = p.g, encoder.hidden_size
    token_ids, kinds = _segments(g, encoder, r)
    name, segments = "embeddings.token_type_embeddings.weight", None
    if encoder.token_types:
        segments = p.weights.tensor(name, encoder.token_types, hidden)
    # Where every text is one segment, its embedding is folded into every word.
    plus = None if segments is None or kinds else segments[0]
    x = g.op("Gather", p.table("embeddings.word_embeddings", encoder.vocab_size, hidden, plus), token_ids)
    if segments is not None and kinds:
        x = g.op("Add", x, g.op("Gather", g.weight(name, segments), kinds))
    return p.layer_norm(x, "embeddings.LayerNorm", hidden, epsilon)


def behind_attention(p: Parameters, bert: Bert, layer: str, names: Names, x: str, context: str) -> str:
    """[T', H]: a layer's result, of the `x` that it reads and what its attention makes of that."""
    g, hidden = p.g, bert.hidden_size
    projected = p.linear(context, f"{layer}.{names.projection}", hidden, hidden)
    x = p.layer_norm(g.op("Add", x, projected), f"{layer}.{names.attention_norm}", hidden, bert.epsilon)
    inner = gelu(g, p.linear(x, f"{layer}.{names.inner}", bert.inner, hidden))
    out = p.linear(inner, f"{layer}.{names.outer}", hidden, bert.inner)
    return p.layer_norm(g.op("Add", x, out), f"{layer}.{names.norm}", hidden, bert.epsilon)


def counted_positions(g: OnnxGraph, r: Packed, token_ids: str, padding: int) -> str:
    """[T'] RoBERTa's positions: tokens count from 1; the `padding` token, which a text may spell out, has 0."""
    zero, one = g.constant(0, np.int64), g.constant(1, np.int64)
    is_padding = g.op("Cast", g.op("Equal", token_ids, g.constant(padding, np.int32)), to=TensorProto.INT64)
    is_other = g.op("Sub", one, is_padding)
    positions = g.op("Cast", r.positions, to=TensorProto.INT64)
    index = g.op("CumSum", g.op("Add", is_padding, is_other), zero, exclusive=1)
    first = g.op("Max", g.op("Sub", index, positions), zero)
    # How many of the other tokens there are up to each one, less those before its text.
    before = g.op("Gather", g.op("CumSum", is_other, zero, exclusive=1), first)
    return g.op("Mul", g.op("Sub", g.op("CumSum", is_other, zero), before), is_other)
