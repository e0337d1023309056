"""DistilBERT (Sanh et al., 2019, arXiv:1910.01108): BERT without segments, under names of its own."""

from __future__ import annotations

from build.graphs.bert import Bert, Names, write_bert
from build.graphs.dimensions import split_evenly
from build.graphs.onnx_graph import OnnxGraph
from build.sources.settings import Settings
from build.sources.weights import Weights

NAMES = Names(
    layer="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    projection="attention.out_lin",
    attention_norm="sa_layer_norm",
    inner="ffn.lin1",
    outer="ffn.lin2",
    norm="output_layer_norm",
)


def read_distilbert(config: Settings) -> Bert:
    """Reads the configuration, with transformers' defaults; BuildError on what is not written, naming the key."""
    config.require("activation", "gelu")
    hidden_size = config.integer("dim", "hidden_size", default=768)
    heads = config.integer("n_heads", "num_attention_heads", default=12)
    return Bert(
        hidden_size=hidden_size,
        vocab_size=config.integer("vocab_size", default=30522),
        positions=config.integer("max_position_embeddings", default=512),
        token_types=0,
        layers=config.integer("n_layers", "num_hidden_layers", default=6),
        heads=heads,
        width=split_evenly(config, hidden_size, heads),
        inner=config.integer("hidden_dim", default=3072),
        epsilon=1e-12,  # in the reference's code, and no key of its own
        head_epsilon=1e-12,
    )


def write_distilbert(g: OnnxGraph, bert: Bert, weights: Weights) -> None:
    """`bert.write_bert` by these names."""
    write_bert(g, bert, weights, NAMES)
