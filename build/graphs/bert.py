"""BERT (Devlin et al., 2018, arXiv:1810.04805), the encoder of MiniLM, BGE and E5, on packed tokens.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H], zeros in slots without a token

Linear layers and norms see only the T' real tokens; attention alone opens them into [B, heads, S, H / heads].
Every text is one segment (token type 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from build.checkpoint import Checkpoint
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.ragged import Ragged, ragged, ragged_inputs, scatter_to_slots


@dataclass(frozen=True)
class BertConfig:
    """The fields of a checkpoint's `config.json` that shape the graph."""

    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    layer_norm_eps: float
    max_position_embeddings: int
    vocab_size: int

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
        scale, bias = weight(f"{name}.weight"), weight(f"{name}.bias")
        return g.op("LayerNormalization", x, scale, bias, epsilon=config.layer_norm_eps)

    r = ragged(g, *ragged_inputs(g))
    mask = attention_mask(g, r)

    words = g.op("Gather", weight("embeddings.word_embeddings.weight"), r.token_ids)
    # One segment per text, so its embedding is folded into every position.
    segment = checkpoint.tensor("embeddings.token_type_embeddings.weight")[0]
    table = checkpoint.tensor("embeddings.position_embeddings.weight") + segment
    places = g.op("Gather", g.weight("embeddings.position_embeddings.weight", table), r.positions)
    x = norm(g.op("Add", words, places), "embeddings.LayerNorm")

    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (linear(x, f"{layer}.attention.self.{n}") for n in ("query", "key", "value"))
        context = attention(g, q, k, v, r, mask, config)
        projected = linear(context, f"{layer}.attention.output.dense")
        x = norm(g.op("Add", x, projected), f"{layer}.attention.output.LayerNorm")
        inner = gelu(g, linear(x, f"{layer}.intermediate.dense"))
        x = norm(g.op("Add", x, linear(inner, f"{layer}.output.dense")), f"{layer}.output.LayerNorm")

    states = scatter_to_slots(g, x, r)
    g.output("last_hidden_state", states, TensorProto.FLOAT, ["slots", config.hidden_size])


def attention_mask(g: OnnxGraph, r: Ragged) -> str:
    """[B, 1, 1, S] added to the attention scores: 0 for a token, the lowest float for an empty cell."""
    axes = g.constant([1, 2], np.int64)
    lowest = g.constant(np.finfo(np.float32).min, np.float32)
    bias = g.op("Where", r.real, g.constant(0, np.float32), lowest)
    return g.op("Unsqueeze", bias, axes)


def attention(g: OnnxGraph, q: str, k: str, v: str, r: Ragged, mask: str, config: BertConfig) -> str:
    """softmax(q k^T / sqrt(d) + mask) v for every head: packed [T', H] in, packed [T', H] out."""
    heads = config.num_attention_heads
    width = config.hidden_size // heads
    split = g.constant([0, 0, heads, width], np.int64)

    def rows(x: str, perm: list[int]) -> str:
        return g.op("Transpose", g.op("Reshape", g.op("Gather", x, r.token_of_cell), split), perm=perm)

    q = g.op("Mul", rows(q, [0, 2, 1, 3]), g.constant(width**-0.5, np.float32))
    scores = g.op("Add", g.op("MatMul", q, rows(k, [0, 2, 3, 1])), mask)
    context = g.op("MatMul", g.op("Softmax", scores, axis=-1), rows(v, [0, 2, 1, 3]))
    context = g.op("Transpose", context, perm=[0, 2, 1, 3])
    flat = g.op("Reshape", context, g.constant([-1, config.hidden_size], np.int64))
    return g.op("Gather", flat, r.cell_of_token)


def gelu(g: OnnxGraph, x: str) -> str:
    """0.5 x (1 + erf(x / sqrt(2))), the exact form (Hendrycks and Gimpel, 2016, arXiv:1606.08415)."""
    erf = g.op("Erf", g.op("Mul", x, g.constant(2**-0.5, np.float32)))
    scaled = g.op("Mul", x, g.op("Add", erf, g.constant(1, np.float32)))
    return g.op("Mul", scaled, g.constant(0.5, np.float32))
