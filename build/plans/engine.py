"""Compiles graphs into TensorRT plans; the command is `build.plans.__main__`.

Runs where the plans are going to be served: in NVIDIA's tritonserver image, on the GPU. Every `model.onnx`
becomes `model.plan` beside it, strongly typed (the precision is the graph's own), with optimisation profiles for
small batches up to the largest that Triton may make, and a stamp (see `build.plans.plan`). A plan whose stamp
still fits is left alone.

`--quantize` first quantises the encoder's linear layers with NVIDIA ModelOpt, calibrated on texts of your own.
Where the GPU or ModelOpt cannot, the plan is built in the graph's own precision, and a printed line says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tritonclient.grpc.model_config_pb2 import ModelConfig

from build.config import CACHE
from build.errors import BuildError
from build.graphs.ragged import WIDEST
from build.plans.plan import GRAPH, Machine, PlannedModel, Stamp, tensorrt_module
from build.runtimes import token_limits

QUANTIZATIONS = {"fp8": (8, 9), "nvfp4": (10, 0)}
"""Quantisation -> the lowest compute capability that multiplies in it."""

CALIBRATION_TEXTS = 512
"""More texts do not move the ranges."""

Shape: TypeAlias = tuple[int, ...]
Feed: TypeAlias = dict[str, npt.NDArray[np.int32]]


class NotQuantizedError(Exception):
    """A graph cannot be quantised; the message says why."""


@dataclass(frozen=True)
class Profile:
    """How much may come in one batch, at most; kernels are chosen for that much."""

    tokens: int
    """In the whole batch."""
    texts: int
    longest: int
    """Tokens of the longest text."""

    @classmethod
    def all_of(cls, model: ModelConfig, tokenizer: ModelConfig) -> list[Profile]:
        """The profiles of one model of a family, whose tokenizer cuts texts to its `max_tokens`.

        Triton takes the one whose kernels are for the number of tokens nearest to the batch's, of those that have
        room for it. It does not look at `lengths` and `widest`, so each profile has room for as many and as long
        texts as its tokens can make.
        """
        texts, longest = model.max_batch_size, int(tokenizer.parameters["max_tokens"].string_value)
        return [
            cls(tokens, min(texts, tokens), min(longest, tokens))
            for tokens in token_limits(texts, longest)[-(len(model.instance_group[0].profile) or 1) :]
        ]

    def shapes(self, inputs: Mapping[str, Shape], hidden_size: int) -> dict[str, tuple[Shape, Shape, Shape]]:
        """Name -> (smallest, usual, largest) shape of every input of a graph.

        `inputs` has the graph's own shapes, -1 where they vary: `input_ids` [T], `lengths` [B], `widest` [S],
        `last_hidden_state` [T * hidden_size], any other [B, ...].
        """
        usual_width = max(1, self.tokens // self.texts)
        sizes = {
            "input_ids": (1, self.tokens, self.tokens),
            "last_hidden_state": (hidden_size, hidden_size * self.tokens, hidden_size * self.tokens),
            WIDEST: (1, usual_width, self.longest),
        }
        shapes = {}
        for name, shape in inputs.items():
            smallest, usual, most = ((size, *shape[1:]) for size in sizes.get(name, (1, self.texts, self.texts)))
            shapes[name] = smallest, usual, most
        return shapes


class CalibrationTexts:
    """Texts as an encoder gets them, in the order ModelOpt asks: what its CalibrationDataReader does.

    Every batch is `input_ids` INT32 [T], `lengths` INT32 [B] and `widest` INT32 [S], T at most the profile's
    tokens unless one text has more.
    """

    def __init__(self, ids: Sequence[Sequence[int]], profile: Profile) -> None:
        self._batches = list(_batches(ids, profile))
        self.rewind()

    def get_first(self) -> Feed:
        """The first batch, without taking it."""
        return self._batches[0]

    def get_next(self) -> Feed | None:
        """The next batch, or None after the last."""
        return next(self._left, None)

    def rewind(self) -> None:
        """Starts again."""
        self._left = iter(self._batches)


def _batches(ids: Sequence[Sequence[int]], profile: Profile) -> Iterator[Feed]:
    batch: list[Sequence[int]] = []
    for text in ids:
        if batch and (len(batch) == profile.texts or sum(map(len, batch)) + len(text) > profile.tokens):
            yield _feed(batch)
            batch = []
        batch.append(text)
    if batch:
        yield _feed(batch)


def _feed(texts: Sequence[Sequence[int]]) -> Feed:
    lengths = np.array([len(text) for text in texts], np.int32)
    return {
        "input_ids": np.concatenate([np.asarray(text, np.int32) for text in texts]),
        "lengths": lengths,
        WIDEST: np.zeros(lengths.max(), np.int32),
    }


def unsupported(quantization: str, machine: Machine) -> str | None:
    """Why `quantization` cannot be had on `machine`, or None when it can."""
    lowest = QUANTIZATIONS[quantization]
    if tuple(map(int, machine.compute_capability.split("."))) < lowest:
        return (
            f"{machine.gpu} has compute capability {machine.compute_capability}, "
            f"{quantization} needs {lowest[0]}.{lowest[1]}"
        )
    if int(machine.tensorrt.split(".")[0]) < 10:
        return f"TensorRT {machine.tensorrt} is too old for {quantization}, it needs 10 or newer"
    if importlib.util.find_spec("modelopt") is None:
        return "NVIDIA ModelOpt is not installed (pip install 'nvidia-modelopt[onnx]')"
    return None


def tensorrt() -> Any:
    """TensorRT's Python module; raises BuildError when it is not installed."""
    try:
        return tensorrt_module()
    except ImportError as error:
        raise BuildError(
            f"TensorRT's Python package cannot be imported ({error}): build plans in the image that serves them, "
            "or install tensorrt-cu13-bindings of the version that its TRT_VERSION names"
        ) from None


def timing_cache(folder: Path, machine: Machine) -> Path:
    """Where the kernel timings of this GPU and TensorRT are kept."""
    name = "".join(letter if letter.isalnum() else "-" for letter in machine.gpu.lower())
    return folder / "tensorrt" / f"{name}-{machine.compute_capability}-{machine.tensorrt}.timing"


def calibration_ids(file: Path, tokenizer: Path, profile: Profile) -> list[list[int]]:
    """Token ids of the texts in `file`, one a line; raises BuildError when there are none."""
    try:
        texts = [line for line in file.read_text().splitlines() if line.strip()][:CALIBRATION_TEXTS]
    except OSError as error:
        raise BuildError(f"cannot read the calibration texts in {file}: {error.strerror}") from None
    if not texts:
        raise BuildError(f"{file} holds no calibration texts: it needs one a line")
    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.no_padding()
    encoder.enable_truncation(profile.longest)
    return [list(encoding.ids) for encoding in encoder.encode_batch(texts)]


def compile_graph(
    trt: Any, graph: Path, profiles: Sequence[Profile], hidden_size: int, workspace: int, timings: Path
) -> memoryview:
    """The plan of one graph; `trt` is TensorRT's Python module, `workspace` in bytes.

    Raises BuildError with TensorRT's own words when it cannot parse or build the graph.
    """
    log = _log(trt)
    builder = trt.Builder(log)
    if builder is None:
        raise BuildError(f"TensorRT cannot start: {log.errors()}")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        causes = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors)
        raise BuildError(f"TensorRT {trt.__version__} cannot read {graph}: {causes or log.errors()}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    config.progress_monitor = _progress(trt)
    cache = config.create_timing_cache(timings.read_bytes() if timings.exists() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        # Of another driver, say: TensorRT checks that itself.
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    for profile in profiles:
        limits = builder.create_optimization_profile()
        for name, shapes in profile.shapes({t.name: tuple(t.shape) for t in inputs}, hidden_size).items():
            limits.set_shape(name, *shapes)
        config.add_optimization_profile(limits)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"TensorRT {trt.__version__} cannot build {graph}: {log.errors()}")
    if (timed := config.get_timing_cache()) is not None:
        timings.parent.mkdir(parents=True, exist_ok=True)
        timings.write_bytes(bytes(timed.serialize()))
    return memoryview(plan)


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps TensorRT's errors, for the one sentence that is raised."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self._errors.append(message)

        def errors(self) -> str:
            return "; ".join(self._errors) or "it gives no reason"

    return Log()


def _progress(trt: Any) -> Any:
    class Progress(trt.IProgressMonitor):  # type: ignore[misc]
        """Prints a line for each outermost phase of a build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                print(f"  {phase_name}: {num_steps} steps", flush=True)

        def step_complete(self, phase_name: str, step: int) -> bool:  # noqa: ARG002
            return True

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Progress()


@contextmanager
def quantized(graph: Path, mode: str, texts: CalibrationTexts) -> Iterator[Path]:
    """A copy of `graph` whose linear layers are quantised by ModelOpt, for as long as the context lasts.

    ModelOpt calibrates on ONNX Runtime, of which only the CUDA provider computes in bf16.
    Raises NotQuantizedError with ModelOpt's own words, as when it has no such mode.
    """
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        # ModelOpt writes its intermediate files beside the graph it is given.
        for file in graph.parent.glob(f"{GRAPH}*"):
            shutil.copyfile(file, Path(folder, file.name))
        output = Path(folder, "quantized.onnx")
        try:
            importlib.import_module("modelopt.onnx.quantization").quantize(
                str(Path(folder, GRAPH)),
                quantize_mode=mode,
                calibration_data_reader=texts,
                calibration_method="max",
                calibration_eps=["cuda:0", "cpu"],
                # Linear layers only: attention's MatMuls are little of the arithmetic and feed the softmax.
                op_types_to_quantize=["Gemm"],
                # Not a precision: it leaves the graph's own types alone.
                high_precision_dtype="fp32",
                use_external_data_format=True,
                output_path=str(output),
                log_level="WARNING",
            )
        except Exception as error:  # of ModelOpt, ONNX Runtime or a missing extra: they share no base
            raise NotQuantizedError(" ".join(str(error).split()) or type(error).__name__) from error
        yield output


def build_plan(
    model: PlannedModel, tokenizer: ModelConfig, machine: Machine, options: argparse.Namespace, quantization: str
) -> str:
    """Writes the plan of one model and its stamp; returns the quantisation that it has in the end."""
    trt = tensorrt()
    profiles = Profile.all_of(model.config, tokenizer)
    hidden_size = next((t.dims[-1] for t in model.config.input if t.name == "last_hidden_state"), 1)
    timings = timing_cache(CACHE, machine)

    def compiled(graph: Path) -> memoryview:
        return compile_graph(trt, graph, profiles, hidden_size, options.workspace << 30, timings)

    graph = model.version / GRAPH
    if quantization == "none":
        plan = compiled(graph)
    else:
        tokens = model.version.parent.parent / tokenizer.name / "1" / "tokenizer.json"
        usual = profiles[len(profiles) // 2]
        texts = CalibrationTexts(calibration_ids(options.calibration, tokens, usual), usual)
        try:
            with quantized(graph, quantization, texts) as smaller:
                plan = compiled(smaller)
        except NotQuantizedError as error:
            print(f"not quantized to {quantization}, the graph's own precision is kept: {error}", flush=True)
            quantization, plan = "none", compiled(graph)
    # The stamp goes first out and last in: a plan without one is refused.
    model.stamp.unlink(missing_ok=True)
    aside = model.plan.with_name(model.plan.name + ".part")
    aside.write_bytes(plan)
    aside.replace(model.plan)
    Stamp.of(model, machine, quantization).write(model.plan)
    return quantization
