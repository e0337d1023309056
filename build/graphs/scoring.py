"""Reranking heads: what turns the encoded query and passage into a score."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from build.checkpoint import Checkpoint
from build.errors import BuildError
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.pooling import first_token, last_token
from build.graphs.ragged import state_inputs

Logit = Callable[[OnnxGraph, Checkpoint, str, str, str], str]
"""(graph, checkpoint, states [T, H], input_ids [T], lengths [B]) -> logit [B, 1]."""


def write_scoring(g: OnnxGraph, checkpoint: Checkpoint, logit: Logit) -> None:
    """Scores each pair by one logit over its tokens.

    Input   last_hidden_state FP32 [T * H], input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.pooling`)
    Output  logit FP32 [B, 1]; score FP32 [B, 1] = 1 / (1 + exp(-logit)), 0..1
    """
    value = logit(g, checkpoint, *state_inputs(g, checkpoint.hidden_size))
    g.output("score", g.op("Sigmoid", value), TensorProto.FLOAT, ["batch", 1])
    g.output("logit", value, TensorProto.FLOAT, ["batch", 1])


def bert_logit(g: OnnxGraph, checkpoint: Checkpoint, states: str, input_ids: str, lengths: str) -> str:
    """BERT's pooler and a classifier of one label over the first token: w tanh(W h + b) + c."""
    first = first_token(g, states, input_ids, lengths)
    return _linear(g, checkpoint, _tanh_layer(g, checkpoint, first, "pooler.dense"), "classifier")


def roberta_logit(g: OnnxGraph, checkpoint: Checkpoint, states: str, input_ids: str, lengths: str) -> str:
    """RoBERTa's classification head of one label over the first token: w tanh(W h + b) + c."""
    first = first_token(g, states, input_ids, lengths)
    inner = _tanh_layer(g, checkpoint, first, "classifier.dense")
    return _linear(g, checkpoint, inner, "classifier.out_proj")


def yes_no_logit(g: OnnxGraph, checkpoint: Checkpoint, states: str, input_ids: str, lengths: str) -> str:
    """The language model's logit of "yes" over "no" after the last token.

    The softmax over these two is the sigmoid of their difference, so two rows of the head are all that is kept.
    """
    ids = [checkpoint.tokenizer.token_to_id(word) for word in ("yes", "no")]
    if None in ids:
        raise BuildError(f"{checkpoint.folder / 'tokenizer.json'} has no single token for 'yes' and 'no'")
    tied = checkpoint.config.get("tie_word_embeddings", False)
    head = checkpoint.tensor("embed_tokens.weight" if tied else "lm_head.weight")
    difference = g.weight("yes_minus_no", (head[ids[0]] - head[ids[1]])[None])
    return g.linear(last_token(g, states, input_ids, lengths), difference)


def _tanh_layer(g: OnnxGraph, checkpoint: Checkpoint, x: str, name: str) -> str:
    return g.op("Tanh", _linear(g, checkpoint, x, name))


def _linear(g: OnnxGraph, checkpoint: Checkpoint, x: str, name: str) -> str:
    weight, bias = (checkpoint.tensor(f"{name}.{part}") for part in ("weight", "bias"))
    return g.linear(x, g.weight(f"{name}.weight", weight), g.weight(f"{name}.bias", bias))


def write_cosine_scoring(g: OnnxGraph, dimensions: int) -> None:
    """Scores a passage by the cosine of its embedding with the query's (a bi-encoder).

    Input   query_embeddings, passage_embeddings FP32 [B, D], both of unit length;
            query_token_count, passage_token_count INT32 [B, 1]; query_truncated, passage_truncated BOOL [B, 1]
    Output  logit FP32 [B, 1], the cosine, -1..1; score FP32 [B, 1] = (1 + logit) / 2, 0..1;
            token_count INT32 [B, 1], the sum; truncated BOOL [B, 1], whether either text was cut
    """

    def pair(name: str, dtype: int, width: int) -> tuple[str, str]:
        return (
            g.input(f"query_{name}", dtype, ["batch", width]),
            g.input(f"passage_{name}", dtype, ["batch", width]),
        )

    query, passage = pair("embeddings", TensorProto.FLOAT, dimensions)
    counts = pair("token_count", TensorProto.INT32, 1)
    truncated = pair("truncated", TensorProto.BOOL, 1)

    products = g.op("Mul", query, passage)
    cosine = g.op("ReduceSum", products, g.constant([1], np.int64), keepdims=1)
    # Rounding may carry the cosine of a text with itself past 1.
    logit = g.op("Clip", cosine, g.constant(-1, np.float32), g.constant(1, np.float32))
    half = g.constant(0.5, np.float32)
    g.output("score", g.op("Add", g.op("Mul", logit, half), half), TensorProto.FLOAT, ["batch", 1])
    g.output("logit", logit, TensorProto.FLOAT, ["batch", 1])
    g.output("token_count", g.op("Add", *counts), TensorProto.INT32, ["batch", 1])
    g.output("truncated", g.op("Or", *truncated), TensorProto.BOOL, ["batch", 1])
