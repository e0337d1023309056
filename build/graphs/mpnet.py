"""MPNet (Song et al., 2020, arXiv:2004.09297): BERT without segments, with biases by distance in every attention.

The biases are T5's (Raffel et al., 2019, arXiv:1910.10683): one for each head and bucket of distances, the same in
all layers. They are added to the scores, so this graph is not written for attention on packed tokens.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from build.graphs.bert import Bert, Names, write_bert
from build.graphs.blocks import Mask, relative_mask
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.ragged import Packed
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
REACH = 91
"""From this distance on all are in the last bucket of their side."""


def read_mpnet(config: Settings) -> Bert:
    """Reads the configuration, with transformers' defaults; BuildError on what is not written, naming the key."""
    config.require("relative_attention_num_buckets", BUCKETS)
    # Positions are RoBERTa's; the reference takes 1 for the padding token's id, whatever the configuration says.
    return replace(Bert.of(config, first_position=2, vocab_size=30527), token_types=0)


def write_mpnet(g: OnnxGraph, bert: Bert, weights: Weights) -> None:
    """`bert.write_bert` by these names, with the biases."""
    name = "encoder.relative_attention_bias.weight"
    biases = weights.tensor(name, BUCKETS, bert.heads)[buckets(np.arange(-REACH, REACH + 1))]

    def mask(g: OnnxGraph, r: Packed) -> Mask:
        return relative_mask(g, r, g.weight(name, np.ascontiguousarray(biases.T)[None]), REACH)

    write_bert(g, bert, weights, NAMES, mask)


def buckets(offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The bucket of each offset of a key from its query: 16 for either side, 8 of them one place wide.

    The others are wider by half an octave each, up to 128 places.
    """
    distance = np.abs(offsets)
    wide = 8 + np.floor(2 * np.log2(np.maximum(distance, 8) / 8)).astype(np.int64)
    own: npt.NDArray[np.int64] = np.where(distance < 8, distance, np.minimum(wide, 15))
    return own + 16 * (offsets > 0)
