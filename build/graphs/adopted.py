"""Adoption of a graph that somebody else exported: surgery at its ends gives it the contract of our own.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  one of
        last_hidden_state FP32 [T, H], zeros in slots without a token: our pooling follows
        embeddings FP32 [B, D]: the graph pools by itself
        score, logit FP32 [B, 1], score = activation(logit): the graph has a classifier of one label

In front, the tokens are opened into the rows [B, S] that exporters ask for, padded on the right, and turned into
each of the graph's own inputs, INT32 or INT64 as it declares them:
        input_ids, the segment that pairs carry taken off; attention_mask, 1 where a cell holds a token;
        token_type_ids, that segment; position_ids, the column;
        past_key_values.N.key and .value [B, heads, 0, width], FP32, FP16 or BF16: nothing came before
Behind, its output is gathered back and cast. In between it keeps its weights' types, its operators and, but for
the oldest two, its opset. Outputs that are not used go, with the nodes that only they need. Weights in other files
are copied unread, as those files are; large ones inside the model file are moved out of it.

Raises BuildError for other inputs, outputs, opsets and operators than these, naming them. Padding is computed, as
the graph was made to: our own graphs are faster where there is one for the architecture.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from build.catalog import CatalogEntry
from build.errors import BuildError
from build.graphs.dimensions import Dimensions
from build.graphs.exported import (
    IDS,
    check_inputs,
    check_numbers,
    check_operators,
    converted,
    operators,
    precision,
    quantisation,
    shape_of,
)
from build.graphs.modules import normalise
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.pooling import Pooling
from build.graphs.ragged import STEP, Ragged, last_hidden_state, opened, ragged_inputs
from build.graphs.scoring import score_activation, write_scores
from build.graphs.surgery import graft
from build.sources.checkpoint import Checkpoint
from build.sources.labels import labels
from build.sources.onnx_file import read_onnx, tensors

TOKENS = ("token_embeddings", "last_hidden_state")
POOLED = ("sentence_embedding",)
LOGITS = ("logits",)


@dataclass(frozen=True)
class Adopted:
    """An exported graph that can take the place of an encoder, and which of its outputs is kept."""

    encoder: Dimensions
    path: Path
    output: str
    """Its own name for it."""
    gives: str
    """What becomes of it: `last_hidden_state`, `embeddings` or `score`."""
    width: int | None
    """H of hidden states and of embeddings, where it can be known."""
    normalise: bool = False
    """Whether embeddings leave with unit length, which a cut would take from them."""
    activation: str = "Sigmoid"
    """What makes scores of logits."""
    precision: str = "fp32"
    """What most of its floating-point weights are: `fp32`, `fp16` or `bf16`."""
    quantisation: str = ""
    """How values are rounded to INT8: not at all; `static`, by a fixed scale; or `dynamic`, by the largest of a
    batch, so that a text's result depends a little on its neighbours."""

    @classmethod
    def of(cls, entry: CatalogEntry, checkpoint: Checkpoint, encoder: Dimensions, path: Path) -> Adopted:
        """Reads what the graph takes and gives; BuildError names what cannot be fed, kept or run."""
        model = read_onnx(path)
        used = operators(model)
        check_operators(path, model, used)
        check_inputs(path, model)
        adopted = partial(cls, path=path, precision=precision(model), quantisation=quantisation(used))
        shapes = {value.name: shape_of(value) for value in model.graph.output}

        if entry.output is not None and entry.output not in shapes:
            raise BuildError(f"{path} has no output {entry.output}; it gives {', '.join(shapes)}")

        def first(names: Iterable[str], rank: int) -> str:
            asked = names if entry.output is None else (entry.output,)
            return next((name for name in asked if len(shapes.get(name, ())) == rank), "")

        if "embed" not in entry.tasks:
            if not (output := first(LOGITS, 2)):
                raise BuildError(
                    f"{path} gives {', '.join(shapes)}; of a reranker's graph logits [B, 1] are taken: name an "
                    "output that is like these with --output, or say --task embed if the model is no reranker"
                )
            if (count := shapes[output][1] or labels(checkpoint.config)) != 1:
                raise BuildError(f"{path} gives {output} of {count} labels; a reranker has one")
            if any(value.name == "token_type_ids" for value in model.graph.input) and checkpoint.feeds_token_types:
                encoder = replace(encoder, segment_offset=encoder.vocab_size)
            return adopted(encoder, output=output, gives="score", width=1, activation=score_activation(checkpoint))

        tokens, pooled = first(TOKENS, 3), first(POOLED, 2)
        has_modules = bool(checkpoint.modules)
        if tokens and (has_modules or entry.pooling or not pooled):
            hidden_size = encoder.hidden_size
            if (declared := shapes[tokens][2]) not in (0, hidden_size):
                raise BuildError(f"{path} gives {tokens} of {declared} values, but config.json says {hidden_size}")
            return adopted(encoder, output=tokens, gives="last_hidden_state", width=hidden_size)
        if pooled:
            if entry.pooling:
                raise BuildError(f"{path} gives {pooled}, which is pooled already: leave --pooling out")
            is_normalised = has_modules and checkpoint.modules[-1].kind == "Normalize"
            if is_normalised and entry.normalise is False:
                raise BuildError(f"{path} gives {pooled} of unit length already: leave --no-normalise out")
            width = shapes[pooled][1] or (
                Pooling.of(checkpoint, encoder.hidden_size).width if has_modules else None
            )
            whether = bool(is_normalised or entry.normalise)
            return adopted(encoder, output=pooled, gives="embeddings", width=width, normalise=whether)
        raise BuildError(
            f"{path} gives {', '.join(shapes)}; of an embedding model's graph {' or '.join(TOKENS)} [B, S, H] or "
            f"{POOLED[0]} [B, D] is taken: name an output that is like these with --output, or say --task rerank "
            "if the model is a reranker"
        )

    def dimensions(self, asked: int | None) -> int:
        """D of the embeddings: what is `asked` for, or else all that the graph gives."""
        if asked is None and self.width is None:
            raise BuildError(f"{self.path} does not declare how wide {self.output} is: say it with --dimensions")
        dimensions = asked or self.width or 0
        if not 0 < dimensions <= (self.width or dimensions):
            raise BuildError(f"{asked} dimensions were asked for, but {self.path} gives 1 to {self.width}")
        return dimensions

    def write(self, g: OnnxGraph, dimensions: int | None = None) -> None:
        """Writes the graph between its new ends into `g`, embeddings cut to `dimensions`."""
        model = converted(self.path, read_onnx(self.path))
        for tensor in tensors(model):
            check_numbers(self.path, tensor)
        r = opened(g, *ragged_inputs(g))
        feeds = _feeds(g, self, model.graph.input, r)
        (output,) = graft(g, self.path, model, feeds, [self.output])
        values = g.op("Cast", output, to=TensorProto.FLOAT)
        if self.gives == "last_hidden_state":
            assert self.width is not None
            rows = g.op("Reshape", _widen(g, self.encoder, values, r), g.constant([-1, self.width], np.int64))
            last_hidden_state(g, g.op("Gather", rows, r.cell_of_token), r, self.width)
        elif self.gives == "embeddings":
            dimensions = self.dimensions(dimensions)
            if dimensions != self.width:
                values = g.op("Slice", values, *(g.constant([bound], np.int64) for bound in (0, dimensions, 1)))
            if self.normalise:
                values = normalise(g, values)
            g.output("embeddings", values, TensorProto.FLOAT, ["batch", dimensions])
        else:
            write_scores(g, values, self.activation)


def _feeds(g: OnnxGraph, adopted: Adopted, inputs: Iterable[onnx.ValueInfoProto], r: Ragged) -> dict[str, str]:
    """Input of the old graph -> the value of ours that takes its place."""
    encoder = adopted.encoder
    zero = g.constant(0, np.int32)
    # Some graphs tell padding by its id too; where there is none, the mask alone does.
    pad = g.constant(encoder.padding, np.int32)
    ids, kinds = r.token_ids, g.op("Sub", r.token_ids, r.token_ids)
    if encoder.segment_offset:
        size = g.constant(encoder.segment_offset, np.int32)
        ids, kinds = g.op("Mod", ids, size), g.op("Div", ids, size)

    def rows(packed: str, empty: str) -> str:
        return g.op("Where", r.real, g.op("Gather", packed, r.token_of_cell), empty)

    def made(name: str) -> str:
        if name == "input_ids":
            return rows(ids, pad)
        if name == "token_type_ids":
            return rows(kinds, zero)
        if name == "position_ids":
            positions = g.op("Add", r.column, g.constant(encoder.first_position, np.int64))
            return g.op("Expand", positions, g.op("Shape", r.real))
        return r.real

    batch = g.op("Gather", g.op("Shape", r.real), g.constant([0], np.int64))
    feeds = {}
    for value in inputs:
        dtype = value.type.tensor_type.elem_type
        if value.name in IDS:
            # Rows are rounded up, which must not lead past the last position.
            feeds[value.name] = g.op("Cast", _narrow(g, encoder, made(value.name)), to=dtype)
        else:
            _, heads, _, width = shape_of(value)
            shape = g.op("Concat", batch, g.constant([heads, 0, width], np.int64), axis=0)
            feeds[value.name] = g.op("Cast", g.op("ConstantOfShape", shape), to=dtype)
    return feeds


def _narrow(g: OnnxGraph, encoder: Dimensions, rows: str) -> str:
    """[B, S] without the columns past the model's last position."""
    if encoder.positions % STEP == 0:
        return rows
    return g.op("Slice", rows, *(g.constant([bound], np.int64) for bound in (0, encoder.positions, 1)))


def _widen(g: OnnxGraph, encoder: Dimensions, states: str, r: Ragged) -> str:
    """[B, S, H] with the columns again that `_narrow` left out."""
    if encoder.positions % STEP == 0:
        return states
    second = g.constant([1], np.int64)
    missing = g.op("Sub", g.op("Shape", r.column), g.op("Gather", g.op("Shape", states), second))
    none = g.constant([0], np.int64)
    return g.op("Pad", states, g.op("Concat", none, none, none, none, missing, none, axis=0))
