"""BERT (Devlin et al., 2018, arXiv:1810.04805), the encoder of MiniLM, BGE and E5, on packed tokens.

XLM-RoBERTa (Conneau et al., 2019, arXiv:1911.02116) is the same graph but for where positions start.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H], zeros in slots without a token

Linear layers and norms see only the T' real tokens; attention alone opens them into [B, heads, S, H / heads].
Every text is one segment (token type 0).
"""

from __future__ import annotations

from dataclasses import dataclass

from build.checkpoint import Checkpoint
from build.graphs.blocks import attention, gelu, key_mask, layer_norm, split_heads
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
        return layer_norm(g, x, weight(f"{name}.weight"), weight(f"{name}.bias"), config.layer_norm_eps)

    r = ragged(g, *ragged_inputs(g))
    mask = key_mask(g, r)
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads

    words = g.op("Gather", weight("embeddings.word_embeddings.weight"), r.token_ids)
    # One segment per text, so its embedding is folded into every position.
    segment = checkpoint.tensor("embeddings.token_type_embeddings.weight")[0]
    table = checkpoint.tensor("embeddings.position_embeddings.weight")[checkpoint.first_position :] + segment
    places = g.op("Gather", g.weight("embeddings.position_embeddings.weight", table), r.positions)
    x = norm(g.op("Add", words, places), "embeddings.LayerNorm")

    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            split_heads(g, linear(x, f"{layer}.attention.self.{name}"), heads, width)
            for name in ("query", "key", "value")
        )
        context = attention(g, q, k, v, r, mask, width**-0.5)
        projected = linear(context, f"{layer}.attention.output.dense")
        x = norm(g.op("Add", x, projected), f"{layer}.attention.output.LayerNorm")
        inner = gelu(g, linear(x, f"{layer}.intermediate.dense"))
        x = norm(g.op("Add", x, linear(inner, f"{layer}.output.dense")), f"{layer}.output.LayerNorm")

    last_hidden_state(g, x, r, config.hidden_size)
