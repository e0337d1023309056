"""The engines that graphs are checked in, on this machine's CPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

Array: TypeAlias = npt.NDArray[Any]

LONGEST = 2048
"""Tokens of a text at most: the time of attention grows with their square."""

NO_TOKEN = -1


class Engine(Protocol):
    """Runs one graph."""

    title: str
    package: str
    """Of Python."""

    def __init__(self, path: Path) -> None: ...

    def run(self, feed: dict[str, Array]) -> dict[str, Array]:
        """Every output by name; raises any Exception."""
        ...


class OpenVino:
    """OpenVINO on the CPU, as `steps/onnx_runner.py` runs a graph and the head behind it, but all in FP32.

    Past the end of a table it reads zeros without a word, so indices into tables are outputs too and are compared.
    """

    title = "OpenVINO"
    package = "openvino"

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
    package = "onnxruntime"

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
    package = "torch"

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
        return {name: stacked([row[name] for row in found]) for name in found[0]}


def stacked(rows: Sequence[Array]) -> Array:
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
"""Runtime -> its engine on a CPU."""


def lacking(engine: type[Engine], path: Path) -> str:
    """Why this machine cannot run the graph at `path` in the engine, or ""."""
    if importlib.util.find_spec(engine.package) is None:
        return f"{engine.package} is not installed"
    if engine is OnnxRuntime:  # those for Python 3.10 end at opset 23
        major, minor = map(int, importlib.metadata.version("onnxruntime").split(".")[:2])
        opsets = onnx.load(path, load_external_data=False).opset_import
        if (major, minor) < (1, 24) and any(one.version > 23 for one in opsets if one.domain == ""):
            return f"onnxruntime {major}.{minor} does not know its opset"
    return ""
