"""Reranking heads: what turns the encoded query and passage into a score."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from build.graphs.onnx_graph import OnnxGraph


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
