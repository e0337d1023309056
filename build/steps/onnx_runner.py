"""ONNX runner step (Python backend): runs `model.onnx` on OpenVINO, fed as Triton's C++ backends would feed it.

The model's own config.pbtxt says how. Inputs with `allow_ragged_batch` are concatenated end to end into one
dimension; a `batch_input` of kind BATCH_ITEM_SHAPE_FLATTEN adds the length of each item. Inputs that are not
ragged are stacked along the batch.

An encoder has its head beside it: `head.onnx` is run on the hidden states where they lie, by the same lengths, and
with the input `kept_ids` as its ids where there is one. What it gives is the answer.

A CPU gains little from large batches and loses much to texts of unlike length in one, since attention works on
rows as wide as the longest. So items run in micro-batches of like length, at most `token_budget` tokens each (a
longer item runs alone), as many at once as the engine has streams; `streams.py` says in which order. Where
nothing else is under way, too few of them to keep the streams busy run on all threads instead, one after another.
A model whose weights are too large to be prepared twice has one stream of all threads. Identical rows of token ids
that come together are run once.

Model parameters, each overridden by the environment variable in brackets when it is "auto":
  precision     "fp32", "bf16" or "auto": bf16 where the CPU computes in it [ENCODER_PRECISION]
  head_precision  "fp32", for a small head on one thread, or "auto": as the encoder, on its threads
  threads       a number or "auto": every core this process may use, shared among as many encoders as the
                environment variable ENCODER_COUNT says [ENCODER_THREADS]
  token_budget  tokens in a micro-batch
  spread        the widest item of a micro-batch over its narrowest
  max_tokens    of an encoder, the most in a row; `vocabulary`, the number of its token ids
Errors are those of `requests.py`, its items being micro-batches: one that fails, fails as a whole. A graph that
fails ends the process, since its engine is lost.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
import openvino.properties.hint as hints
import triton_python_backend_utils as pb_utils
from openvino import properties

from .memory import Memory
from .ranges import annotate
from .requests import Batch, Item, Model
from .streams import Lane, Streams, cause

Array = npt.NDArray[Any]

CGROUPS = "/sys/fs/cgroup"

SMALL = 512 << 20
"""Bytes of weights up to which a model is prepared twice, for one thread a stream and for all threads at once."""

RANGES = {"encoder": "encode", "scoring": "score"}
"""Step -> the name of its range in Nsight Systems."""

PRECISIONS = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16}


class TritonPythonModel:
    """One compiled graph that runs dynamic batches of ragged requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Compiles `model.onnx` of the version folder."""
        config = json.loads(args["model_config"])
        self._model = Model(args["model_name"], config)
        parameters = self._model.parameters
        step = args["model_name"].rpartition("-")[2]
        self._step_range = annotate(RANGES.get(step, step))

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
                raise ValueError(f"{place} cannot be run, build the family again: {cause(error)}") from None

        is_small = parameters.get("head_precision") == "fp32"
        latency = hints.PerformanceMode.LATENCY
        small_head = compiled("head.onnx", latency, "fp32", 1) if is_small else None

        def graphs(mode: hints.PerformanceMode) -> tuple[ov.CompiledModel, ov.CompiledModel | None]:
            graph, head = compiled("model.onnx", mode, precision, threads), small_head
            if head is None and (folder / "head.onnx").exists():
                head = compiled("head.onnx", mode, precision, threads)
            return graph, head

        def lane(graph: ov.CompiledModel, head: ov.CompiledModel | None) -> Lane:
            return Lane(graph, head, self._feeds, self._model.outputs)

        weights = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
        alone = graphs(latency)
        # Streams of few threads each: threads that share one small micro-batch mostly wait for each other.
        shared = graphs(hints.PerformanceMode.THROUGHPUT) if threads > 1 and weights <= SMALL else alone
        on_all_threads = lane(*alone)
        count = shared[0].get_property(properties.streams.num)
        lanes = [lane(*shared) for _ in range(2 * count)]
        # What the engine prepares at its first run, two streams should not prepare at once, and its bindings can
        # deadlock where two threads use them for the first time. Triton's own warm-up does not reach them: its
        # rows are all equal, so one is run, on all threads.
        for one in (on_all_threads, *lanes):
            one.run([_smallest(config)])
        budget, spread = int(parameters["token_budget"]), float(parameters["spread"])
        self._streams = Streams(on_all_threads, lanes, count, budget, spread)
        self._memory = Memory(args["model_name"])
        family = pb_utils.MetricFamily(
            name="encoder_precision_info", description="What a model computes in", kind=pb_utils.MetricFamily.GAUGE
        )
        self._computes_in = family, family.Metric(labels={"model": args["model_name"], "precision": precision})
        self._computes_in[1].set(1)
        pb_utils.Logger.log_info(
            f"{args['model_name']}: {precision}, {threads} of {os.cpu_count()} processors, {count} streams"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Runs one dynamic batch and answers every request."""
        with self._step_range:
            self._streams.wait_for_room()
            batch = Batch(self._model, requests)
            self._streams.run(batch)
            # Before the answers: an error behind them would fail some that have been sent.
            self._memory.measure()
            return batch.responses()

    def finalize(self) -> None:
        """Ends what is under way and tells what is counted."""
        self._streams.close()
        if self._model.counters:
            self._model.counters.close()

    def _feeds(self, batch: Sequence[Item]) -> dict[str, Array]:
        """A micro-batch as Triton's C++ backends would hand it over."""
        feeds: dict[str, Array] = {}
        for name in self._model.inputs:
            rows = [item.inputs[name] for item in batch]
            feeds[name] = np.concatenate(rows) if name in self._model.ragged else np.stack(rows)
        lengths = np.array([item.length for item in batch], np.int32)
        return feeds | dict.fromkeys(self._model.lengths, lengths)


def _smallest(config: dict[str, Any]) -> Item:
    """One token, or one row of what is not ragged."""
    inputs = {}
    for tensor in config["input"]:
        shape = [max(1, int(size)) for size in tensor["dims"]]
        inputs[tensor["name"]] = np.zeros(shape, pb_utils.triton_string_to_numpy(tensor["data_type"]))
    return Item(inputs, 1)


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
