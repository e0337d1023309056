"""BERT (Devlin et al., 2018, arXiv:1810.04805), the encoder of MiniLM, BGE and E5, on packed tokens.

XLM-RoBERTa (Conneau et al., 2019, arXiv:1911.02116) is the same graph but for where positions start.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H], zeros in slots without a token

Linear layers and norms see only the T' real tokens; attention alone opens them into [B, heads, S, H / heads].
Every text is one segment (token type 0), but for cross-encoders that tell their two texts apart by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from build.checkpoint import Checkpoint
from build.graphs.blocks import attention, gelu, key_mask, layer_norm
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.ragged import last_hidden_state, ragged, ragged_inputs


@dataclass(frozen=True)
class BertConfig:
    """The fields of a checkpoint's `config.json` that shape the graph."""

    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    layer_norm_eps: float

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> BertConfig:
        """Reads `config.json`; refuses what this page does not write, naming the field."""
        config = checkpoint.config
        checkpoint.require("hidden_act", "gelu")
        checkpoint.require("position_embedding_type", "absolute", default="absolute")
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})


def write_bert(g: OnnxGraph, checkpoint: Checkpoint) -> None:
    """Writes the encoder of `checkpoint` into `g`, reading one tensor at a time."""
    config = BertConfig.of(checkpoint)

    def weight(name: str) -> str:
        return g.weight(name, checkpoint.tensor(name))

    def linear(x: str, name: str) -> str:
        return g.linear(x, weight(f"{name}.weight"), weight(f"{name}.bias"))

    def norm(x: str, name: str) -> str:
        scale, bias = (g.wide_weight(part, checkpoint.tensor(part)) for part in (f"{name}.weight", f"{name}.bias"))
        return layer_norm(g, x, scale, bias, config.layer_norm_eps)

    r = ragged(g, *ragged_inputs(g))
    mask = key_mask(g, r)
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads

    token_ids, places = r.token_ids, checkpoint.tensor("embeddings.position_embeddings.weight")
    places = places[checkpoint.first_position :]
    segments = checkpoint.tensor("embeddings.token_type_embeddings.weight")
    if checkpoint.segment_offset:
        # The ids of a pair's second text come raised by the size of the vocabulary.
        size = g.constant(checkpoint.segment_offset, np.int32)
        token_ids, kinds = g.op("Mod", token_ids, size), g.op("Div", token_ids, size)
        x = g.op("Gather", g.weight("embeddings.token_type_embeddings.weight", segments), kinds)
        x = g.op("Add", x, g.op("Gather", g.weight("embeddings.position_embeddings.weight", places), r.positions))
    else:
        # One segment per text, so its embedding is folded into every position.
        table = g.weight("embeddings.position_embeddings.weight", places + segments[0])
        x = g.op("Gather", table, r.positions)
    words = g.op("Gather", weight("embeddings.word_embeddings.weight"), token_ids)
    x = norm(g.op("Add", words, x), "embeddings.LayerNorm")

    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (linear(x, f"{layer}.attention.self.{name}") for name in ("query", "key", "value"))
        context = attention(g, q, k, v, r, mask, width**-0.5, heads, heads)
        projected = linear(context, f"{layer}.attention.output.dense")
        x = norm(g.op("Add", x, projected), f"{layer}.attention.output.LayerNorm")
        inner = gelu(g, linear(x, f"{layer}.intermediate.dense"))
        x = norm(g.op("Add", x, linear(inner, f"{layer}.output.dense")), f"{layer}.output.LayerNorm")

    last_hidden_state(g, x, r, config.hidden_size)
