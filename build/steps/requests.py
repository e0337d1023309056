"""The rows of a dynamic batch, for the steps that run graphs: refused, joined where they are equal, and answered.

A request brings rows, padded with -1 where they are of token ids. An engine computes items: rows without padding,
each once, whoever asked for it.

Errors: a row over `max_tokens` or an id outside of `vocabulary` gives INVALID_ARG to its request; a request whose
deadline has passed is CANCELLED; an item that fails gives INTERNAL to the requests that had a row in it. No other
request is harmed.
"""

from __future__ import annotations

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
    """`encoder_tokens_total` on Triton's metrics port: tokens of requests, and those that the engine ran."""

    def __init__(self, model: str) -> None:
        self._family = pb_utils.MetricFamily(
            name="encoder_tokens_total",
            description="Tokens of requests, and those of them that the engine ran",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        self._received, self._computed = (
            self._family.Metric(labels={"model": model, "state": state}) for state in ("received", "computed")
        )

    def count(self, items: Sequence[Item]) -> None:
        """Counts one batch."""
        self._received.increment(sum(item.length * len(item.places) for item in items))
        self._computed.increment(sum(item.length for item in items))


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
        # Rows of nothing but token ids can be compared, so that equal ones run once.
        self.joinable = len(self.inputs) == 1
        self.metrics = TokenMetrics(name) if self.joinable else None

    def row_lengths(self, inputs: Mapping[str, Array]) -> list[int]:
        """Tokens in each row of a request; 1 where nothing is ragged."""
        for source in self.lengths.values():
            # A row ends with its last token; slots before it may have none that is kept, or all of them none. An
            # encoder has nothing to run in such a row.
            real = inputs[source] != NO_TOKEN
            lengths = real.shape[1] - real[:, ::-1].argmax(axis=1)
            counts: list[int] = np.where(real.any(axis=1), lengths, 0 if self.joinable else 1).tolist()
            return counts
        return [1] * len(inputs[self.inputs[0]])


class Batch:
    """The requests of one dynamic batch and what has become of them."""

    def __init__(self, model: Model, requests: Sequence[Any]) -> None:
        self._model = model
        self._tensors = [
            {n: pb_utils.get_input_tensor_by_name(request, n).as_numpy() for n in model.inputs}
            for request in requests
        ]
        self._errors = {
            i: error for i, inputs in enumerate(self._tensors) if (error := self._refusal(requests[i], inputs))
        }
        self._results: dict[tuple[int, int], dict[str, Array]] = {}
        self.items = self._joined()
        if model.metrics:
            model.metrics.count(self.items)

    def give(self, item: Item, outputs: dict[str, Array]) -> None:
        """Keeps an item's outputs for every row that it stands for."""
        self._results.update((place, outputs) for place in item.places)

    def fail(self, item: Item, sentence: str) -> None:
        """Fails every request with such a row."""
        failed = pb_utils.TritonError(sentence)
        self._errors.update((request, failed) for request, _ in item.places)

    def responses(self) -> list[Any]:
        """One for each request, once every item is given or failed."""
        return [
            pb_utils.InferenceResponse(error=self._errors[i])
            if i in self._errors
            else self._response([self._results[i, row] for row in range(len(inputs[self._model.inputs[0]]))])
            for i, inputs in enumerate(self._tensors)
        ]

    def _refusal(self, request: Any, inputs: Mapping[str, Array]) -> Any:
        """The error of a request that nobody waits for, or whose ids no tokenizer of the family made; or None."""
        model = self._model
        if not model.max_tokens:
            return None
        if time.monotonic() > deadline.of(request):
            return pb_utils.TritonError("nobody waits for the answer", pb_utils.TritonError.CANCELLED)
        (ids,) = inputs.values()
        length = max(model.row_lengths(inputs))
        sentence = ""
        if length > model.max_tokens:
            sentence = f"a row of {length} tokens is over this model's {model.max_tokens}"
        elif ids.min() < NO_TOKEN or ids.max() >= model.vocabulary:
            sentence = (
                f"input_ids holds {ids.min()} to {ids.max()}; ids are below {model.vocabulary}, {NO_TOKEN} is none"
            )
        if not sentence:
            return None
        return pb_utils.TritonError(
            f"{sentence}: send text to the ensemble instead", pb_utils.TritonError.INVALID_ARG
        )

    def _joined(self) -> list[Item]:
        """Every row of every request that is not refused; where ids are all there is, equal rows are one item."""
        model = self._model
        items: list[Item] = []
        known: dict[bytes, Item] = {}
        for request, inputs in enumerate(self._tensors):
            if request in self._errors:
                continue
            for row, length in enumerate(model.row_lengths(inputs)):
                own = {
                    name: array[row, :length].reshape(-1) if name in model.ragged else array[row]
                    for name, array in inputs.items()
                }
                item = Item(own, length)
                if model.joinable:
                    item = known.setdefault(own[model.inputs[0]].tobytes(), item)
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
    """Target tensor -> source input of every `batch_input` or `batch_output`; only `kind` is run here."""
    for entry in entries:
        if entry["kind"] != kind:
            raise ValueError(f"this step runs {kind}, not {entry['kind']}: change config.pbtxt")
    return {name: entry["source_input"][0] for entry in entries for name in entry["target_name"]}


def _stack(rows: list[Array]) -> Array:
    if len(rows) == 1:
        return rows[0][None]
    filling = NO_TOKEN if rows[0].dtype.kind == "i" else 0
    stacked = np.full((len(rows), max(map(len, rows)), *rows[0].shape[1:]), filling, rows[0].dtype)
    for target, row in zip(stacked, rows, strict=True):
        target[: len(row)] = row
    return stacked
