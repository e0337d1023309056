"""The rows of a dynamic batch, for the steps that run graphs: refused, joined where they are equal, and answered.

A request brings rows, padded with -1 where they are of token ids. An engine computes items: rows without padding,
each once, whoever asked for it. A request is answered when its last row is there: with the others of its batch, or
by itself where `responses` has been called before.

Errors: a row without a token or over `max_tokens`, or an id outside of `vocabulary`, gives INVALID_ARG to its
request; a request whose deadline has passed is CANCELLED; an item that fails gives INTERNAL to the requests that
had a row in it. No other request is harmed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from . import deadline

Array: TypeAlias = npt.NDArray[Any]

NO_TOKEN = -1

TOKENS, MICROSECONDS = "encoder_tokens_total", "encoder_request_us_total"


@dataclass(eq=False)
class Item:
    """One row of one request, without padding."""

    inputs: dict[str, Array]
    """Input name -> this row; ragged ones flat."""
    length: int
    """Tokens in the row; 1 where the model has no ragged input."""
    places: list[tuple[int, int]] = field(default_factory=list)
    """(request, row) of every place that wants its result: more than one when rows repeat."""

    @property
    def requests(self) -> set[int]:
        """Whose rows it is."""
        return {request for request, _ in self.places}


class Counters:
    """What an encoder counts, on Triton's metrics port.

    `encoder_tokens_total`: tokens of requests, and those that the engine ran. `encoder_request_us_total`: the
    microseconds that requests waited here and were computed which were answered apart from their batch. Triton's
    own durations end with the batch.

    An increment is a message to Triton and its answer. So these are gathered, and told at most every SECONDS.
    """

    SECONDS = 0.25

    def __init__(self, model: str) -> None:
        self._families = {
            name: pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.COUNTER)
            for name, description in (
                (TOKENS, "Tokens of requests, and those of them that the engine ran"),
                (MICROSECONDS, "Microseconds of requests that were answered apart from their batch"),
            )
        }
        self._metrics = {
            (name, state): self._families[name].Metric(labels={"model": model, "state": state})
            for name, states in ((TOKENS, ("received", "computed")), (MICROSECONDS, ("waited", "computed")))
            for state in states
        }
        self._counted = dict.fromkeys(self._metrics, 0.0)
        self._lock = threading.Lock()
        self._triton = os.getppid()
        self._news, self._ended = threading.Event(), threading.Event()
        self._teller = threading.Thread(target=self._tell_in_time, daemon=True)
        self._teller.start()

    def count_tokens(self, items: Sequence[Item]) -> None:
        """Counts one batch."""
        received = sum(item.length * len(item.places) for item in items)
        computed = sum(item.length for item in items)
        self._count({(TOKENS, "received"): received, (TOKENS, "computed"): computed})

    def count_seconds(self, waited: float, computed: float) -> None:
        """Counts one request that has been answered apart from its batch."""
        self._count({(MICROSECONDS, "waited"): 1e6 * waited, (MICROSECONDS, "computed"): 1e6 * computed})

    def close(self) -> None:
        """Tells what is left."""
        self._ended.set()
        self._news.set()
        self._teller.join()

    def _count(self, more: Mapping[tuple[str, str], float]) -> None:
        with self._lock:
            for key, value in more.items():
                self._counted[key] += value
        self._news.set()

    def _tell_in_time(self) -> None:
        while not self._ended.is_set():
            self._news.wait()
            self._news.clear()
            self._tell()
            self._ended.wait(self.SECONDS)
        self._tell()

    def _tell(self) -> None:
        if os.getppid() != self._triton:
            return  # nobody would answer, and whoever waits for that keeps the process from ending
        with self._lock:
            counted, self._counted = self._counted, dict.fromkeys(self._metrics, 0.0)
        for key, value in counted.items():
            if value:
                self._metrics[key].increment(value)


class Model:
    """What a model's config.pbtxt says of its requests."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self.parameters = {key: item["string_value"] for key, item in config["parameters"].items()}
        self.inputs: list[str] = [item["name"] for item in config["input"]]
        self.ragged = {item["name"] for item in config["input"] if item["allow_ragged_batch"]}
        self.lengths = targets(config["batch_input"], "BATCH_ITEM_SHAPE_FLATTEN")
        """Input of the graph for the length of each item -> the input that is measured."""
        self.outputs: list[str] = [item["name"] for item in config["output"]]
        self.is_held = any(int(size) < 0 for item in config["output"] for size in item["dims"])
        """Whether answers go with their batch. Those of any size do: one that finds no shared memory fails
        then, and by itself it would be lost."""
        # One row of 100,000 tokens would keep all others waiting for a minute.
        self.max_tokens, self.vocabulary = (int(self.parameters.get(n, "0")) for n in ("max_tokens", "vocabulary"))
        self.counters = Counters(name) if self.ragged else None

    def row_lengths(self, requests: Sequence[Mapping[str, Array]]) -> list[list[int]]:
        """Tokens in each row of each request; 1 where nothing is ragged."""
        for source in self.lengths.values():
            return [lengths.tolist() for lengths in _row_lengths([inputs[source] for inputs in requests])]
        return [[1] * len(inputs[self.inputs[0]]) for inputs in requests]


class Batch:
    """The requests of one dynamic batch and what has become of them."""

    def __init__(self, model: Model, requests: Sequence[Any]) -> None:
        self._model = model
        self._tensors = [
            # Copies: Triton takes the memory back when the step returns, whether they are computed by then or not.
            {n: pb_utils.get_input_tensor_by_name(request, n).as_numpy().copy() for n in model.inputs}
            for request in requests
        ]
        self._lengths = model.row_lengths(self._tensors)
        self._deadlines = [deadline.of(request) for request in requests] if model.max_tokens else []
        self._errors = self._refusals() if model.max_tokens else {}
        self._results: list[list[dict[str, Array]]] = [[{}] * len(rows) for rows in self._lengths]
        self.items = self._joined()
        self.tokens = [sum(lengths) for lengths in self._lengths]
        """Of each request."""
        self._requests = list(requests)
        self._left = [0] * len(requests)
        """Items of each request that are neither given nor failed."""
        for item in self.items:
            for request in item.requests:
                self._left[request] += 1
        self._senders: dict[int, Any] = {}
        """Of the requests that were not answered with their batch."""
        self._returned = 0.0
        """When the batch was answered."""
        self._begun: dict[int, float] = {}
        """When the last row of a request began, by the same clock."""
        self.alone = [0.0] * len(requests)
        """Seconds that each request would take by itself."""
        self._lock = threading.Lock()
        if model.counters:
            model.counters.count_tokens(self.items)

    @property
    def is_held(self) -> bool:
        """Whether its requests are answered together only."""
        return self._model.is_held

    @property
    def is_done(self) -> bool:
        """Whether every item is given or failed."""
        return not any(self._left)

    def is_awaited(self, item: Item) -> bool:
        """Whether somebody still waits for an item."""
        now = time.monotonic()
        return not self._deadlines or any(now <= self._deadlines[request] for request in item.requests)

    def begin(self, item: Item) -> None:
        """An item is computed from now on."""
        for request in item.requests:
            self._begun[request] = time.monotonic()

    def give(self, item: Item, outputs: dict[str, Array]) -> None:
        """Keeps an item's outputs for every row that it stands for."""
        for request, row in item.places:
            self._results[request][row] = outputs
        self._settle(item)

    def fail(self, item: Item, sentence: str) -> None:
        """Fails every request with such a row."""
        self._fail(item, pb_utils.TritonError(sentence))

    def abandon(self, item: Item) -> None:
        """Fails every request with a row that nobody waits for."""
        self._fail(item, _abandoned())

    def _fail(self, item: Item, error: Any) -> None:
        self._errors |= dict.fromkeys(item.requests, error)
        self._settle(item)

    def responses(self) -> list[Any]:
        """One for each request whose items are all settled; None for the others, which get theirs later."""
        with self._lock:
            self._senders = {
                i: self._requests[i].get_response_sender() for i, left in enumerate(self._left) if left
            }
        self._requests, self._returned = [], time.monotonic()
        return [None if i in self._senders else self._response(i) for i in range(len(self._results))]

    def _settle(self, item: Item) -> None:
        """Answers whoever has waited for this item alone, and whose batch has been answered."""
        with self._lock:
            for request in item.requests:
                self._left[request] -= 1
            ended = [i for i in item.requests if i in self._senders and not self._left[i]]
        for request in ended:
            self._count(request)
            self._send(request)

    def _count(self, request: int) -> None:
        """Counts what it took behind its batch: as computing, what its last row took or it all would alone."""
        if self._model.counters is None:
            return
        now = time.monotonic()
        whole = now - self._returned
        computed = min(whole, max(self.alone[request], now - self._begun.get(request, now)))
        self._model.counters.count_seconds(whole - computed, computed)

    def _send(self, request: int) -> None:
        """Sends its answer by itself."""
        try:
            response = self._response(request)
        except Exception as problem:
            response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(problem)))
        # The stub frees tensors that nobody asked for without Python's lock: they are to outlive that.
        tensors = response.output_tensors()
        try:
            self._senders[request].send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as problem:
            pb_utils.Logger.log_error(f"an answer was not sent: {problem}")
        del tensors

    def _refusals(self) -> dict[int, Any]:
        """The errors of requests that nobody waits for, or whose ids no tokenizer of the family made."""
        model, now = self._model, time.monotonic()
        errors = {i: _abandoned() for i, seconds in enumerate(self._deadlines) if now > seconds}
        are_ids = self._are_ids(
            np.concatenate([ids.reshape(-1) for inputs in self._tensors for ids in inputs.values()])
        )
        for i, (inputs, lengths) in enumerate(zip(self._tensors, self._lengths, strict=True)):
            sentence = ""
            if (length := max(lengths)) > model.max_tokens:
                sentence = f"a row of {length} tokens is over this model's {model.max_tokens}"
            elif min(lengths) == 0:
                sentence = "a row without a token has no result"
            elif len({ids.shape for ids in inputs.values()}) > 1:
                sentence = f"{' and '.join(inputs)} are not of one shape"
            for name, ids in inputs.items() if not are_ids and not sentence else ():
                if not self._are_ids(ids):
                    found = f"{name} holds {ids.min()} to {ids.max()}"
                    sentence = f"{found}; ids are below {model.vocabulary}, {NO_TOKEN} is none"
            if sentence and i not in errors:
                errors[i] = pb_utils.TritonError(
                    f"{sentence}: send text to the ensemble instead", pb_utils.TritonError.INVALID_ARG
                )
        return errors

    def _are_ids(self, values: Array) -> bool:
        return not values.size or bool(values.min() >= NO_TOKEN and values.max() < self._model.vocabulary)

    def _joined(self) -> list[Item]:
        """Every row of every request that is not refused; where they are of ids, equal ones are one item."""
        model = self._model
        items: list[Item] = []
        known: dict[bytes, Item] = {}
        for request, inputs in enumerate(self._tensors):
            if request in self._errors:
                continue
            for row, length in enumerate(self._lengths[request]):
                own = {
                    name: array[row, :length].reshape(-1) if name in model.ragged else array[row]
                    for name, array in inputs.items()
                }
                item = Item(own, length)
                if model.ragged:
                    item = known.setdefault(b"".join(ids.tobytes() for ids in own.values()), item)
                if not item.places:
                    items.append(item)
                item.places.append((request, row))
        return items

    def _response(self, request: int) -> Any:
        """Its error, or its rows as tensors, filled up to the longest row: with zeros, and integers with -1."""
        if request in self._errors:
            return pb_utils.InferenceResponse(error=self._errors[request])
        rows = self._results[request]
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, _stack([row[name] for row in rows])) for name in self._model.outputs]
        )


def targets(entries: Sequence[Mapping[str, Any]], kind: str) -> dict[str, str]:
    """Target tensor -> source input of every `batch_input`; only `kind` is run here."""
    for entry in entries:
        if entry["kind"] != kind:
            raise ValueError(f"this step runs {kind}, not {entry['kind']}: change config.pbtxt")
    return {name: entry["source_input"][0] for entry in entries for name in entry["target_name"]}


def _abandoned() -> Any:
    return pb_utils.TritonError("nobody waits for the answer", pb_utils.TritonError.CANCELLED)


def _row_lengths(requests: Sequence[Array]) -> list[Array]:
    """Slots of each row of each request up to its last token."""
    found: list[Array] = []
    for rows in requests:
        if rows.size and (rows[:, -1] != NO_TOKEN).all():
            found.append(np.full(len(rows), rows.shape[1]))
            continue
        slots = np.arange(1, rows.shape[1] + 1)
        found.append(np.where(rows == NO_TOKEN, 0, slots).max(axis=1, initial=0))
    return found


def _stack(rows: list[Array]) -> Array:
    if len(rows) == 1:
        return rows[0][None]
    filling = NO_TOKEN if rows[0].dtype.kind == "i" else 0
    stacked = np.full((len(rows), max(map(len, rows)), *rows[0].shape[1:]), filling, rows[0].dtype)
    for target, row in zip(stacked, rows, strict=True):
        target[: len(row)] = row
    return stacked
