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
Errors are those of `requests.py`, its items being micro-batches: one that fails, fails as a whole.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import openvino as ov
import openvino.properties.hint as hints
import triton_python_backend_utils as pb_utils
from openvino import properties

from .memory import Memory
from .requests import Batch, Item, Model, targets

Array = npt.NDArray[Any]

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


Failure: TypeAlias = "RuntimeError | MemoryError"
"""What the engine raises, and NumPy where its results do not fit."""

FAILURES = (RuntimeError, MemoryError)

Outcome: TypeAlias = "list[dict[str, Array]] | Failure"
"""Each item's outputs, by name, or what was raised."""


class TritonPythonModel:
    """One compiled graph that runs dynamic batches of ragged requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Compiles `model.onnx` of the version folder."""
        config = json.loads(args["model_config"])
        self._model = Model(args["model_name"], config)
        self._scattered = targets(config["batch_output"], "BATCH_SCATTER_WITH_INPUT_SHAPE")
        parameters = self._model.parameters
        self._token_budget = int(parameters["token_budget"])
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
        # What the engine prepares at its first run, two streams should not prepare at once. Triton's own warm-up
        # does not reach them: its rows are all equal, so one is run, on all threads.
        for request in self._on_streams if is_shared else ():
            with suppress(*FAILURES):
                request.infer(self._feeds([_smallest(config)]), share_inputs=True)
        self._memory = Memory(args["model_name"])
        pb_utils.Logger.log_info(
            f"{args['model_name']}: {precision}, {threads} of {os.cpu_count()} processors, "
            f"{len(self._on_streams) // 2} streams"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Runs one dynamic batch and answers every request."""
        with self._step_range:
            responses = self._execute(requests)
        self._memory.measure()
        return responses

    def finalize(self) -> None:
        """Tells what is counted."""
        if self._model.metrics:
            self._model.metrics.close()

    def _execute(self, requests: list[Any]) -> list[Any]:
        batch = Batch(self._model, requests)
        with self._infer_range:
            for items, outcome in self._run_all(list(_micro_batches(batch.items, self._token_budget))):
                for i, item in enumerate(items):
                    if isinstance(outcome, FAILURES):
                        batch.fail(item, _cause(outcome))
                    else:
                        batch.give(item, outcome[i])
        return batch.responses()

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
        for name in self._model.inputs:
            rows = [item.inputs[name] for item in batch]
            feeds[name] = np.concatenate(rows) if name in self._model.ragged else np.stack(rows)
        lengths = np.array([item.length for item in batch], np.int32)
        return feeds | dict.fromkeys(self._model.lengths, lengths)

    def _outcome(self, batch: list[Item], request: ov.InferRequest) -> Outcome:
        """Waits for a micro-batch: each item's outputs, or the engine's error."""
        ends = np.cumsum([item.length for item in batch])[:-1]
        outputs: dict[str, Any] = {}
        try:
            request.wait()
            for name in self._model.outputs:
                # The engine's own memory, which the next micro-batch overwrites.
                values = request.get_tensor(name).data.copy()
                outputs[name] = np.split(values, ends) if name in self._scattered else values
        except FAILURES as error:
            return error
        return [{name: values[i] for name, values in outputs.items()} for i in range(len(batch))]


def _smallest(config: dict[str, Any]) -> Item:
    """One token, or one row of what is not ragged."""
    inputs = {}
    for tensor in config["input"]:
        shape = [max(1, int(size)) for size in tensor["dims"]]
        inputs[tensor["name"]] = np.zeros(shape, pb_utils.triton_string_to_numpy(tensor["data_type"]))
    return Item(inputs, 1)


def _cause(error: Failure) -> str:
    """The end of the engine's message, in one line; before it come the places in its sources."""
    return " ".join(str(error).split())[-200:]


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
