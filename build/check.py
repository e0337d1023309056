"""Runs every graph of a family once, in the engine that will serve it: `python -m build.check FAMILY ...`.

What cannot run, gives numbers that are not finite, or gives a text another result beside other texts than alone,
ends a build with a sentence and never reaches a server. Each graph is fed as its runtime feeds it, by its
config.pbtxt: one token; a text as long as the window, or as BUDGET allows; texts of unlike lengths together.

A build runs this as a process of its own: a graph is data of somebody else's, and an engine may die of it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from tokenizers import Tokenizer
from tritonclient.grpc.model_config_pb2 import BatchInput, DataType, ModelConfig, ModelInstanceGroup
from tritonclient.utils import triton_to_np_dtype

from build.config import REPOSITORY, read_config, runtime_of
from build.errors import BuildError
from build.memory import free_memory
from build.target import WRITERS

Array: TypeAlias = npt.NDArray[Any]
Batch: TypeAlias = "list[Array]"
"""The ids of each text."""

SECONDS = 900
"""That a family may take; one that takes longer hangs."""

BUDGET = 10**12
"""Bytes of weights times tokens of a text that are worth a build's time: some ten seconds on two cores."""

LONGEST = 2048
"""Tokens of a text at most: the time of attention grows with their square."""

MEMORY = 3
"""Times the bytes of its weights that an engine may need to prepare them."""

MIDDLE = 48
"""Tokens of the longest text among unlike ones."""

AGREEMENT = {"": 0.999, "static": 0.98, "dynamic": 0.9}
"""The ensemble's `quantisation` -> the least cosine of a text's result alone and beside others."""

NO_TOKEN = -1
RESULTS = ("embeddings", "logit", "probabilities", "values", "token_embeddings")
TEXT = "Every graph is run once before it is served, with 12 words of this sentence over and over again. "


class Engine(Protocol):
    """Runs one graph."""

    title: str

    def __init__(self, path: Path) -> None: ...

    def run(self, feed: dict[str, Array]) -> dict[str, Array]:
        """Every output by name; raises any Exception."""
        ...


class OpenVino:
    """OpenVINO on the CPU, as `steps/onnx_runner.py` runs a graph and the head behind it, but all in FP32.

    Past the end of a table it reads zeros without a word, so indices into tables are outputs too and are compared.
    """

    title = "OpenVINO"

    def __init__(self, path: Path) -> None:
        import openvino
        import openvino.properties.hint as hints

        core, head = openvino.Core(), path.with_name("head.onnx")
        self._graphs: list[tuple[Any, dict[int, int]]] = []
        for file in (path, head) if head.exists() else (path,):
            model = core.read_model(file)
            rows: dict[int, int] = {}
            for node in model.get_ordered_ops():
                if node.get_type_name() != "Gather" or not node.input_value(0).get_partial_shape()[0].is_static:
                    continue
                table, index, axis = (node.input_value(i) for i in range(3))
                if index.get_node().get_type_name() != "Constant" and not axis.get_node().get_data().any():
                    rows[len(model.outputs)] = table.get_partial_shape()[0].get_length()
                    model.add_outputs([index])
            compiled = core.compile_model(model, "CPU", {hints.inference_precision: openvino.Type.f32})
            self._graphs.append((compiled, rows))

    def run(self, feed: dict[str, Array]) -> dict[str, Array]:
        """Every output by name; raises RuntimeError, and IndexError for an index past a table's end."""
        given: dict[str, Array] = {}
        kept = {"input_ids": feed["kept_ids"]} if "kept_ids" in feed else {}
        for compiled, rows in self._graphs:
            known = feed | given | (kept if given else {})
            named = {name for port in compiled.inputs for name in port.names}
            found = compiled({name: values for name, values in known.items() if name in named})
            for place, count in rows.items():
                if not ((indices := found[place]) < count).all():
                    raise IndexError(f"row {indices.max()} of a table of {count} rows is asked for")
            given |= {name: np.array(value) for output, value in found.items() for name in output.names}
        return given


class OnnxRuntime:
    """ONNX Runtime on the CPU."""

    title = "ONNX Runtime"

    def __init__(self, path: Path) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, feed: dict[str, Array]) -> dict[str, Array]:
        """Every output by name; raises what onnxruntime does."""
        return dict(zip(self._names, self._session.run(None, feed), strict=True))


class Torch:
    """Torch on the CPU, as `steps/torch_runner.py` runs a graph and the head behind it."""

    title = "torch"

    def __init__(self, path: Path) -> None:
        import torch

        from build.steps.packed_encoder import PackedEncoder
        from build.steps.torch_graph import TorchGraph

        cpu, head = torch.device("cpu"), path.with_name("head.onnx")
        self._encoder = PackedEncoder(path.parent, cpu, LONGEST) if head.exists() else None
        self._graph = None if head.exists() else TorchGraph(path, cpu)
        self._as_tensor = torch.from_numpy

    def run(self, feed: dict[str, Array]) -> dict[str, Array]:
        """Every output by name; raises what torch does."""
        if self._encoder is None:
            assert self._graph is not None
            outputs = self._graph({name: self._as_tensor(values) for name, values in feed.items()})
            return {name: values.numpy() for name, values in outputs.items()}
        ends = np.cumsum(feed["lengths"])[:-1]
        names = [name for name in ("input_ids", "kept_ids") if name in feed]
        rows = self._encoder.run(*(np.split(feed[name], ends) for name in names))
        if sentences := [row for row in rows if isinstance(row, str)]:
            raise MemoryError(sentences[0])
        found = [row for row in rows if not isinstance(row, str)]
        return {name: _stacked([row[name] for row in found]) for name in found[0]}


def _stacked(rows: Sequence[Array]) -> Array:
    """Rows of one size, or of as many values or vectors as a text has, which are filled up as their step does."""
    filling = NO_TOKEN if rows[0].dtype.kind == "i" else 0
    stacked = np.full((len(rows), max(map(len, rows)), *rows[0].shape[1:]), filling, rows[0].dtype)
    for target, row in zip(stacked, rows, strict=True):
        target[: len(row)] = row
    return stacked


ENGINES: dict[str, type[Engine]] = {
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
    "torch": Torch,
}
"""What executes a graph -> the engine in it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was not tried; returns 1 with the cause when a graph cannot be served."""
    parser = argparse.ArgumentParser(prog="python -m build.check", description=str(__doc__).splitlines()[0])
    parser.add_argument("families", nargs="+", metavar="FAMILY", help="ensembles to check")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="the model repository")
    options = parser.parse_args(arguments)
    done: set[str] = set()
    # Whatever a graph asks for, no other process is to go for it.
    Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        for name in options.families:
            for note in check(options.repository, name, done):
                print(note, flush=True)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def check_apart(repository: Path, families: Sequence[str]) -> None:
    """Checks families in a process of its own; prints what was not tried, raises BuildError with the cause."""
    command = [sys.executable, "-m", "build.check", *families, "--repository", str(repository.resolve())]
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY.parent, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"the graphs of {families[0]} were still running after {SECONDS} s") from None
    print(done.stdout, end="", flush=True)
    if done.returncode == 1:
        raise BuildError((done.stderr.strip().splitlines() or ["the graphs cannot be run"])[-1])
    if done.returncode == -signal.SIGKILL:
        raise BuildError(f"the graphs of {families[0]} were killed in their trial: most likely memory ran out")
    if done.returncode:
        raise BuildError(
            f"the graphs of {families[0]} end the engine that runs them, by signal {-done.returncode}"
        )


def check(repository: Path, family: str, done: set[str] | None = None) -> Iterator[str]:
    """Runs the graphs of one ensemble in order; yields what was not tried, raises BuildError with the cause.

    Models that are `done` are left out, and all others are added to them.
    """
    done = set() if done is None else done
    ensemble = read_config(repository, family)
    if ensemble.platform != "ensemble":
        yield from _check_generator(repository, ensemble)
        return
    steps = dict.fromkeys(step.model_name for step in ensemble.ensemble_scheduling.step)
    configs = [read_config(repository, name) for name in steps]
    tokenizer = next((config for config in configs if "max_tokens" in config.parameters), None)
    graphs = [config for config in configs if config.name not in done and _graph(repository, config).exists()]
    if not graphs:
        return
    is_first = not tokenizer or tokenizer.name not in done
    done.update(steps)
    backend = runtime_of(graphs[0])
    engine = ENGINES.get(backend)
    if engine and graphs[0].instance_group[0].kind == ModelInstanceGroup.KIND_GPU:
        engine, backend = None, "a GPU"
    is_missing = engine is Torch and importlib.util.find_spec("torch") is None
    is_missing |= engine is OnnxRuntime and not _onnxruntime_runs(_graph(repository, graphs[0]))
    if engine is None or is_missing:
        if is_first:
            yield f"{family}: its graphs were not tried, for want of {backend} here"
        return
    weights = sum(file.stat().st_size for config in graphs for file in _graph(repository, config).parent.iterdir())
    if MEMORY * weights > (free := free_memory()):
        need, there = f"{MEMORY * weights / 1e9:.0f} GB", f"{free / 1e9:.0f} GB"
        yield f"{family}: its graphs were not tried: they may take {need} of memory, and {there} are free"
        return
    if tokenizer is None:
        for config in graphs:
            _try(engine, _graph(repository, config), config)
        return
    window = int(tokenizer.parameters["max_tokens"].string_value)
    longest = max(1, min(window, LONGEST, BUDGET // weights))
    batches = list(_batches(_ids(repository, tokenizer, longest), padded=graphs[0].backend != "python"))
    found: list[dict[str, Array]] = [{} for _ in batches]
    for config in graphs:
        _run(engine, _graph(repository, config), config, batches, found)
    _compare(family, found, AGREEMENT[ensemble.parameters["quantisation"].string_value])
    if longest < window:
        yield f"{family}: its graphs were tried with texts of up to {longest} of {window} tokens"


def _check_generator(repository: Path, config: ModelConfig) -> Iterator[str]:
    """Renders a message by the template; reads a prompt and writes a token, where OpenVINO does and they fit."""
    version = repository / config.name / "1"
    path, template = version / "openvino_model.xml", version / "chat_template.jinja"
    tokenizer = Tokenizer.from_file(str(version / "tokenizer.json"))
    if template.exists() and importlib.util.find_spec("jinja2") is not None:
        from build.steps.chat_template import ChatTemplate, TemplateFailureError

        try:
            tokens = json.loads(config.parameters["special_tokens"].string_value)
            ChatTemplate(template.read_text("utf-8"), tokens).render(
                {"messages": [{"role": "user", "content": TEXT}]}
            )
        except TemplateFailureError as error:
            raise BuildError(f"{config.name} cannot be asked: {error}") from None
    if (runtime := runtime_of(config)) in WRITERS:
        yield f"{config.name}: it was not tried, for want of {runtime} here"
        return
    import openvino

    size = path.with_suffix(".bin").stat().st_size
    if MEMORY * size > (free := free_memory()):
        need, there = f"{MEMORY * size / 1e9:.0f} GB", f"{free / 1e9:.0f} GB"
        yield f"{config.name}: its graph was not tried: it may take {need} of memory, and {there} are free"
        return
    ids = np.array([tokenizer.encode(TEXT, add_special_tokens=False).ids[:MIDDLE]], np.int64)
    try:
        request = openvino.Core().compile_model(path, "CPU").create_infer_request()
        for place, row in ((0, ids[:, :-1]), (ids.shape[1] - 1, ids[:, -1:])):
            feed = {
                "input_ids": row,
                "attention_mask": np.ones((1, place + row.shape[1]), np.int64),
                "position_ids": np.arange(place, place + row.shape[1])[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            logits = request.infer(feed)["logits"]
    except Exception as error:  # OpenVINO raises nothing narrower
        raise BuildError(f"{config.name} cannot be run by OpenVINO: {_cause(error)}") from None
    if not np.isfinite(logits).all():
        raise BuildError(f"{config.name} gives logits that are not finite numbers")


def _run(
    engine: type[Engine],
    path: Path,
    config: ModelConfig,
    batches: Sequence[Batch],
    found: Sequence[dict[str, Array]],
) -> None:
    """Runs one graph on every batch, fed with what the graphs before it have `found`, and adds what it gives."""
    cannot = f"{config.name} cannot be run by {engine.title}"
    try:
        graph = engine(path)
    except Exception as error:  # each engine has its own
        raise BuildError(f"{cannot}: {_cause(error)}") from None
    for batch, tensors in zip(batches, found, strict=True):
        tokens = f"{' and '.join(str(len(row)) for row in batch)} tokens"
        try:
            given = graph.run(_feed(config, batch, tensors))
        except Exception as error:
            raise BuildError(f"{cannot} with texts of {tokens}: {_cause(error)}") from None
        for output in config.output:
            values = given[output.name]
            rows = len(batch)
            if output.name == "last_hidden_state":
                rows = sum(map(len, batch))
            elif output.dims[0] == NO_TOKEN:  # as many for each text as that with most has
                rows *= values.shape[1]
            size = rows * math.prod(dim for dim in output.dims if dim > 0)
            if values.size != size:
                raise BuildError(
                    f"{config.name} gives {output.name} {list(values.shape)} for {tokens}, not {size}"
                )
            if not np.isfinite(values).all():
                raise BuildError(f"{config.name} gives {output.name} that are not finite numbers for {tokens}")
            tensors[output.name] = values


def _try(engine: type[Engine], path: Path, config: ModelConfig) -> None:
    """Runs a graph that is fed no text on one item of zeros."""
    feed = {}
    for tensor in config.input:
        dtype = triton_to_np_dtype(DataType.Name(tensor.data_type).removeprefix("TYPE_"))
        feed[tensor.name] = np.zeros((1, *tensor.dims), dtype)
    try:
        given = engine(path).run(feed)
    except Exception as error:  # each engine has its own
        raise BuildError(f"{config.name} cannot be run by {engine.title}: {_cause(error)}") from None
    for output in config.output:
        found, wanted = given[output.name], [1, *output.dims]
        if found.ndim != len(wanted) or any(
            -1 != size != there for size, there in zip(wanted, found.shape, strict=True)
        ):
            raise BuildError(f"{config.name} gives {output.name} {list(found.shape)}, not {wanted}")
        if not np.isfinite(found).all():
            raise BuildError(f"{config.name} gives {output.name} that are not finite numbers")


def _feed(config: ModelConfig, batch: Batch, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """A batch as the runtime of `config` hands it over."""
    lengths = np.array([len(row) for row in batch], np.int32)
    made = {
        BatchInput.BATCH_ITEM_SHAPE_FLATTEN: lengths,
        BatchInput.BATCH_MAX_ELEMENT_COUNT_AS_SHAPE: np.zeros(lengths.max(), np.int32),
    }
    feed = {name: made[entry.kind] for entry in config.batch_input for name in entry.target_name}
    for tensor in config.input:
        if tensor.name in ("input_ids", "kept_ids"):
            feed[tensor.name] = np.concatenate(batch) if tensor.allow_ragged_batch else np.stack(batch)
        elif tensor.name == "last_hidden_state":
            states = tensors[tensor.name]
            feed[tensor.name] = states.reshape(-1) if tensor.allow_ragged_batch else states
        else:
            dtype = triton_to_np_dtype(DataType.Name(tensor.data_type).removeprefix("TYPE_"))
            feed[tensor.name] = np.ones((len(batch), *(abs(size) for size in tensor.dims)), dtype)
    return feed


def _batches(ids: Array, padded: bool) -> Iterator[Batch]:
    """The first token alone, a text alone, both and half of that text together, and all `ids`.

    Where texts of one request come `padded`, their slots without a token are there.
    """
    middle = ids[:MIDDLE]
    yield [ids[:1]]
    yield [middle]
    unlike = [ids[:1], middle[: max(1, len(middle) // 2)], middle]
    if padded:
        unlike = [np.pad(row, (0, len(middle) - len(row)), constant_values=NO_TOKEN) for row in unlike]
    yield unlike
    yield [ids]


def _compare(family: str, found: Sequence[Mapping[str, Array]], least: float) -> None:
    """Raises BuildError unless two texts have, beside others, what they have alone."""
    first, middle, together, _ = found
    for name in RESULTS:
        if name not in together:
            continue
        for one, i in ((first, 0), (middle, 2)):
            alone, beside = one[name][0], together[name][i]
            if name == "values":
                alone, beside = _opened(one["indices"][0], alone), _opened(together["indices"][i], beside)
            if name == "token_embeddings":
                alone, beside = alone.ravel(), beside[: len(alone)].ravel()
            likeness = 1 - abs(_share(alone) - _share(beside)) if name == "logit" else _cosine(alone, beside)
            if likeness < least:
                raise BuildError(
                    f"{family} gives a text other {name} beside longer texts than alone: alike by {likeness:.4f}, "
                    f"and {least} is the least allowed"
                )


def _opened(indices: Array, values: Array) -> Array:
    """A sparse vector as one of all places that a vocabulary may have."""
    dense = np.zeros(1 << 20, np.float32)
    dense[indices[indices >= 0]] = values[indices >= 0]
    return dense


def _share(logit: Array) -> float:
    """Of 0..1."""
    return float(1 / (1 + np.exp(-logit[0])))


def _cosine(a: Array, b: Array) -> float:
    """1 for equal vectors, zeros included."""
    return 1.0 if (a == b).all() else float(a @ b / max(1e-12, float(np.linalg.norm(a) * np.linalg.norm(b))))


def _ids(repository: Path, tokenizer: ModelConfig, count: int) -> Array:
    """INT32 [count]: ids of a text, half of them of a pair's second one where the model tells the two apart."""
    path = repository / tokenizer.name / "1" / "tokenizer.json"
    ids = np.resize(np.array(Tokenizer.from_file(str(path)).encode(TEXT).ids or [0], np.int32), count)
    ids[count // 2 :] += int(tokenizer.parameters["segment_offset"].string_value or "0")
    return ids


def _graph(repository: Path, config: ModelConfig) -> Path:
    return repository / str(config.name) / "1" / "model.onnx"


def _onnxruntime_runs(path: Path) -> bool:
    """Whether there is an ONNX Runtime here and it knows the opset of a graph: those for Python 3.10 end at 23."""
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    major, minor = map(int, importlib.metadata.version("onnxruntime").split(".")[:2])
    opsets = onnx.load(path, load_external_data=False).opset_import
    return (major, minor) >= (1, 24) or all(opset.version < 24 for opset in opsets if opset.domain == "")


def _cause(error: Exception) -> str:
    """The end of the engine's message, in one line; before it come the places in its sources."""
    return " ".join(str(error).split())[-300:]


if __name__ == "__main__":
    sys.exit(main())
