"""ONNX runner step (Python backend): runs `model.onnx` on OpenVINO, fed as Triton's C++ backends would feed it.

The model's own config.pbtxt says how. Inputs with `allow_ragged_batch` are concatenated end to end into one
dimension; a `batch_input` of kind BATCH_ITEM_SHAPE_FLATTEN adds the length of each item. Inputs that are not
ragged are stacked along the batch.

An encoder has its head beside it: `head.onnx` is run on the hidden states where they lie, by the same lengths, and
with the input `kept_ids` as its ids where there is one. What it gives is the answer.

A CPU gains little from large batches and loses much to texts of unlike length in one, since attention works on
rows as wide as the longest. So items are ordered by length and run in micro-batches of like length, at
most `token_budget` tokens each (a longer item runs alone), as many at once as the engine has streams. Too few of
them to keep the streams busy run on all threads instead, one after another, and so do all of a model whose weights
are too large to be prepared twice. Identical rows of token ids are run once.

Model parameters, each overridden by the environment variable in brackets when it is "auto":
  precision     "fp32", "bf16" or "auto": bf16 where the CPU computes in it [ENCODER_PRECISION]
  head_precision  "fp32", for a small head on one thread, or "auto": as the encoder, on its threads
  threads       a number or "auto": every core this process may use, shared among as many encoders as the
                environment variable ENCODER_COUNT says [ENCODER_THREADS]
  token_budget  tokens in a micro-batch
  spread        the widest item of a micro-batch over its narrowest
  max_tokens    of an encoder, the most in a row; `vocabulary`, the number of its token ids
Errors are those of `requests.py`, its items being micro-batches: one that fails, fails as a whole.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Mapping
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
from .requests import Batch, Item, Model

Array = npt.NDArray[Any]

CGROUPS = "/sys/fs/cgroup"

SMALL = 512 << 20
"""Bytes of weights up to which a model is prepared twice, for one thread a stream and for all threads at once."""

MOMENT = 1
"""Milliseconds in which a small head is done."""

PLACES = re.compile(r"(?:Exception from|Check '.*?' failed at) \S+:\d+:")
"""Where in its sources OpenVINO says that an error has been."""

RANGES = {"encoder": "encode", "scoring": "score"}
"""Step -> the name of its range in Nsight Systems; within it, `infer` is the engine's share."""

annotate: Callable[[str], AbstractContextManager[Any]] = nullcontext
with suppress(ImportError):
    import nvtx

    annotate = partial(nvtx.annotate, domain="steps")

PRECISIONS = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16}


Failure: TypeAlias = "RuntimeError | MemoryError"
"""What the engine raises, and NumPy where its results do not fit."""

FAILURES = (RuntimeError, MemoryError)

Ports: TypeAlias = "list[tuple[ov.ConstOutput, set[str]]]"
"""Inputs of a graph and their names."""

Outcome: TypeAlias = "list[dict[str, Array]] | Failure"
"""Each item's outputs, by name, or what was raised."""


class TritonPythonModel:
    """One compiled graph that runs dynamic batches of ragged requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Compiles `model.onnx` of the version folder."""
        config = json.loads(args["model_config"])
        self._model = Model(args["model_name"], config)
        parameters = self._model.parameters
        self._token_budget, self._spread = int(parameters["token_budget"]), float(parameters["spread"])
        step = args["model_name"].rpartition("-")[2]
        self._step_range = annotate(RANGES.get(step, step))
        self._infer_range = annotate("infer")

        core = ov.Core()
        precision, threads = _precision(parameters, core), _threads(parameters)
        folder = Path(args["model_repository"], args["model_version"])

        def compiled(name: str, mode: hints.PerformanceMode, precision: str, threads: int) -> ov.CompiledModel:
            settings = {
                hints.inference_precision: PRECISIONS[precision],
                hints.performance_mode: mode,
                properties.inference_num_threads: threads,
                # Pinned, every run moves its thread to a core and back, whatever else that core is busy with.
                hints.enable_cpu_pinning: False,
            }
            try:
                return core.compile_model(folder / name, "CPU", settings)
            except RuntimeError as error:
                place = folder / name
                raise ValueError(f"{place} cannot be run, build the family again: {_cause(error)}") from None

        def lanes(mode: hints.PerformanceMode) -> list[Lane]:
            """One that runs and one that waits on every stream: none is idle while results are collected."""
            graph, head = compiled("model.onnx", mode, precision, threads), small_head
            if head is None and (folder / "head.onnx").exists():
                head = compiled("head.onnx", mode, precision, threads)
            return [Lane(graph, head) for _ in range(2 * graph.get_property(properties.streams.num))]

        latency = hints.PerformanceMode.LATENCY
        is_small = parameters.get("head_precision") == "fp32"
        small_head = compiled("head.onnx", latency, "fp32", 1) if is_small else None
        weights = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
        self._on_all_threads = lanes(latency)
        # Streams of few threads each: threads that share one small micro-batch mostly wait for each other.
        is_shared = threads > 1 and weights <= SMALL
        self._on_streams = lanes(hints.PerformanceMode.THROUGHPUT) if is_shared else self._on_all_threads
        # What the engine prepares at its first run, two streams should not prepare at once. Triton's own warm-up
        # does not reach them: its rows are all equal, so one is run, on all threads.
        for lane in self._on_streams if is_shared else ():
            with suppress(*FAILURES):
                lane.start(self._feeds([_smallest(config)]))
                lane.outputs()
        self._memory = Memory(args["model_name"])
        family = pb_utils.MetricFamily(
            name="encoder_precision_info", description="What a model computes in", kind=pb_utils.MetricFamily.GAUGE
        )
        self._computes_in = family, family.Metric(labels={"model": args["model_name"], "precision": precision})
        self._computes_in[1].set(1)
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
        batches = _micro_batches(batch.items, self._token_budget, self._spread)
        with self._infer_range:
            for items, outcome in self._run_all(list(batches)):
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
        # With half of the streams idle, all threads on one micro-batch after another end sooner.
        free = list(self._on_all_threads if 4 * len(batches) <= len(self._on_streams) else self._on_streams)
        encoding: deque[tuple[list[Item], Lane]] = deque()
        ending: deque[tuple[list[Item], Lane]] = deque()
        while batches or encoding or ending:
            while batches and free:
                batch, lane = batches.pop(), free.pop()
                try:
                    lane.start(self._feeds(batch))
                    encoding.append((batch, lane))
                except FAILURES as error:
                    free.append(lane)
                    yield batch, error
            if encoding:
                batch, lane = encoding.popleft()
                try:
                    lane.start_head()
                    ending.append((batch, lane))
                except FAILURES as error:
                    free.append(lane)
                    yield batch, error
            while ending and (ending[0][1].is_done() or not (encoding or (batches and free))):
                batch, lane = ending.popleft()
                try:
                    outputs = lane.outputs()
                    outcome: Outcome = [
                        {name: outputs[name][i] for name in self._model.outputs} for i in range(len(batch))
                    ]
                except FAILURES as error:
                    outcome = error
                free.append(lane)
                yield batch, outcome

    def _feeds(self, batch: list[Item]) -> dict[str, Array]:
        """A micro-batch as Triton's C++ backends would hand it over."""
        feeds: dict[str, Array] = {}
        for name in self._model.inputs:
            rows = [item.inputs[name] for item in batch]
            feeds[name] = np.concatenate(rows) if name in self._model.ragged else np.stack(rows)
        lengths = np.array([item.length for item in batch], np.int32)
        return feeds | dict.fromkeys(self._model.lengths, lengths)


class Lane:
    """Runs one micro-batch at a time: a graph, and the head behind it."""

    def __init__(self, graph: ov.CompiledModel, head: ov.CompiledModel | None) -> None:
        self._graph = graph.create_infer_request()
        self._head = head.create_infer_request() if head else None
        self._ports = [(port, port.names) for port in graph.inputs]
        self._head_ports = [(port, port.names) for port in head.inputs] if head else []
        self._results = [(i, port.names) for i, port in enumerate((head or graph).outputs)]
        self._feeds: dict[str, ov.Tensor] = {}

    def start(self, feeds: Mapping[str, Array]) -> None:
        """Starts the graph; what it reads stays where it is."""
        self._feeds = {name: ov.Tensor(values, shared_memory=True) for name, values in feeds.items()}
        _set(self._graph, self._ports, self._feeds)
        self._graph.start_async()

    def start_head(self) -> None:
        """Waits for the graph, and starts the head on its states."""
        self._graph.wait()
        if self._head is None:
            return
        states = self._graph.get_output_tensor(0)
        ids = self._feeds.get("kept_ids", self._feeds["input_ids"])
        _set(self._head, self._head_ports, self._feeds | {"last_hidden_state": states, "input_ids": ids})
        self._head.start_async()

    def is_done(self) -> bool:
        """Whether the head is, now or in a moment."""
        return self._head is None or self._head.wait_for(MOMENT)

    def outputs(self) -> dict[str, Array]:
        """Waits for what the last graph gives."""
        last = self._head or self._graph
        last.wait()
        # The engine's own memory, which the next micro-batch overwrites.
        found = ((last.get_output_tensor(i).data.copy(), names) for i, names in self._results)
        return {name: values for values, names in found for name in names}


def _set(request: ov.InferRequest, ports: Ports, feeds: Mapping[str, ov.Tensor]) -> None:
    for port, names in ports:
        request.set_tensor(port, next(feeds[name] for name in names if name in feeds))


def _smallest(config: dict[str, Any]) -> Item:
    """One token, or one row of what is not ragged."""
    inputs = {}
    for tensor in config["input"]:
        shape = [max(1, int(size)) for size in tensor["dims"]]
        inputs[tensor["name"]] = np.zeros(shape, pb_utils.triton_string_to_numpy(tensor["data_type"]))
    return Item(inputs, 1)


def _cause(error: Failure) -> str:
    """The engine's message in one line, without the places in its sources, which come first."""
    return textwrap.shorten(PLACES.sub("", str(error)), 300, placeholder=" …")


def _micro_batches(items: list[Item], budget: int, spread: float) -> Iterator[list[Item]]:
    """Items by length, cut where the next is over the budget of tokens or much wider; no item is ever cut."""
    batch: list[Item] = []
    tokens = 0
    for item in sorted(items, key=lambda item: item.length):
        if batch and (tokens + item.length > budget or _width(item) > spread * _width(batch[0])):
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
