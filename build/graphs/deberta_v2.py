"""DeBERTa (He et al., 2020, arXiv:2006.03654), of its second and third version.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H], zeros in slots without a token

BERT without positions in what the first layer reads. Attention is disentangled instead: to the score of a query
and a key is added that of the query with the key's distance, and that of the key with the query's. Distances are
in buckets, wider the farther they are, and have vectors of their own. Both summands need the scores' own tensor
[B, heads, S, S], so `torch` does not run this graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from build.graphs.bert import Bert, Names, behind_attention
from build.graphs.blocks import attention, biased_mask
from build.graphs.dimensions import split_evenly
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.parameters import Parameters
from build.graphs.ragged import STEP, Ragged, last_hidden_state, ragged, ragged_inputs
from build.sources.settings import Settings
from build.sources.weights import Weights

Array = npt.NDArray[np.float32]

NAMES = Names(query="attention.self.query_proj", key="attention.self.key_proj", value="attention.self.value_proj")
KINDS = (["p2c", "c2p"], ["c2p", "p2c"], "p2c|c2p", "c2p|p2c")
"""How both summands of a score are asked for: position to content, content to position."""


@dataclass(frozen=True, kw_only=True)
class DebertaV2(Bert):
    """The keys of a checkpoint's `config.json` that shape the graph; defaults are transformers' own."""

    buckets: int
    """Of distances, either side; 0 where each distance has a vector."""
    farthest: int
    """The distance from which on all are alike."""
    shared: bool
    """Whether distances are projected as words are, or by layers of their own."""
    normed: bool
    """Whether the distances' vectors are."""

    @classmethod
    def of_deberta(cls, config: Settings) -> DebertaV2:
        """Reads the configuration; raises BuildError on what this graph does not compute, naming the key."""
        config.require("hidden_act", "gelu")
        config.require("pooler_hidden_act", "gelu")
        config.require("conv_kernel_size", 0)
        config.require("type_vocab_size", 0)
        config.require("relative_attention", True, default=False)
        config.require("position_biased_input", False, default=True)
        config.require("pos_att_type", *KINDS, default=[])
        hidden_size = config.integer("hidden_size", default=1536)
        heads = config.integer("num_attention_heads", default=24)
        width = split_evenly(config, hidden_size, heads)
        for name, size in {
            "attention_head_size": width,
            "embedding_size": hidden_size,
            "pooler_hidden_size": hidden_size,
        }.items():
            config.require(name, size)
        positions = config.integer("max_position_embeddings", default=512)
        farthest = config.integer("max_relative_positions", default=-1, least=-1)
        norm = config.word("norm_rel_ebd", default="none")
        config.require("norm_rel_ebd", "none", "layer_norm")
        return cls(
            hidden_size=hidden_size,
            vocab_size=config.integer("vocab_size", default=128100),
            positions=positions,
            token_types=0,
            layers=config.integer("num_hidden_layers", default=24),
            heads=heads,
            width=width,
            inner=config.integer("intermediate_size", default=6144),
            epsilon=config.number("layer_norm_eps", default=1e-7),
            buckets=max(0, config.integer("position_buckets", default=-1, least=-1)),
            farthest=farthest if farthest > 0 else positions,
            shared=config.flag("share_att_key", default=False),
            normed=norm == "layer_norm",
        )


def write_deberta_v2(g: OnnxGraph, deberta: DebertaV2, weights: Weights) -> None:
    """Writes the encoder into `g`, reading one tensor at a time."""
    p, hidden, heads = Parameters(g, weights), deberta.hidden_size, deberta.heads
    r = ragged(g, *ragged_inputs(g))
    assert isinstance(r, Ragged)
    # A score is a sum of three products.
    scale = (3 * deberta.width) ** -0.5
    vectors = distances(deberta, weights)
    onward, back = (columns(g, r, deberta, sign) for sign in (1, -1))
    own = "" if deberta.shared else "pos_"

    def by_distance(x: str, name: str, rows: str) -> str:
        """The scores of every token with the distances to all others, for which `rows` are those of the table."""
        weight, bias = weights.tensor(f"{name}.weight", hidden, hidden), weights.tensor(f"{name}.bias", hidden)
        projected = ((vectors @ weight.T + bias) * np.float32(scale)).T.reshape(heads, deberta.width, -1)
        table = g.weight(f"{name} of distances", np.ascontiguousarray(projected))
        return shifted(g, r, of_cells(g, r, x, deberta), g.op("Gather", table, rows, axis=2))

    words = p.table("embeddings.word_embeddings", deberta.vocab_size, hidden)
    x = p.layer_norm(g.op("Gather", words, r.token_ids), "embeddings.LayerNorm", hidden, deberta.epsilon)
    for i in range(deberta.layers):
        layer = f"{NAMES.layer}.{i}"
        q, k, v = (
            p.linear(x, f"{layer}.{name}", hidden, hidden) for name in (NAMES.query, NAMES.key, NAMES.value)
        )
        of_queries = by_distance(q, f"{layer}.attention.self.{own}key_proj", back)
        of_keys = by_distance(k, f"{layer}.attention.self.{own}query_proj", onward)
        bias = g.op("Add", of_queries, g.op("Transpose", of_keys, perm=[0, 1, 3, 2]))
        context = attention(g, q, k, v, r, biased_mask(g, r, bias), scale, heads, heads)
        x = behind_attention(p, deberta, layer, NAMES, x, context)
    last_hidden_state(g, x, r, hidden)


def distances(deberta: DebertaV2, weights: Weights) -> Array:
    """[2 buckets, H]: the vectors of distances, the same for every layer."""
    count, hidden = 2 * (deberta.buckets or deberta.farthest), deberta.hidden_size
    vectors = weights.tensor("encoder.rel_embeddings.weight", count, hidden)
    if not deberta.normed:
        return vectors
    scale, shift = (weights.tensor(f"encoder.LayerNorm.{part}", hidden) for part in ("weight", "bias"))
    centred = vectors - vectors.mean(axis=1, keepdims=True)
    variance = (centred**2).mean(axis=1, keepdims=True)
    normed: Array = centred / np.sqrt(variance + np.float32(deberta.epsilon)) * scale + shift
    return normed


def rows_of(offsets: npt.NDArray[np.int64], deberta: DebertaV2) -> npt.NDArray[np.int64]:
    """The row of the distances' table for each offset of a query from a key.

    The nearest half of the buckets are one place wide; the others grow by a constant factor up to the farthest.
    """
    if not deberta.buckets:
        return np.clip(offsets + deberta.farthest, 0, 2 * deberta.farthest - 1)
    middle = deberta.buckets // 2
    away = np.abs(offsets)
    # In FP32, as in the reference, whose roundings decide where a bucket begins.
    ratio = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(middle))
    ratio /= np.log(np.float32((deberta.farthest - 1) / middle))
    wide = np.sign(offsets) * (np.ceil(ratio * np.float32(middle - 1)).astype(np.int64) + middle)
    return np.clip(np.where(away <= middle, offsets, wide) + deberta.buckets, 0, 2 * deberta.buckets - 1)


def columns(g: OnnxGraph, r: Ragged, deberta: DebertaV2, sign: int) -> str:
    """INT64 [2 S]: the row of the distances' table for offsets 1 - S, 2 - S, ... S, or for their opposites."""
    most = -(-deberta.positions // STEP) * STEP
    table = rows_of(sign * np.arange(1 - most, most + 1), deberta)
    width, middle = g.op("Shape", r.column), g.constant([most], np.int64)
    return g.op("Slice", g.constant(table, np.int64), g.op("Sub", middle, width), g.op("Add", middle, width))


def of_cells(g: OnnxGraph, r: Ragged, x: str, deberta: DebertaV2) -> str:
    """[T', H] -> [B, heads, S, d]."""
    cells = g.op("Gather", x, r.token_of_cell)
    split = g.op("Reshape", cells, g.constant([0, 0, deberta.heads, deberta.width], np.int64))
    return g.op("Transpose", split, perm=[0, 2, 1, 3])


def shifted(g: OnnxGraph, r: Ragged, cells: str, vectors: str) -> str:
    """[B, heads, S, S]: of each token's products with 2 S distances, those to the S places of its row.

    The first row's begin at column S - 1 and each next one's a column before (Dai et al., 2019, arXiv:1901.02860).
    Read end to end, they begin 2 S - 1 values apart.
    """
    one, last = g.constant([1], np.int64), g.constant([-1], np.int64)
    width = g.op("Shape", r.column)
    apart = g.op("Sub", g.op("Add", width, width), one)
    flat = g.op("Reshape", g.op("MatMul", cells, vectors), g.constant([0, 0, -1], np.int64))
    flat = g.op("Slice", flat, g.op("Sub", width, one), last, g.constant([2], np.int64))
    rows = g.op("Reshape", flat, g.op("Concat", g.constant([0, 0, -1], np.int64), apart, axis=0))
    return g.op("Slice", rows, g.constant([0], np.int64), width, g.constant([3], np.int64))
