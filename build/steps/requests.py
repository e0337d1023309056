"""The rows of a dynamic batch, for the steps that run graphs: refused, joined where they are equal, and answered.

A request brings rows, padded with -1 where they are of token ids. An engine computes items: rows without padding,
each once, whoever asked for it.

Errors: a row without a token or over `max_tokens`, or an id outside of `vocabulary`, gives INVALID_ARG to its
request; a request whose deadline has passed is CANCELLED; an item that fails gives INTERNAL to the requests that
had a row in it. No other request is harmed.
"""

from __future__ import annotations

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


@dataclass
class Item:
    """One row of one request, without padding."""

    inputs: dict[str, Array]
    """Input name -> this row; ragged ones flat."""
    length: int
    """Tokens in the row; 1 where the model has no ragged input."""
    places: list[tuple[int, int]] = field(default_factory=list)
    """(request, row) of every place that wants its result: more than one when rows repeat."""


class TokenMetrics:
    """`encoder_tokens_total` on Triton's metrics port: tokens of requests, and those that the engine ran.

    An increment is a message to Triton and its answer. So tokens are gathered, and told at most every SECONDS.
    """

    SECONDS = 0.25

    def __init__(self, model: str) -> None:
        self._family = pb_utils.MetricFamily(
            name="encoder_tokens_total",
            description="Tokens of requests, and those of them that the engine ran",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        self._received, self._computed = (
            self._family.Metric(labels={"model": model, "state": state}) for state in ("received", "computed")
        )
        self._counted = [0, 0]
        self._lock = threading.Lock()
        self._news, self._ended = threading.Event(), threading.Event()
        self._teller = threading.Thread(target=self._tell_in_time, daemon=True)
        self._teller.start()

    def count(self, items: Sequence[Item]) -> None:
        """Counts one batch."""
        with self._lock:
            self._counted[0] += sum(item.length * len(item.places) for item in items)
            self._counted[1] += sum(item.length for item in items)
        self._news.set()

    def close(self) -> None:
        """Tells what is left."""
        self._ended.set()
        self._news.set()
        self._teller.join()

    def _tell_in_time(self) -> None:
        while not self._ended.is_set():
            self._news.wait()
            self._news.clear()
            self._tell()
            self._ended.wait(self.SECONDS)
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            (received, computed), self._counted = self._counted, [0, 0]
        if received:
            self._received.increment(received)
            self._computed.increment(computed)


class Model:
    """What a model's config.pbtxt says of its requests."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self.parameters = {key: item["string_value"] for key, item in config["parameters"].items()}
        self.inputs: list[str] = [item["name"] for item in config["input"]]
        self.ragged = {item["name"] for item in config["input"] if item["allow_ragged_batch"]}
        self.lengths = targets(config["batch_input"], "BATCH_ITEM_SHAPE_FLATTEN")
        """Input of the graph for the length of each item -> the input that is measured."""
        self.outputs: list[str] = [item["name"] for item in config["output"]]
        # One row of 100,000 tokens would keep all others waiting for a minute.
        self.max_tokens, self.vocabulary = (int(self.parameters.get(n, "0")) for n in ("max_tokens", "vocabulary"))
        self.metrics = TokenMetrics(name) if self.ragged else None

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
            {n: pb_utils.get_input_tensor_by_name(request, n).as_numpy() for n in model.inputs}
            for request in requests
        ]
        self._lengths = model.row_lengths(self._tensors)
        self._errors = self._refusals(requests) if model.max_tokens else {}
        self._results: list[list[dict[str, Array]]] = [[{}] * len(rows) for rows in self._lengths]
        self.items = self._joined()
        if model.metrics:
            model.metrics.count(self.items)

    def give(self, item: Item, outputs: dict[str, Array]) -> None:
        """Keeps an item's outputs for every row that it stands for."""
        for request, row in item.places:
            self._results[request][row] = outputs

    def fail(self, item: Item, sentence: str) -> None:
        """Fails every request with such a row."""
        failed = pb_utils.TritonError(sentence)
        self._errors.update((request, failed) for request, _ in item.places)

    def responses(self) -> list[Any]:
        """One for each request, once every item is given or failed."""
        return [
            pb_utils.InferenceResponse(error=self._errors[i]) if i in self._errors else self._response(results)
            for i, results in enumerate(self._results)
        ]

    def _refusals(self, requests: Sequence[Any]) -> dict[int, Any]:
        """The errors of requests that nobody waits for, or whose ids no tokenizer of the family made."""
        model, now = self._model, time.monotonic()
        errors = {
            i: pb_utils.TritonError("nobody waits for the answer", pb_utils.TritonError.CANCELLED)
            for i, request in enumerate(requests)
            if now > deadline.of(request)
        }
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

    def _response(self, rows: Sequence[Mapping[str, Array]]) -> Any:
        """One request's rows as tensors, filled up to the longest row: with zeros, and integers with -1."""
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, _stack([row[name] for row in rows])) for name in self._model.outputs]
        )


def targets(entries: Sequence[Mapping[str, Any]], kind: str) -> dict[str, str]:
    """Target tensor -> source input of every `batch_input`; only `kind` is run here."""
    for entry in entries:
        if entry["kind"] != kind:
            raise ValueError(f"this step runs {kind}, not {entry['kind']}: change config.pbtxt")
    return {name: entry["source_input"][0] for entry in entries for name in entry["target_name"]}


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
