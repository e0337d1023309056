"""Every family's graphs in every precision, fed as Triton's C++ backends feed them, on both CPU engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import openvino
import pytest
from conftest import TINY, cosines, rows

from build import family
from build.checkpoint import Checkpoint, describe
from build.graphs.onnx_graph import PRECISIONS, OnnxGraph

Array = npt.NDArray[Any]

EMBEDDERS = ["bert-cls", "gemma3", "nomic-bert", "qwen3-embedding", "xlm-roberta"]
RERANKERS = ["bert-cross-encoder", "cross-encoder", "qwen3-reranker"]
COSINE = {"fp32": 0.99999, "fp16": 0.9999, "bf16": 0.999}
SCORE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}


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


def graphs(name: str, precision: str, folder: Path) -> dict[str, Path]:
    """The graphs of a tiny checkpoint's family, by the last word of their model's name."""
    entry = describe(TINY / name, name, None)
    paths = {}
    for model in family.models(entry, Checkpoint(TINY / name), precision):
        family.write(model, folder / model.config.name)
        path = folder / model.config.name / "1" / "model.onnx"
        if path.exists():
            paths[model.config.name.rsplit("-", 1)[-1]] = path
    return paths


def requests(name: str) -> list[tuple[list[int], Array, Array]]:
    """Batches of requests of several texts: (texts, input_ids, lengths), rows padded with -1 inside a request."""
    expected = np.load(TINY / name / "expected.npz")
    ids = rows(expected["token_ids"], expected["token_counts"])
    if "token_type_ids" in expected:
        kinds = rows(expected["token_type_ids"], expected["token_counts"])
        vocabulary = json.loads((TINY / name / "config.json").read_text())["vocab_size"]
        ids = [
            [i + vocabulary * kind for i, kind in zip(*pair, strict=True)] for pair in zip(ids, kinds, strict=True)
        ]
    batches = []
    for batch in np.array_split(np.random.default_rng(0).permutation(len(ids)), 3):
        flat: list[list[int]] = []
        for request in np.array_split(batch, 3):
            width = max(len(ids[i]) for i in request)
            flat += [ids[i] + [-1] * (width - len(ids[i])) for i in request]
        lengths = np.array([len(row) for row in flat], np.int32)
        batches.append((batch.tolist(), np.concatenate(flat).astype(np.int32), lengths))
    return batches


@pytest.mark.parametrize("engine", [OnnxRuntime, OpenVino])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", EMBEDDERS + RERANKERS)
def test_graphs_give_what_the_reference_gives(
    name: str, precision: str, engine: type[OnnxRuntime] | type[OpenVino], tmp_path: Path
) -> None:
    if precision == "bf16" and engine is OnnxRuntime:
        pytest.skip("ONNX Runtime has no bf16 arithmetic on a CPU")
    paths = graphs(name, precision, tmp_path)
    encoder, head = engine(paths["encoder"]), engine(paths["pooling" if name in EMBEDDERS else "scoring"])
    expected = np.load(TINY / name / "expected.npz")
    for items, input_ids, lengths in requests(name):
        states = encoder(input_ids=input_ids, lengths=lengths)["last_hidden_state"]
        assert states.dtype == np.float32
        assert states.shape == (len(input_ids), 48)
        assert not states[input_ids < 0].any()
        result = head(last_hidden_state=states.reshape(-1), input_ids=input_ids, lengths=lengths)
        if name in EMBEDDERS:
            assert cosines(result["embeddings"], expected["embeddings"][items]).min() >= COSINE[precision]
        else:
            np.testing.assert_allclose(result["score"][:, 0], expected["scores"][items], atol=SCORE[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", EMBEDDERS + RERANKERS)
def test_norms_and_softmax_are_fp32(name: str, precision: str, tmp_path: Path) -> None:
    """By the types that ONNX infers; and nothing of the arithmetic that is heavy is wider than asked for."""
    path = graphs(name, precision, tmp_path)["encoder"]
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), data_prop=True)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    found = {kind: {types[n.output[0]] for n in model.graph.node if n.op_type == kind} for kind in KINDS}
    own = onnx.helper.np_dtype_to_tensor_dtype(PRECISIONS[precision])
    assert found.pop("Gemm") == {own}
    assert found.pop("MatMul") == {own}
    assert set().union(*found.values()) == {onnx.TensorProto.FLOAT}


KINDS = ["Gemm", "MatMul", "Softmax", "LayerNormalization", "ReduceMean"]


def test_only_known_precisions() -> None:
    with pytest.raises(KeyError):
        OnnxGraph("graph", Path("none"), "fp8")
