"""Every family's graphs in every precision, fed as Triton's C++ backends feed them, on both CPU engines."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import TINY, cosines
from engines import Array, Engine, OnnxRuntime, OpenVino, feeds, requests, states_fed, steps, token_ids
from safetensors.numpy import load_file, save_file
from tiny import EMBEDDERS, RERANKERS, STATIC, tiny_entry

from build.graphs.architectures import ARCHITECTURES
from build.graphs.decoder import Decoder
from build.graphs.onnx_graph import DTYPES
from build.rendering.model_folder import write_model
from build.rendering.models import models_of
from build.runtimes import RUNTIMES
from build.sources.checkpoint import Checkpoint
from build.sources.settings import Settings
from build.target import PRECISIONS, Target

COSINE = {"fp32": 0.99999, "fp16": 0.9999, "bf16": 0.999}
SCORE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}


@pytest.mark.parametrize("name", EMBEDDERS + RERANKERS)
def test_a_fixture_is_well_conditioned(name: str) -> None:
    """In bf16 the reference itself uses up no more than half of what a graph in bf16 is allowed."""
    bf16 = json.loads((TINY / name / "expected.json").read_text())["bf16"]
    error, allowed = (1 - bf16, 1 - COSINE["bf16"]) if name in EMBEDDERS else (bf16, SCORE["bf16"])
    assert 0 < error <= allowed / 2


needs_opset_24 = pytest.mark.skipif(sys.version_info < (3, 11), reason="ONNX Runtime 1.23, the last for 3.10")
# OpenVINO reads every graph but for packed tokens; ONNX Runtime its own, without bf16 arithmetic on a CPU.
RUNS = [
    (OpenVino, runtime, precision)
    for runtime, traits in RUNTIMES.items()
    if "embed" in traits.tasks and not traits.packed_attention
    for precision in PRECISIONS
]
RUNS += [
    pytest.param(OnnxRuntime, "onnxruntime", precision, marks=needs_opset_24) for precision in ("fp32", "fp16")
]


EXACT = [("f32", "fp32"), ("f32", "fp16"), ("f32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16")]
"""What OpenVINO computes in, and the precision of the graph."""


def graphs(name: str, target: Target, folder: Path, checkpoint: Path | None = None) -> tuple[Path, Path]:
    """Encoder and head of a tiny checkpoint's family, or of a changed copy."""
    for model in models_of(tiny_entry(name), Checkpoint(checkpoint or TINY / name), target):
        write_model(model, folder / model.config.name)
    return steps(folder, name)


def answers(target: Target, encoder: Engine, head: Engine, batch: list[Array]) -> dict[str, Array]:
    """One batch through encoder and head, every output for all of its texts."""
    results, runtime = [], target.runtime
    for feed in feeds(runtime, batch):
        states = encoder(**feed)["last_hidden_state"]
        ids = feed["input_ids"]
        assert states.dtype == DTYPES[target.states]
        assert states.shape[:-1] == ids.shape
        assert not states[ids < 0].any()
        results.append(head(last_hidden_state=states_fed(runtime, states), **feed))
    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


@pytest.mark.parametrize(("engine", "runtime", "precision"), RUNS)
@pytest.mark.parametrize("name", EMBEDDERS + RERANKERS)
def test_graphs_give_what_the_reference_gives(
    name: str, precision: str, runtime: str, engine: type[OnnxRuntime] | type[OpenVino], tmp_path: Path
) -> None:
    encoder, head = map(engine, graphs(name, Target(runtime, precision), tmp_path))
    expected = np.load(TINY / name / "expected.npz")
    for texts, batch in requests(token_ids(name)):
        answer = answers(Target(runtime, precision), encoder, head, batch)
        if name in EMBEDDERS:
            assert cosines(answer["embeddings"], expected["embeddings"][texts]).min() >= COSINE[precision]
        else:
            np.testing.assert_allclose(answer["score"][:, 0], expected["scores"][texts], atol=SCORE[precision])


SAME = [(partial(OpenVino, precision=hint), "openvino", precision) for hint, precision in EXACT]
SAME += [
    pytest.param(OnnxRuntime, "onnxruntime", precision, marks=needs_opset_24) for precision in ("fp32", "fp16")
]


@pytest.mark.parametrize(("engine", "runtime", "precision"), SAME)
@pytest.mark.parametrize("name", EMBEDDERS + RERANKERS)
def test_a_text_has_the_same_bits_alone_and_in_any_batch(
    name: str, engine: Callable[[Path], Engine], runtime: str, precision: str, tmp_path: Path
) -> None:
    first, second = graphs(name, Target(runtime, precision), tmp_path)
    encoder = engine(first)
    head = type(encoder)(second)  # which always computes in FP32
    rows = [np.array([ids], np.int32) for ids in token_ids(name)]
    alone = [answers(Target(runtime, precision), encoder, head, [row]) for row in rows]
    for texts, batch in requests([row[0].tolist() for row in rows]):
        for output, values in answers(Target(runtime, precision), encoder, head, batch).items():
            np.testing.assert_array_equal(values, np.concatenate([alone[i][output] for i in texts]))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", sorted({*EMBEDDERS, *RERANKERS} - {*STATIC}))
def test_norms_and_softmax_are_fp32(name: str, precision: str, tmp_path: Path) -> None:
    """By the types that ONNX infers; and nothing of the arithmetic that is heavy is wider than asked for."""
    path, _ = graphs(name, Target(precision=precision), tmp_path)
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), data_prop=True)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    found = {kind: {types[n.output[0]] for n in model.graph.node if n.op_type == kind} for kind in KINDS}
    own = onnx.helper.np_dtype_to_tensor_dtype(DTYPES[precision])
    # Of T5 the layer that makes the largest numbers is FP32 where those are not in the range.
    kept = {onnx.TensorProto.FLOAT} if name.startswith("t5") and precision == "fp16" else set()
    assert found.pop("Gemm") == {own} | kept
    assert found.pop("Attention") == {own}
    assert set().union(*found.values()) == {onnx.TensorProto.FLOAT}
    attributes = [
        {a.name: a.i for a in node.attribute} for node in model.graph.node if node.op_type == "Attention"
    ]
    assert {found["softmax_precision"] for found in attributes} == {onnx.TensorProto.FLOAT}
    products = 2 * len(attributes) if name.startswith("deberta") else 0  # of content with distances
    kinds = [node.op_type for node in model.graph.node]
    routers = 1 if name == "nomic-bert-moe" else 0
    assert (kinds.count("MatMul"), kinds.count("Softmax")) == (products, routers)


@pytest.mark.parametrize("name", ["t5", "t5-gated"])
def test_states_of_t5_may_grow_past_fp16(name: str, tmp_path: Path) -> None:
    """All that is added to a state times 2^13: each norm takes it out again, so the vectors stay as they are."""
    folder = shutil.copytree(TINY / name, tmp_path / name)
    tensors = load_file(folder / "model.safetensors")
    for key in tensors:
        if key.endswith(("shared.weight", "SelfAttention.o.weight", "DenseReluDense.wo.weight")):
            tensors[key] = tensors[key] * np.float32(2**13)
    save_file(tensors, folder / "model.safetensors")
    encoder, head = map(OnnxRuntime, graphs(name, Target(precision="fp16"), tmp_path / "graphs", folder))
    expected = np.load(TINY / name / "expected.npz")["embeddings"]
    for texts, batch in requests(token_ids(name)):
        answer = answers(Target(precision="fp16"), encoder, head, batch)
        assert cosines(answer["embeddings"], expected[texts]).min() >= COSINE["fp16"]


KINDS = ["Gemm", "Attention", "LayerNormalization", "RMSNormalization", "Softmax"]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_as_many_heads_of_keys_as_of_queries(model_type: str) -> None:
    """What null stands for in transformers, whose default for a missing key is another number."""
    said = {"num_key_value_heads": None, "num_attention_heads": 4, "hidden_size": 32}
    decoder = ARCHITECTURES[model_type].read(Settings(Path("config.json"), said))
    assert isinstance(decoder, Decoder)
    assert decoder.key_value_heads == 4
