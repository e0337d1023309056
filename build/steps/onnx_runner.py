"""ONNX runner step (Python backend): runs `model.onnx` on OpenVINO, fed as Triton's C++ backends would feed it.

The model's own config.pbtxt says how. Inputs with `allow_ragged_batch` are concatenated end to end into one
dimension; a `batch_input` of kind BATCH_ITEM_SHAPE_FLATTEN adds the length of each item; an output named by a
`batch_output` of kind BATCH_SCATTER_WITH_INPUT_SHAPE is cut back along the source input. Inputs that are not
ragged are stacked along the batch.

A CPU gains little from large batches and loses much to texts of unlike length in one, since attention works on
rows as wide as the longest. So items are ordered by length and run in micro-batches of nearly equal length, at
most `token_budget` tokens each (a longer item runs alone), as many at once as the engine has streams. Too few of
them to keep the streams busy run on all threads instead, one after another, and so do all of a model whose weights
are too large to be prepared twice. Identical rows of token ids are run once.

Model parameters, each overridden by the environment variable in brackets when it is "auto":
  precision     "fp32", "bf16" or "auto": bf16 where the CPU computes in it [ENCODER_PRECISION]
  threads       a number or "auto": every core this process may use, shared among as many encoders as the
                environment variable ENCODER_COUNT says [ENCODER_THREADS]
  token_budget  tokens in a micro-batch
  max_tokens    of an encoder, the most in a row; `vocabulary`, the number of its token ids
Errors: a row over `max_tokens` or an id outside of `vocabulary` gives INVALID_ARG to its request; a micro-batch
that fails gives INTERNAL to the requests that had an item in it; a request whose deadline has passed is CANCELLED.
No other request is harmed.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import openvino as ov
import openvino.properties.hint as hints
import triton_python_backend_utils as pb_utils
from openvino import properties

from . import deadline

Array = npt.NDArray[Any]

NO_TOKEN = -1

CGROUPS = "/sys/fs/cgroup"

WIDEST = 1.5
"""The widest item of a micro-batch over its narrowest."""

SMALL = 512 << 20
"""Bytes of weights up to which a model is prepared twice, for one thread a stream and for all threads at once."""

RANGES = {"encoder": "encode", "pooling": "pool", "scoring": "score"}
"""Step -> the name of its range in Nsight Systems; within it, `infer` is the engine's share."""

annotate: Callable[[str], AbstractContextManager[Any]] = nullcontext
with suppress(ImportError):
    import nvtx

    annotate = partial(nvtx.annotate, domain="steps")

PRECISIONS = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16}


@dataclass
class Item:
    """One row of one request, without padding."""

    inputs: dict[str, Array]
    """Input name -> this row; ragged ones flat."""
    length: int
    """Tokens in the row; 1 where the model has no ragged input."""
    places: list[tuple[int, int]] = field(default_factory=list)
    """(request, row) of every place that wants its result: more than one when rows repeat."""


Failure: TypeAlias = "RuntimeError | MemoryError"
"""What the engine raises, and NumPy where its results do not fit."""

FAILURES = (RuntimeError, MemoryError)

Outcome: TypeAlias = "list[dict[str, Array]] | Failure"
"""Each item's outputs, by name, or what was raised."""


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

    def count(self, items: list[Item]) -> None:
        """Counts one batch."""
        self._received.increment(sum(item.length * len(item.places) for item in items))
        self._computed.increment(sum(item.length for item in items))


class TritonPythonModel:
    """One compiled graph that runs dynamic batches of ragged requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Compiles `model.onnx` of the version folder."""
        config = json.loads(args["model_config"])
        parameters = {key: item["string_value"] for key, item in config["parameters"].items()}
        self._inputs: list[str] = [item["name"] for item in config["input"]]
        self._ragged = {item["name"] for item in config["input"] if item["allow_ragged_batch"]}
        self._lengths = _targets(config["batch_input"], "BATCH_ITEM_SHAPE_FLATTEN")
        self._scattered = _targets(config["batch_output"], "BATCH_SCATTER_WITH_INPUT_SHAPE")
        self._outputs: list[str] = [item["name"] for item in config["output"]]
        self._token_budget = int(parameters["token_budget"])
        # One row of 100,000 tokens would keep all others waiting for a minute.
        self._max_tokens, self._vocabulary = (int(parameters.get(n, "0")) for n in ("max_tokens", "vocabulary"))
        # Rows of nothing but token ids can be compared, so that equal ones run once.
        self._joinable = len(self._inputs) == 1
        self._metrics = TokenMetrics(args["model_name"]) if self._joinable else None
        step = args["model_name"].rpartition("-")[2]
        self._step_range = annotate(RANGES.get(step, step))
        self._infer_range = annotate("infer")

        core = ov.Core()
        precision, threads = _precision(parameters, core), _threads(parameters)
        path = Path(args["model_repository"], args["model_version"], "model.onnx")
        settings = {hints.inference_precision: PRECISIONS[precision], properties.inference_num_threads: threads}

        def requests(mode: hints.PerformanceMode) -> list[ov.InferRequest]:
            """One that runs and one that waits on every stream: none is idle while results are collected."""
            try:
                compiled = core.compile_model(path, "CPU", settings | {hints.performance_mode: mode})
            except RuntimeError as error:
                raise ValueError(f"{path} cannot be run, build the family again: {_cause(error)}") from None
            streams = compiled.get_property(properties.streams.num)
            return [compiled.create_infer_request() for _ in range(2 * streams)]

        weights = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
        self._on_all_threads = requests(hints.PerformanceMode.LATENCY)
        # Streams of few threads each: threads that share one small micro-batch mostly wait for each other.
        is_shared = threads > 1 and weights <= SMALL
        self._on_streams = requests(hints.PerformanceMode.THROUGHPUT) if is_shared else self._on_all_threads
        pb_utils.Logger.log_info(
            f"{args['model_name']}: {precision}, {threads} of {os.cpu_count()} processors, "
            f"{len(self._on_streams) // 2} streams"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Runs one dynamic batch and answers every request."""
        with self._step_range:
            return self._execute(requests)

    def _execute(self, requests: list[Any]) -> list[Any]:
        tensors = [
            {n: pb_utils.get_input_tensor_by_name(request, n).as_numpy() for n in self._inputs}
            for request in requests
        ]
        errors = {i: error for i, inputs in enumerate(tensors) if (error := self._refusal(requests[i], inputs))}
        items = self._items({i: inputs for i, inputs in enumerate(tensors) if i not in errors})
        if self._metrics:
            self._metrics.count(items)
        results: dict[tuple[int, int], dict[str, Array]] = {}
        with self._infer_range:
            for batch, outcome in self._run_all(list(_micro_batches(items, self._token_budget))):
                for i, item in enumerate(batch):
                    if isinstance(outcome, FAILURES):
                        failed = pb_utils.TritonError(_cause(outcome))
                        errors.update((request, failed) for request, _ in item.places)
                    else:
                        results.update((place, outcome[i]) for place in item.places)
        return [
            pb_utils.InferenceResponse(error=errors[i])
            if i in errors
            else self._response([results[i, row] for row in range(len(inputs[self._inputs[0]]))])
            for i, inputs in enumerate(tensors)
        ]

    def _refusal(self, request: Any, inputs: dict[str, Array]) -> Any:
        """The error of a request that nobody waits for, or whose ids no tokenizer of the family made; or None."""
        if not self._max_tokens:
            return None
        if time.monotonic() > deadline.of(request):
            return pb_utils.TritonError("nobody waits for the answer", pb_utils.TritonError.CANCELLED)
        (ids,) = inputs.values()
        length = max(self._row_lengths(inputs))
        sentence = ""
        if length > self._max_tokens:
            sentence = f"a row of {length} tokens is over this model's {self._max_tokens}"
        elif ids.min() < NO_TOKEN or ids.max() >= self._vocabulary:
            sentence = (
                f"input_ids holds {ids.min()} to {ids.max()}; ids are below {self._vocabulary}, {NO_TOKEN} is none"
            )
        if not sentence:
            return None
        return pb_utils.TritonError(
            f"{sentence}: send text to the ensemble instead", pb_utils.TritonError.INVALID_ARG
        )

    def _items(self, tensors: dict[int, dict[str, Array]]) -> list[Item]:
        """Every row of every request; where token ids are all there is, equal rows are one item."""
        items: list[Item] = []
        known: dict[bytes, Item] = {}
        for request, inputs in tensors.items():
            lengths = self._row_lengths(inputs)
            for row, length in enumerate(lengths):
                own = {
                    name: array[row, :length].reshape(-1) if name in self._ragged else array[row]
                    for name, array in inputs.items()
                }
                item = Item(own, length)
                if self._joinable:
                    item = known.setdefault(own[self._inputs[0]].tobytes(), item)
                if not item.places:
                    items.append(item)
                item.places.append((request, row))
        return items

    def _row_lengths(self, inputs: dict[str, Array]) -> list[int]:
        for source in self._lengths.values():
            counts: list[int] = (inputs[source] != NO_TOKEN).sum(axis=1).tolist()
            return counts
        return [1] * len(inputs[self._inputs[0]])

    def _run_all(self, batches: list[list[Item]]) -> Iterator[tuple[list[Item], Outcome]]:
        """Runs micro-batches on all streams, the longest first so that the streams end together.

        From this one thread: OpenVINO's Python bindings can deadlock when two threads use them for the first time.
        """
        running: deque[tuple[list[Item], ov.InferRequest]] = deque()
        # With half of the streams idle, all threads on one micro-batch after another end sooner.
        free = list(self._on_all_threads if 4 * len(batches) <= len(self._on_streams) else self._on_streams)
        for batch in reversed(batches):
            if not free:
                done, request = running.popleft()
                yield done, self._outcome(done, request)
                free.append(request)
            try:
                free[-1].start_async(self._feeds(batch), share_inputs=True)
                running.append((batch, free.pop()))
            except FAILURES as error:
                yield batch, error
        for batch, request in running:
            yield batch, self._outcome(batch, request)

    def _feeds(self, batch: list[Item]) -> dict[str, Array]:
        """A micro-batch as Triton's C++ backends would hand it over."""
        feeds: dict[str, Array] = {}
        for name in self._inputs:
            rows = [item.inputs[name] for item in batch]
            feeds[name] = np.concatenate(rows) if name in self._ragged else np.stack(rows)
        lengths = np.array([item.length for item in batch], np.int32)
        return feeds | dict.fromkeys(self._lengths, lengths)

    def _outcome(self, batch: list[Item], request: ov.InferRequest) -> Outcome:
        """Waits for a micro-batch: each item's outputs, or the engine's error."""
        ends = np.cumsum([item.length for item in batch])[:-1]
        outputs: dict[str, Any] = {}
        try:
            request.wait()
            for name in self._outputs:
                # The engine's own memory, which the next micro-batch overwrites.
                values = request.get_tensor(name).data.copy()
                outputs[name] = np.split(values, ends) if name in self._scattered else values
        except FAILURES as error:
            return error
        return [{name: values[i] for name, values in outputs.items()} for i in range(len(batch))]

    def _response(self, rows: list[dict[str, Array]]) -> Any:
        """One request's rows as tensors, scattered outputs filled with zeros to the longest row."""
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, _stack([row[name] for row in rows])) for name in self._outputs]
        )


def _cause(error: Failure) -> str:
    """The end of the engine's message, in one line; before it come the places in its sources."""
    return " ".join(str(error).split())[-200:]


def _targets(entries: list[dict[str, Any]], kind: str) -> dict[str, str]:
    """Target tensor -> source input of every `batch_input` or `batch_output`; only `kind` is run here."""
    for entry in entries:
        if entry["kind"] != kind:
            raise ValueError(f"this step runs {kind}, not {entry['kind']}: change config.pbtxt")
    return {name: entry["source_input"][0] for entry in entries for name in entry["target_name"]}


def _stack(rows: list[Array]) -> Array:
    if len(rows) == 1:
        return rows[0][None]
    if rows[0].ndim == 1:
        return np.stack(rows)
    stacked = np.zeros((len(rows), max(map(len, rows)), *rows[0].shape[1:]), rows[0].dtype)
    for target, row in zip(stacked, rows, strict=True):
        target[: len(row)] = row
    return stacked


def _micro_batches(items: list[Item], budget: int) -> Iterator[list[Item]]:
    """Items by length, cut where the next is over the budget of tokens or much wider; no item is ever cut."""
    batch: list[Item] = []
    tokens = 0
    for item in sorted(items, key=lambda item: item.length):
        if batch and (tokens + item.length > budget or _width(item) > WIDEST * _width(batch[0])):
            yield batch
            batch, tokens = [], 0
        batch.append(item)
        tokens += item.length
    if batch:
        yield batch


def _width(item: Item) -> int:
    """Columns that the graph gives the item alone: it rounds rows up to 16."""
    return -(-item.length // 16) * 16


def _precision(parameters: dict[str, str], core: ov.Core) -> str:
    value = _setting(parameters, "precision")
    if value == "auto":
        return "bf16" if "BF16" in core.get_property("CPU", properties.device.capabilities) else "fp32"
    if value not in PRECISIONS:
        raise ValueError(f"ENCODER_PRECISION is {value!r}: choose {', '.join(PRECISIONS)} or auto")
    return value


def _threads(parameters: dict[str, str]) -> int:
    value = _setting(parameters, "threads")
    if value == "auto":
        return max(1, _cores() // int(os.environ.get("ENCODER_COUNT", "1")))
    if not value.isdecimal() or int(value) == 0:
        raise ValueError(f"ENCODER_THREADS is {value!r}: choose a number from 1 or auto")
    return int(value)


def _setting(parameters: dict[str, str], name: str) -> str:
    """The model parameter `name`, or the environment's word where it says "auto"."""
    value = parameters[name]
    return os.environ.get(f"ENCODER_{name.upper()}", value) if value == "auto" else value


def _cores() -> int:
    """Cores that this process may use: its affinity, cut by the CPU quotas of its cgroups (v2)."""
    cores = len(os.sched_getaffinity(0))
    own = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    for group in (Path(CGROUPS, own), *Path(CGROUPS, own).parents):
        try:
            quota, period = (group / "cpu.max").read_text().split()
        except OSError:
            continue
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores
