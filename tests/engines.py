"""Graphs outside of Triton: both CPU engines, fed as the backends of each runtime feed them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime
import openvino
from conftest import TINY, rows
from tokenizers import Tokenizer

from build.runtimes import RUNTIMES

Array = npt.NDArray[Any]
Engine: TypeAlias = "OnnxRuntime | OpenVino"


class OnnxRuntime:
    """A graph on ONNX Runtime."""

    def __init__(self, path: Path) -> None:
        self._session = onnxruntime.InferenceSession(path)
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        return dict(zip(self._names, self._session.run(None, inputs), strict=True))


class OpenVino:
    """A graph on OpenVINO, which computes in FP32 whatever the graph says, with the graph's weights.

    Asked for bf16 it computes in that, where the CPU can.
    """

    def __init__(self, path: Path, precision: str = "f32") -> None:
        self._compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": precision})

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        request = self._compiled.create_infer_request()
        for name, array in inputs.items():
            request.set_tensor(name, _tensor(np.ascontiguousarray(array)))
        request.infer()
        found = {name: request.get_tensor(name) for output in self._compiled.outputs for name in output.names}
        return {name: _array(tensor) for name, tensor in found.items()}


def _tensor(array: Array) -> openvino.Tensor:
    if array.dtype == ml_dtypes.bfloat16:  # which its bindings know by name only
        return openvino.Tensor(array.view(np.uint16), array.shape, openvino.Type.bf16)
    return openvino.Tensor(array)


def _array(tensor: openvino.Tensor) -> Array:
    is_bf16 = tensor.element_type == openvino.Type.bf16
    return np.array(tensor.data).view(ml_dtypes.bfloat16) if is_bf16 else np.array(tensor.data)


def token_ids(name: str) -> list[list[int]]:
    """What the reference's tokenizer gave, a pair's second text raised where its token type matters."""
    expected = np.load(TINY / name / "expected.npz")
    ids = rows(expected["token_ids"], expected["token_counts"])
    if not all(ids):  # a text without tokens has an id of its own
        words = Tokenizer.from_file(str(TINY / name / "tokenizer.json"))
        ids = [row or [words.get_vocab_size()] for row in ids]
    if "token_type_ids" not in expected:
        return ids
    kinds = rows(expected["token_type_ids"], expected["token_counts"])
    size = json.loads((TINY / name / "config.json").read_text())["vocab_size"]
    return [[i + size * kind for i, kind in zip(*pair, strict=True)] for pair in zip(ids, kinds, strict=True)]


def requests(ids: list[list[int]]) -> Iterator[tuple[list[int], list[Array]]]:
    """Batches of requests of several texts: (texts, an array of rows for each request, padded with -1)."""
    for batch in np.array_split(np.random.default_rng(0).permutation(len(ids)), 3):
        arrays = []
        for request in np.array_split(batch, 3):
            width = max(len(ids[i]) for i in request)
            arrays.append(np.array([ids[i] + [-1] * (width - len(ids[i])) for i in request], np.int32))
        yield batch.tolist(), arrays


def feeds(runtime: str, batch: list[Array]) -> list[dict[str, Array]]:
    """What the runtime's backend makes of a batch: calls of the graph."""
    lengths = np.array([len(row) for request in batch for row in request], np.int32)
    feed = {"input_ids": np.concatenate([request.reshape(-1) for request in batch]), "lengths": lengths}
    if RUNTIMES[runtime].needs_width:
        feed["widest"] = np.empty(lengths.max(), np.int32)
    return [feed]


def states_fed(runtime: str, states: Array) -> Array:
    """Hidden states as a head gets them: flat where Triton merges requests end to end."""
    traits = RUNTIMES[runtime]
    return states if traits.joins_head else states.reshape(-1)


def steps(repository: Path, family: str) -> tuple[Path, Path]:
    """The graphs of a family's encoder and of the head behind it, in the same step or in one of its own."""
    encoder = repository / f"{family}-encoder" / "1" / "model.onnx"
    names = ("pooling", "scoring", "vectors")
    heads = [encoder.with_name("head.onnx"), *(repository / f"{family}-{n}" / "1" / "model.onnx" for n in names)]
    return encoder, next(path for path in heads if path.exists())
