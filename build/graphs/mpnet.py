"""MPNet (Song et al., 2020, arXiv:2004.09297): BERT without segments, with biases by distance in every attention.

The biases are T5's (Raffel et al., 2019, arXiv:1910.10683): one for each head and bucket of distances, the same in
all layers. Attention adds them to each score, so it needs rows [B, heads, S, S]: `torch` does not run this
graph.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from build.graphs.bert import Bert, Names, write_bert
from build.graphs.blocks import Mask, relative_mask
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.ragged import Packed
from build.graphs.t5 import buckets
from build.sources.settings import Settings
from build.sources.weights import Weights

NAMES = Names(
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    projection="attention.attn.o",
    attention_norm="attention.LayerNorm",
)
BUCKETS = 32
REACH, FARTHEST = 91, 128
"""From these distances on all are in the last bucket of their side: as the reference rounds, and as it says."""


def read_mpnet(config: Settings) -> Bert:
    """Reads the configuration, with transformers' defaults; BuildError on what is not written, naming the key."""
    config.require("relative_attention_num_buckets", BUCKETS)
    # Positions are RoBERTa's; the reference takes 1 for the padding token's id, whatever the configuration says.
    return replace(Bert.of(config, first_position=2, vocab_size=30527), token_types=0)


def write_mpnet(g: OnnxGraph, bert: Bert, weights: Weights) -> None:
    """`bert.write_bert` by these names, with the biases."""
    name = "encoder.relative_attention_bias.weight"
    biases = weights.tensor(name, BUCKETS, bert.heads)[buckets(np.arange(-REACH, REACH + 1), BUCKETS, FARTHEST)]

    def mask(g: OnnxGraph, r: Packed) -> Mask:
        return relative_mask(g, r, g.weight(name, np.ascontiguousarray(biases.T)[None]), REACH)

    write_bert(g, bert, weights, NAMES, mask)
