"""Sentence-transformers' Pooling and Normalize modules: token vectors in, one unit vector per text out.

Input   last_hidden_state FP32 [T * H], input_ids INT32 [T], lengths INT32 [B]: Triton hands every ragged input
        over flat, so the hidden states arrive as one dimension and are reshaped here; slots whose id is -1
        hold no token and are left out
Output  embeddings FP32 [B, H]

Mean of the tokens' vectors, special tokens included (Reimers and Gurevych, 2019, arXiv:1908.10084).
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from build.checkpoint import Checkpoint
from build.errors import BuildError
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.ragged import item_rows, ragged_inputs


def write_pooling(g: OnnxGraph, checkpoint: Checkpoint) -> None:
    """Writes what `modules.json` lists after the transformer; raises BuildError on what it cannot write."""
    modules = [module["type"].rsplit(".", 1)[-1] for module in checkpoint.json("modules.json")]
    if modules != ["Transformer", "Pooling", "Normalize"]:
        raise BuildError(
            f"{checkpoint.folder / 'modules.json'} lists {', '.join(modules)}; "
            "the pooling graph is written for Transformer, Pooling, Normalize"
        )
    pooling = checkpoint.json("1_Pooling/config.json")
    modes = [mode for mode, on in pooling.items() if mode.startswith("pooling_mode_") and on is True]
    if modes != ["pooling_mode_mean_tokens"]:
        raise BuildError(
            f"{checkpoint.folder / '1_Pooling/config.json'} asks for {', '.join(modes) or 'no mode'}; "
            "the pooling graph is written for pooling_mode_mean_tokens"
        )
    width = int(pooling["word_embedding_dimension"])
    flat_states = g.input("last_hidden_state", TensorProto.FLOAT, ["slots * hidden"])
    input_ids, lengths = ragged_inputs(g)
    states = g.op("Reshape", flat_states, g.constant([-1, width], np.int64))
    pooled = normalise(g, mean_of_tokens(g, states, input_ids, lengths))
    g.output("embeddings", pooled, TensorProto.FLOAT, ["batch", width])


def mean_of_tokens(g: OnnxGraph, states: str, input_ids: str, lengths: str) -> str:
    """[T, H] -> [B, H]: the mean over the tokens of each item."""
    slot, inside = item_rows(g, lengths)
    is_token = g.op("GreaterOrEqual", g.op("Gather", input_ids, slot), g.constant(0, np.int32))
    real = g.op("Cast", g.op("And", inside, is_token), to=TensorProto.FLOAT)
    column = g.op("Unsqueeze", real, g.constant([2], np.int64))
    rows = g.op("Mul", g.op("Gather", states, slot), column)
    over_tokens = g.constant([1], np.int64)
    total = g.op("ReduceSum", rows, over_tokens, keepdims=0)
    count = g.op("ReduceSum", real, over_tokens, keepdims=1)
    return g.op("Div", total, g.op("Max", count, g.constant(1, np.float32)))


def normalise(g: OnnxGraph, vectors: str) -> str:
    """x / max(|x|, 1e-12) for every row of [B, D], as torch.nn.functional.normalize defines it."""
    length = g.op("ReduceL2", vectors, axes=[1], keepdims=1)
    return g.op("Div", vectors, g.op("Max", length, g.constant(1e-12, np.float32)))
