"""Every family's graphs in every precision, fed as Triton's C++ backends feed them, on both CPU engines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import openvino
import pytest
from conftest import TINY, cosines, rows

from build import family
from build.checkpoint import Checkpoint, describe
from build.graphs.onnx_graph import DTYPES
from build.target import PRECISIONS, RUNTIMES, Target

Array = npt.NDArray[Any]

EMBEDDERS = ["bert-cls", "gemma3", "nomic-bert", "qwen3-embedding", "xlm-roberta"]
RERANKERS = ["bert-cross-encoder", "cross-encoder", "qwen3-reranker"]
COSINE = {"fp32": 0.99999, "fp16": 0.9999, "bf16": 0.999}
SCORE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}


Engine: TypeAlias = "OnnxRuntime | OpenVino"


class OnnxRuntime:
    """A graph on ONNX Runtime."""

    def __init__(self, path: Path) -> None:
        self._session = onnxruntime.InferenceSession(path)
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        return dict(zip(self._names, self._session.run(None, inputs), strict=True))


class OpenVino:
    """A graph on OpenVINO, which computes in FP32 whatever the graph says, with the graph's weights."""

    def __init__(self, path: Path) -> None:
        self._compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        return {name: np.array(value) for output, value in self._compiled(inputs).items() for name in output.names}


# ONNX Runtime has no bf16 arithmetic on a CPU.
RUNS = [*((OpenVino, precision) for precision in PRECISIONS), (OnnxRuntime, "fp32"), (OnnxRuntime, "fp16")]


def graphs(name: str, target: Target, folder: Path) -> dict[str, Path]:
    """The graphs of a tiny checkpoint's family, by the last word of their model's name."""
    entry = describe(TINY / name, name, None)
    paths = {}
    for model in family.models(entry, Checkpoint(TINY / name), target):
        family.write(model, folder / model.config.name)
        path = folder / model.config.name / "1" / "model.onnx"
        if path.exists():
            paths[model.config.name.rsplit("-", 1)[-1]] = path
    return paths


def token_ids(name: str) -> list[list[int]]:
    """What the reference's tokenizer gave, a pair's second text raised where its token type matters."""
    expected = np.load(TINY / name / "expected.npz")
    ids = rows(expected["token_ids"], expected["token_counts"])
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
    """What the runtime's backend makes of a batch: one call of the graph, or one for each request."""
    if not RUNTIMES[runtime].ragged:
        return [{"input_ids": request} for request in batch]
    lengths = np.array([len(row) for request in batch for row in request], np.int32)
    feed = {"input_ids": np.concatenate([request.reshape(-1) for request in batch]), "lengths": lengths}
    if RUNTIMES[runtime].needs_width:
        feed["widest"] = np.empty(lengths.max(), np.int32)
    return [feed]


def answers(runtime: str, encoder: Engine, head: Engine, batch: list[Array]) -> dict[str, Array]:
    """One batch through encoder and head, every output for all of its texts."""
    results = []
    for feed in feeds(runtime, batch):
        states = encoder(**feed)["last_hidden_state"]
        ids = feed["input_ids"]
        assert states.dtype == np.float32
        assert states.shape == (*ids.shape, 48)
        assert not states[ids < 0].any()
        results.append(head(last_hidden_state=states.reshape(-1) if ids.ndim == 1 else states, **feed))
    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


@pytest.mark.parametrize(("engine", "precision"), RUNS)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "tensorrt"])
@pytest.mark.parametrize("name", EMBEDDERS + RERANKERS)
def test_graphs_give_what_the_reference_gives(
    name: str, precision: str, runtime: str, engine: type[OnnxRuntime] | type[OpenVino], tmp_path: Path
) -> None:
    paths = graphs(name, Target(runtime, precision), tmp_path)
    encoder, head = engine(paths["encoder"]), engine(paths["pooling" if name in EMBEDDERS else "scoring"])
    expected = np.load(TINY / name / "expected.npz")
    for texts, batch in requests(token_ids(name)):
        answer = answers(runtime, encoder, head, batch)
        if name in EMBEDDERS:
            assert cosines(answer["embeddings"], expected["embeddings"][texts]).min() >= COSINE[precision]
        else:
            np.testing.assert_allclose(answer["score"][:, 0], expected["scores"][texts], atol=SCORE[precision])


def test_the_python_runtime_takes_the_graphs_of_onnxruntime(tmp_path: Path) -> None:
    python, cpp = (graphs("bert-cls", Target(name), tmp_path / name) for name in ("python", "onnxruntime"))
    assert [path.read_bytes() for path in python.values()] == [path.read_bytes() for path in cpp.values()]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", EMBEDDERS + RERANKERS)
def test_norms_and_softmax_are_fp32(name: str, precision: str, tmp_path: Path) -> None:
    """By the types that ONNX infers; and nothing of the arithmetic that is heavy is wider than asked for."""
    path = graphs(name, Target(precision=precision), tmp_path)["encoder"]
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), data_prop=True)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    found = {kind: {types[n.output[0]] for n in model.graph.node if n.op_type == kind} for kind in KINDS}
    own = onnx.helper.np_dtype_to_tensor_dtype(DTYPES[precision])
    assert found.pop("Gemm") == {own}
    assert found.pop("MatMul") == {own}
    assert set().union(*found.values()) == {onnx.TensorProto.FLOAT}


KINDS = ["Gemm", "MatMul", "Softmax", "LayerNormalization", "ReduceMean"]
