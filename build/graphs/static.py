"""Static embeddings: a vector for each token that no other token changes, and their mean for a text.

They are sentence-transformers' StaticEmbedding, and model2vec's (Tulkens and van Dongen, 2024), which reads so
many characters of a text, leaves out tokens for unknown words, and may weigh tokens and share vectors among them.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H], zeros in slots without a token

A text may have no token that counts. Its vector is zeros, which the table has as one more row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from build.errors import BuildError
from build.graphs.dimensions import Dimensions
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.ragged import last_hidden_state, ragged, ragged_inputs
from build.sources.checkpoint import MODEL2VEC, Checkpoint
from build.sources.settings import Settings
from build.sources.weights import BYTES, Weights

TABLE, SHARED_TABLE = "embedding.weight", "embeddings"
"""The table as sentence-transformers names it, and as model2vec does."""
MAPPING, WEIGHTS = "mapping", "weights"
"""Of a token's id: its row of SHARED_TABLE, and what that is multiplied by."""
WINDOW = 32768
"""Tokens of a text at most where the reference has no window."""
MODEL2VECS_WINDOW = 512
"""What model2vec takes where a configuration says nothing."""


@dataclass(frozen=True)
class Static(Dimensions):
    """Sizes that the tensors say, and how model2vec reads a text."""

    is_cut: bool = False
    """Whether a text is read to as many characters as a window of tokens of the median length has."""
    characters: int = 0
    """That length; 0 where all of a text is read."""
    dropped: int | None = None
    """The id of tokens that are left out."""


def read_static(config: Settings) -> Static:
    """Reads model2vec's configuration, with its defaults; sentence-transformers' module has none.

    A `max_length` that is null stands for no window.
    """
    if config.word("model_type") != MODEL2VEC or config.is_null("max_length"):
        return Static(hidden_size=0, vocab_size=0, positions=WINDOW)
    window = config.integer("max_length", default=MODEL2VECS_WINDOW)
    return Static(hidden_size=0, vocab_size=0, positions=window, is_cut=True)


def measured(static: Static, checkpoint: Checkpoint, weights: Weights) -> Static:
    """The same with what tensors and tokenizer say; raises BuildError where they do not fit each other."""
    rows, hidden_size = matrix(weights, TABLE if TABLE in weights else SHARED_TABLE)
    if MAPPING in weights:
        (rows,) = weights.shape(MAPPING)
    static = replace(static, hidden_size=hidden_size, vocab_size=rows)
    if not checkpoint.is_model2vec:
        return replace(static, positions=min(static.positions, own_window(checkpoint)))
    median = int(np.median([len(token) for token in checkpoint.tokenizer.get_vocab()]))
    return replace(static, characters=median if static.is_cut else 0, dropped=unknown(checkpoint))


def matrix(weights: Weights, name: str) -> tuple[int, int]:
    """The shape of a table; raises BuildError where it is none."""
    shape = weights.shape(name)
    if len(shape) != 2:
        raise BuildError(f"{weights.folder} has {name} of shape {list(shape)}, which is no table of vectors")
    return shape[0], shape[1]


def own_window(checkpoint: Checkpoint) -> int:
    """Where the tokenizer's own file cuts a text, which sentence-transformers leaves as it is."""
    content = checkpoint.settings(checkpoint.transformer / "tokenizer.json")
    if (said := content.inner("truncation")) is None:
        return WINDOW
    said.require("direction", "Right")
    said.skip(["strategy", "stride"])  # of pairs, and of what is cut off
    return said.integer("max_length")


def unknown(checkpoint: Checkpoint) -> int | None:
    """The id of the token that stands for words which the vocabulary lacks, None where there is none."""
    model = checkpoint.tokenizer_steps["model"]
    if "unk_id" in model:  # of unigrams
        return None if model["unk_id"] is None else int(model["unk_id"])
    token = model.get("unk_token")
    return None if token is None else checkpoint.tokenizer.token_to_id(token)


def write_static(g: OnnxGraph, static: Static, weights: Weights) -> None:
    """Writes the table into `g`, a row for each token id and one of zeros behind them."""
    r = ragged(g, *ragged_inputs(g))
    if TABLE in weights:
        table = weights.tensor(TABLE, static.vocab_size, static.hidden_size)
    else:
        # Of INT8 the integers themselves are meant: model2vec keeps no scale.
        table = weights.tensor(SHARED_TABLE, *matrix(weights, SHARED_TABLE), more=BYTES)
    if MAPPING in weights:
        rows = weights.integers(MAPPING, static.vocab_size)
        if not 0 <= rows.min() <= rows.max() < len(table):
            raise BuildError(
                f"{weights.folder} has {MAPPING} with the rows {rows.min()} to {rows.max()}, and {SHARED_TABLE} "
                f"has {len(table)}"
            )
        table = table[rows]
    if WEIGHTS in weights:
        table = table * weights.tensor(WEIGHTS, static.vocab_size)[:, None]
    table = np.concatenate([table, np.zeros((1, static.hidden_size), np.float32)])
    states = g.op("Gather", g.weight(SHARED_TABLE, table), r.token_ids)
    last_hidden_state(g, states, r, static.hidden_size)
