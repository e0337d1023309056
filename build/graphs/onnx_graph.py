"""A thin writer of ONNX graphs: nodes are added in order, weights stream to a file beside the model."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from build.errors import BuildError
from build.target import Target

OPSET = 23
"""The first with Attention."""

PACKED = "packed"
"""The domain of operators on packed tokens, of which ONNX has none; `build/steps/torch_graph.py` defines them."""

ALIGNMENT = 64
"""Bytes between weights in the data file: one cache line, so that a mapped file is read in place."""

WRITE_VALUES = 1 << 22
"""Values of a weight that are converted and written at a time, so that a large one never exists twice."""

DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
}
"""Precision of a target -> the type of weights and arithmetic."""

Array: TypeAlias = npt.NDArray[np.generic]
Shape: TypeAlias = Sequence[int | str]


class OnnxGraph:
    """Writes `model.onnx` and, when it has large weights, `model.onnx.data` beside it.

    Values are plain strings, the names ONNX knows them by. Use it as a context manager: the model file is
    written on a clean exit and nothing is written after an error. Equal calls give equal bytes.

    `traits` says how the target's runtime hands batches over. The precision is in the graph, by type: weights and
    arithmetic are of `dtype`, but for what is summed over many values (norms, softmax), which is of FP32 between
    `widen` and `narrow`. Hidden states pass between graphs as `states`, a `TensorProto` data type.
    """

    def __init__(self, name: str, path: Path, target: Target) -> None:
        self.traits = target.traits
        self.dtype = DTYPES[target.precision]
        self.states = helper.np_dtype_to_tensor_dtype(DTYPES[target.states])
        self._name = name
        self._path = path
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._data: BinaryIO | None = None
        self._copies: set[str] = set()
        self._functions: list[onnx.FunctionProto] = []
        self.raise_opset(OPSET)

    def __enter__(self) -> OnnxGraph:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._data is not None:
            self._data.close()
        if kind is None:
            self._save()

    def input(self, name: str, dtype: int, shape: Shape) -> str:
        """Declares a graph input; `dtype` is a `TensorProto` data type, strings in `shape` are symbols."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, value: str, dtype: int, shape: Shape) -> None:
        """Declares `value` as the graph output `name`."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output and returns that output."""
        name = f"{kind}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def ops(self, kind: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """The same with `count` outputs."""
        name = f"{kind}_{len(self._nodes)}"
        outputs = [f"{name}_{i}" for i in range(count)]
        self._nodes.append(helper.make_node(kind, inputs, outputs, name=name, **attributes))
        return outputs

    def constant(self, value: object, dtype: npt.DTypeLike) -> str:
        """A small tensor kept inside the model file; equal constants are stored once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._initializers.append(numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def raise_opset(self, version: int) -> None:
        """Writes the graph in this opset, and in its IR version, so that older runtimes load it."""
        standard = helper.make_opsetid("", version)
        self._opsets = [standard, *([helper.make_opsetid(PACKED, 1)] if self.traits.packed_attention else [])]
        self._ir_version = helper.find_min_ir_version_for([standard])

    def widen(self, x: str) -> str:
        """`x` in FP32."""
        return x if self.dtype == np.float32 else self.op("Cast", x, to=TensorProto.FLOAT)

    def narrow(self, x: str) -> str:
        """`x`, which is FP32, in the precision of the graph."""
        if self.dtype == np.float32:
            return x
        return self.op("Cast", x, to=helper.np_dtype_to_tensor_dtype(self.dtype))

    def scalar(self, value: float) -> str:
        """A constant factor or summand in the precision of the graph."""
        return self.constant(value, self.dtype)

    def wide_weight(self, name: str, array: Array) -> str:
        """A checkpoint tensor that works on FP32 values, as those of norms do."""
        return self._weight(name, array, np.dtype(np.float32))

    def weight(self, name: str, array: Array) -> str:
        """A checkpoint tensor in the precision of the graph; BuildError where that has no numbers as large."""
        return self._weight(name, array, self.dtype)

    def own_weight(self, name: str, array: Array) -> str:
        """A tensor of another graph in its own type, which that graph's nodes ask for."""
        return self._weight(name, array, array.dtype)

    def _weight(self, name: str, array: Array, dtype: np.dtype[Any]) -> str:
        # Written to the data file now, so that the caller may let go of it.
        if self._data is None:
            self._data = self._path.with_name(self._path.name + ".data").open("wb")
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        offset = self._data.tell()
        values = array.reshape(-1)
        for start in range(0, len(values), WRITE_VALUES):
            part = values[start : start + WRITE_VALUES]
            with np.errstate(over="ignore"):
                written = part.astype(dtype, copy=False)
            if dtype != array.dtype and not np.isfinite(written).all():
                raise BuildError(
                    f"{name} has values of up to {np.abs(part).max():.3g}, which {dtype} cannot hold: build it "
                    "with --precision bf16 or fp32"
                )
            self._data.write(written.tobytes())
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        length = array.size * dtype.itemsize
        location = {"location": Path(self._data.name).name, "offset": offset, "length": length}
        for key, item in location.items():
            tensor.external_data.add(key=key, value=str(item))
        self._initializers.append(tensor)
        return name

    def linear(self, x: str, weight: str, *bias: str) -> str:
        """x W^T + b on packed rows: `x` [T, in], `weight` [out, in] as checkpoints store it, `bias` [out]."""
        return self.op("Gemm", x, weight, *bias, transB=1)

    def graft(
        self, model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], weights: Iterable[TensorProto]
    ) -> None:
        """Adds nodes and weights of another `model` as they are, names included, and what `model` runs them with.

        Its opsets become this graph's, so everything added here must mean the same in them.
        """
        self._nodes += nodes
        self._initializers += weights
        self._functions += model.functions
        self._opsets = list(model.opset_import)
        self._ir_version = max(self._ir_version, model.ir_version)

    def copy(self, file: Path, name: str) -> str:
        """Copies a file of weights beside the model, unread; returns its name there, `name` if that is free."""
        while name in (self._path.name, f"{self._path.name}.data", "model.py", *self._copies):
            name = f"adopted-{name}"
        self._copies.add(name)
        target = self._path.with_name(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        return name

    def _save(self) -> None:
        graph = helper.make_graph(self._nodes, self._name, self._inputs, self._outputs, self._initializers)
        model = helper.make_model(
            graph, opset_imports=self._opsets, ir_version=self._ir_version, functions=self._functions
        )
        self._path.write_bytes(model.SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(str(self._path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            cause = " ".join(str(error).split())[:300]
            raise BuildError(
                f"{self._name} is not valid ONNX: weights or config.json do not fit: {cause}"
            ) from None
