"""The two layouts every encoder moves between: packed tokens for arithmetic, rows for attention.

Triton merges requests of any length and hands a model their tokens end to end (`input_ids` [T]) with the
length of each batch item (`lengths` [B]). Inside one multi-text request the rows are padded with -1, which is
no token id, so T may hold slots without a token. The encoder drops those and works on the T' real tokens (their
number rounded up, see STEP).

TensorRT computes shapes before it runs and not from values. There the longest item comes as the shape of a third
input (`widest` [S]), and every slot counts as a token.

A packed runtime needs no rows: it is fed the T' tokens alone, with `positions` [T'], and its attention takes them
as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from onnx import TensorProto

from build.graphs.onnx_graph import OnnxGraph

STEP = 16
"""S and T' are rounded up to a multiple of this, the floats of one 512-bit vector.

S, for exactness: an engine adds a row up in whole vectors and then a remainder. Without a remainder the empty
columns only add zeros to sums taken in the same order, so a text gets the same bits alone and beside longer ones.
T', for memory: engines prepare and keep code for every shape they meet, and this leaves them few to meet.
"""


WIDEST = "widest"
"""INT32 [S], its values unset: the runtime that needs the longest item as a shape gets it here."""


@dataclass(frozen=True)
class Packed:
    """The tokens of a batch, text after text."""

    token_ids: str
    """[T'] ids of the packed tokens."""
    positions: str
    """[T'] place of each packed token in its own text, from 0."""
    lengths: str
    """[B] of each text or, where there are slots, of each item."""


@dataclass(frozen=True)
class Ragged(Packed):
    """Index tensors between slots [T], packed tokens [T'] and attention rows [B, S], all INT64.

    S is the row width of this batch. `real` [B, S] marks the cells that hold a token.
    """

    cell_of_token: str
    """[T'] flat index of each packed token into [B * S]."""
    token_of_cell: str
    """[B, S] packed token shown in each cell; cells without a token repeat another one."""
    token_of_slot: str | None
    """[T] packed token shown in each slot; slots without a token repeat another one. None where T' = T."""
    column: str
    """[S] 0, 1, ... S - 1."""
    real: str
    """[B, S] BOOL."""
    seen: str
    """[B, S] BOOL: of these, those that others see."""
    real_slots: str
    """[T] BOOL."""


def ragged_inputs(g: OnnxGraph) -> tuple[str, str]:
    """Declares what the runtime feeds and returns it as (input_ids INT32 [T], lengths INT32 [B])."""
    input_ids = g.input("input_ids", TensorProto.INT32, ["tokens" if g.traits.packed_attention else "slots"])
    lengths = g.input("lengths", TensorProto.INT32, ["batch"])
    if g.traits.needs_width:
        g.input(WIDEST, TensorProto.INT32, ["widest"])
    return input_ids, lengths


def state_inputs(g: OnnxGraph, hidden_size: int) -> tuple[str, str, str]:
    """Declares a head's inputs and returns them as (states FP32 [T, H], input_ids INT32 [T], lengths INT32 [B]).

    Triton hands every ragged input over flat, so `last_hidden_state` arrives as [T * H] and is reshaped here.
    Where one step runs both graphs, they come as their encoder gives them.
    """
    shape: list[int | str] = ["slots", hidden_size] if g.traits.joins_head else ["slots * hidden"]
    states = g.input("last_hidden_state", g.states, shape)
    if g.states != TensorProto.FLOAT:
        states = g.op("Cast", states, to=TensorProto.FLOAT)
    input_ids, lengths = ragged_inputs(g)
    return g.op("Reshape", states, g.constant([-1, hidden_size], np.int64)), input_ids, lengths


def item_rows(g: OnnxGraph, lengths: str) -> tuple[str, str]:
    """Slots of every batch item as rows: (slot [B, S] INT64, inside [B, S] BOOL).

    S is the longest item, rounded up to STEP.
    """
    zero, one = g.constant(0, np.int64), g.constant(1, np.int64)
    step, round_up = g.constant(STEP, np.int64), g.constant(STEP - 1, np.int64)
    lengths = g.op("Cast", lengths, to=TensorProto.INT64)
    longest = g.op("ReduceMax", lengths, keepdims=0)
    if g.traits.needs_width:
        longest = g.op("Gather", g.op("Shape", WIDEST), zero)
    width = g.op("Mul", g.op("Div", g.op("Add", longest, round_up), step), step)
    column = g.op("Range", zero, width, one)
    starts = g.op("CumSum", lengths, zero, exclusive=1)
    last = g.constant([1], np.int64)
    starts, lengths = g.op("Unsqueeze", starts, last), g.op("Unsqueeze", lengths, last)
    inside = g.op("Less", column, lengths)
    # Columns past an item's end point at its first slot, so that no index ever leaves the tensor.
    slot = g.op("Add", starts, g.op("Where", inside, column, zero))
    return slot, inside


def ragged(g: OnnxGraph, input_ids: str, lengths: str) -> Packed:
    """The tokens of one batch of `input_ids` [T] and `lengths` [B]."""
    if g.traits.packed_attention:
        return Packed(input_ids, g.input("positions", TensorProto.INT32, ["tokens"]), lengths)
    return opened(g, input_ids, lengths)


def opened(g: OnnxGraph, input_ids: str, lengths: str) -> Ragged:
    """Builds the index tensors of one batch from `input_ids` [T] and `lengths` [B]."""
    zero, one = g.constant(0, np.int64), g.constant(1, np.int64)
    slot, inside = item_rows(g, lengths)
    cell_ids = g.op("Gather", input_ids, slot)
    no_token = g.constant(0, np.int32)
    real = g.op("And", inside, g.op("GreaterOrEqual", cell_ids, no_token))
    real_slots = g.op("GreaterOrEqual", input_ids, no_token)

    width = g.op("Gather", g.op("Shape", slot), one)
    if g.traits.needs_width:
        item, column = _places(g, input_ids, lengths)
        return Ragged(
            token_ids=g.op("Max", input_ids, no_token),
            positions=column,
            lengths=lengths,
            cell_of_token=g.op("Add", g.op("Mul", item, width), column),
            token_of_cell=slot,
            token_of_slot=None,
            column=g.op("Range", zero, width, one),
            real=real,
            seen=real,
            real_slots=real_slots,
        )

    # Cells and slots list the tokens in the same order, so one running count numbers both.
    def running_index(mask: str) -> str:
        count = g.op("CumSum", g.op("Cast", mask, to=TensorProto.INT64), zero)
        return g.op("Max", g.op("Sub", count, one), zero)

    flat = g.constant([-1], np.int64)
    real_flat = g.op("Reshape", real, flat)
    tokens = g.op("Reshape", g.op("NonZero", real_flat), flat)
    # The first token again until their number is a multiple of STEP: nothing reads these copies.
    missing = g.op("Mod", g.op("Neg", g.op("Shape", tokens)), g.constant(STEP, np.int64))
    cell_of_token = g.op("Pad", tokens, g.op("Concat", g.constant([0], np.int64), missing, axis=0))
    token_of_cell = g.op("Reshape", running_index(real_flat), g.op("Shape", slot))
    return Ragged(
        token_ids=g.op("Gather", g.op("Reshape", cell_ids, flat), cell_of_token),
        positions=g.op("Mod", cell_of_token, width),
        lengths=lengths,
        cell_of_token=cell_of_token,
        token_of_cell=token_of_cell,
        token_of_slot=running_index(real_slots),
        column=g.op("Range", zero, width, one),
        real=real,
        seen=real,
        real_slots=real_slots,
    )


def with_unseen(g: OnnxGraph, r: Packed, offset: int) -> Packed:
    """The batch with ids below `offset`: what was raised by it is seen by none and comes last in its text.

    0 stands for no such tokens. A packed runtime takes raised ids apart before they come here.
    """
    if not offset or not isinstance(r, Ragged):
        return r
    size = g.constant(offset, np.int32)
    is_seen = g.op("Less", g.op("Gather", r.token_ids, r.token_of_cell), size)
    return replace(r, token_ids=g.op("Mod", r.token_ids, size), seen=g.op("And", r.real, is_seen))


def _places(g: OnnxGraph, input_ids: str, lengths: str) -> tuple[str, str]:
    """(item, column) INT64 [T] of every slot, by arithmetic that fixes each shape beforehand."""
    zero, one = g.constant(0, np.int64), g.constant(1, np.int64)
    lengths = g.op("Cast", lengths, to=TensorProto.INT64)
    slots = g.op("Range", zero, g.op("Gather", g.op("Shape", input_ids), zero), one)
    ends = g.op("CumSum", lengths, zero)
    # A slot comes after the ends of all items before its own.
    passed = g.op("GreaterOrEqual", g.op("Unsqueeze", slots, g.constant([1], np.int64)), ends)
    item = g.op("ReduceSum", g.op("Cast", passed, to=TensorProto.INT64), g.constant([1], np.int64), keepdims=0)
    return item, g.op("Sub", slots, g.op("Gather", g.op("Sub", ends, lengths), item))


def last_hidden_state(g: OnnxGraph, packed: str, r: Packed, hidden_size: int) -> None:
    """Declares the encoder's output `g.states` [T, H]: every token back in its slot, zeros in the others."""
    if not isinstance(r, Ragged):
        g.output("last_hidden_state", packed, g.states, ["tokens", hidden_size])
        return
    slots = packed if r.token_of_slot is None else g.op("Gather", packed, r.token_of_slot)
    real = g.op("Unsqueeze", r.real_slots, g.constant([1], np.int64))
    states = g.op("Where", real, slots, g.scalar(0))
    if g.states == TensorProto.FLOAT:
        states = g.widen(states)
    g.output("last_hidden_state", states, g.states, ["slots", hidden_size])
