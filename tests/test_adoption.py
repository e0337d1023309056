"""Graphs that somebody else exported go through the builder and a real Triton like our own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import REFERENCE, ROOT, TINY, Precision, Stack, cosines
from engines import Array, OnnxRuntime, OpenVino, feeds, requests, states_fed, steps, token_ids
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from test_families import PASSAGES, QUERIES, TEXTS, expected

from build import make
from build.sources.files import sha256

EXPORTED = REFERENCE / "onnx"
TOKENS = ["bert-cls", "qwen3-embedding", "xlm-roberta"]
POOLED = ["nomic-bert"]
EMBEDDERS = TOKENS + POOLED
RERANKER = "bert-cross-encoder"


def checkpoint(name: str, folder: Path, weights: bool = False) -> Path:
    """A checkpoint as a folder with an exported graph in place of its weights, or beside them."""
    target = folder / name
    ignored = shutil.ignore_patterns("expected.*", *([] if weights else ["*.safetensors"]))
    shutil.copytree(TINY / name, target, ignore=ignored)
    shutil.copytree(EXPORTED / name, target, dirs_exist_ok=True)
    return target


def graph_of(folder: Path) -> Path:
    (path,) = folder.rglob("model.onnx")
    return path


def build(folder: Path, repository: Path, *options: str) -> None:
    assert make.main([str(folder), "--repository", str(repository), *options]) == 0


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def adopted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default families and an adopted one from every exported graph."""
    folder = tmp_path_factory.mktemp("adoption")
    repository = folder / "repository"
    shutil.copytree(ROOT / "model_repository", repository)
    for name in [*EMBEDDERS, RERANKER]:
        build(checkpoint(name, folder), repository)
    build(folder / "nomic-bert", repository, "--name", "nomic-half", "--dimensions", "24")
    quantised()(folder / "bert-cls")
    build(folder / "bert-cls", repository, "--name", "bert-int8")
    return repository


@pytest.fixture(scope="session", params=["fp32", "bf16"])
def served(
    request: pytest.FixtureRequest, adopted: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Precision]:
    """All of them in one server, in fp32 and then in bf16."""
    names = ["minilm", *EMBEDDERS, "nomic-half", "bert-int8", RERANKER]
    folder = tmp_path_factory.mktemp(f"adoption-{request.param}")
    options = ["--repository", str(adopted), "--models", *names]
    stack = Stack(folder, options, {"ENCODER_PRECISION": request.param}).start()
    yield Precision(stack, {"fp32": 0.99999, "bf16": 0.999}[request.param])
    assert stack.stop() == 0


def minimum(served: Precision, name: str) -> float:
    """The weights of one are FP16."""
    return min(served.minimum_cosine, 0.999) if name == "xlm-roberta" else served.minimum_cosine


@pytest.mark.parametrize("name", EMBEDDERS)
def test_vectors_equal_the_reference(served: Precision, name: str) -> None:
    """Forty texts of many lengths in one request, so that its rows are padded with -1."""
    answer = served.stack.infer(name, text=TEXTS)
    reference = expected(name)
    assert cosines(answer["embeddings"], reference["embeddings"]).min() >= minimum(served, name)
    np.testing.assert_allclose(np.linalg.norm(answer["embeddings"], axis=1), 1, atol=1e-3)
    assert (answer["token_count"][:, 0] == reference["token_counts"]).all()
    assert (answer["truncated"][:, 0] == reference["truncated"]).all()


@pytest.mark.parametrize("name", EMBEDDERS)
def test_queries_get_their_prompt(served: Precision, name: str) -> None:
    answer = served.stack.infer(name, text=TEXTS, prompt_name=["query"] * len(TEXTS))
    assert cosines(answer["embeddings"], expected(name)["query_embeddings"]).min() >= minimum(served, name)


@pytest.mark.parametrize("name", EMBEDDERS)
def test_a_text_alone_equals_itself_in_a_batch(served: Precision, name: str) -> None:
    together = served.stack.embed(TEXTS, name)
    alone = np.concatenate([served.stack.embed([text], name) for text in TEXTS])
    assert cosines(alone, together).min() >= 0.9999


def test_pooled_vectors_are_cut_and_of_unit_length_again(served: Precision) -> None:
    whole, half = (served.stack.embed(TEXTS, name) for name in ("nomic-bert", "nomic-half"))
    assert half.shape == (len(TEXTS), 24)
    assert cosines(half, whole[:, :24]).min() >= 0.999999
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-5)


def test_int8_vectors_are_close_to_the_reference(served: Precision) -> None:
    """The same model in fp32, whose weights were rounded by onnxruntime's own tool."""
    assert cosines(served.stack.embed(TEXTS, "bert-int8"), expected("bert-cls")["embeddings"]).min() >= 0.995


def test_scores_equal_the_reference(served: Precision) -> None:
    """The second text's segment reaches token_type_ids."""
    answer = served.stack.infer(RERANKER, query=QUERIES, passage=PASSAGES)
    reference = expected(RERANKER)
    tolerance = {0.99999: 1e-4, 0.999: 5e-2}[served.minimum_cosine]
    np.testing.assert_allclose(answer["score"][:, 0], reference["scores"], atol=tolerance)
    assert (answer["token_count"][:, 0] == reference["token_counts"]).all()
    alone = [
        served.stack.infer(RERANKER, query=[query], passage=[passage])["score"].item()
        for query, passage in zip(QUERIES[:5], PASSAGES[:5], strict=True)
    ]
    np.testing.assert_allclose(answer["score"][:5, 0], alone, atol=tolerance)


@pytest.mark.parametrize("engine", [OnnxRuntime, OpenVino])
@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("name", [*EMBEDDERS, RERANKER])
def test_graphs_run_as_the_cpp_backends_feed_them(
    name: str, runtime: str, engine: type[OnnxRuntime] | type[OpenVino], tmp_path: Path
) -> None:
    repository, reference = tmp_path / "repository", expected(name)
    build(checkpoint(name, tmp_path), repository, "--runtime", runtime)
    for texts, batch in requests(token_ids(name)):
        found = [answer(repository, name, runtime, engine, feed) for feed in feeds(runtime, batch)]
        if name == RERANKER:
            scores = np.concatenate([one["score"] for one in found])[:, 0]
            np.testing.assert_allclose(scores, reference["scores"][texts], atol=1e-4)
        else:
            vectors = np.concatenate([one["embeddings"] for one in found])
            least = 0.999 if name == "xlm-roberta" else 0.99999
            assert cosines(vectors, reference["embeddings"][texts]).min() >= least


def answer(
    repository: Path, name: str, runtime: str, engine: type[OnnxRuntime] | type[OpenVino], feed: dict[str, Array]
) -> dict[str, Array]:
    """One call of the encoder, and of the head where it does not pool or score by itself."""
    encoder = repository / f"{name}-encoder" / "1" / "model.onnx"
    found = engine(encoder)(**feed)
    if "last_hidden_state" not in found:
        return found
    states = found["last_hidden_state"]
    assert states.shape == (*feed["input_ids"].shape, 48)
    assert not states[feed["input_ids"] < 0].any()
    _, head = steps(repository, name)
    return engine(head)(last_hidden_state=states_fed(runtime, states), **feed)


def all_inside(folder: Path) -> None:
    """FP16 weights in the model file, as in `model_fp16.onnx`."""
    model = onnx.load(graph_of(folder))
    onnx.save(model, graph_of(folder))


def position_table(folder: Path) -> None:
    shutil.copy(EXPORTED / "bert-cls-buffers" / "model.onnx", graph_of(folder))


def quantised(**options: Any) -> Callable[[Path], None]:
    """INT8 weights, and values rounded to INT8 by the largest of a batch, as optimum's `quantize` leaves them."""

    def change(folder: Path) -> None:
        whole = graph_of(folder).replace(folder / "whole.onnx")
        quantize_dynamic(whole, folder / "model.onnx", **options)
        whole.unlink()

    return change


@pytest.mark.parametrize("engine", [OnnxRuntime, OpenVino])
@pytest.mark.parametrize(
    ("name", "change", "dtype", "least"),
    [
        ("xlm-roberta", all_inside, TensorProto.FLOAT16, 0.999),
        ("bert-cls", position_table, TensorProto.INT64, 0.99999),
        ("bert-cls", quantised(), TensorProto.INT8, 0.995),
        ("bert-cls", quantised(weight_type=QuantType.QUInt8), TensorProto.UINT8, 0.995),
        ("nomic-bert", quantised(per_channel=True, reduce_range=True), TensorProto.INT8, 0.99),
        ("qwen3-embedding", quantised(), TensorProto.INT8, 0.98),
    ],
)
def test_weights_keep_their_types(
    name: str,
    change: Callable[[Path], None],
    dtype: int,
    least: float,
    engine: type[OnnxRuntime] | type[OpenVino],
    tmp_path: Path,
) -> None:
    """Large ones of the model file too, which are moved out of it."""
    folder = checkpoint(name, tmp_path)
    change(folder)
    build(folder, tmp_path / "repository")
    path = tmp_path / "repository" / f"{name}-encoder" / "1" / "model.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    moved = {tensor.data_type for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL}
    assert dtype in moved
    for texts, batch in requests(token_ids(name)):
        (feed,) = feeds("openvino", batch)
        vectors = answer(tmp_path / "repository", name, "openvino", engine, feed)["embeddings"]
        assert cosines(vectors, expected(name)["embeddings"][texts]).min() >= least


def test_a_dynamically_quantised_graph_is_named_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its values are rounded by the largest of a batch: a text has not the same bits in every batch."""
    folder = checkpoint("bert-cls", tmp_path)
    build(folder, tmp_path / "repository")
    assert "quantised dynamically" not in capsys.readouterr().out
    assert "quantisation" not in record(tmp_path / "repository", "bert-cls")["facts"]
    quantised()(folder)
    build(folder, tmp_path / "repository")
    assert "bert-cls: its graph is quantised dynamically" in capsys.readouterr().out
    assert record(tmp_path / "repository", "bert-cls")["facts"]["quantisation"] == "dynamic"
    assert record(tmp_path / "repository", "bert-cls")["tolerance"]["fp32"] == 0.97


def test_what_a_graph_computes_in_is_told(adopted: Path) -> None:
    """And `build.verify` allows no less than that."""
    half, whole = (record(adopted, name) for name in ("xlm-roberta", "bert-cls"))
    assert (half["facts"]["onnx"], half["facts"]["precision"]) == ("onnx/model.onnx", "fp16")
    assert (whole["facts"]["onnx"], whole["facts"]["precision"]) == ("model.onnx", "fp32")
    assert (half["tolerance"]["fp32"], whole["tolerance"]["fp32"]) == (0.999, 0.9999)


def record(repository: Path, name: str) -> Any:
    return json.loads((repository / name / "build.json").read_text())


@pytest.mark.parametrize("engine", [OnnxRuntime, OpenVino])
def test_rows_end_at_the_last_position(
    tmp_path: Path, adopted: Path, engine: type[OnnxRuntime] | type[OpenVino]
) -> None:
    """Rows are rounded up to 16 columns, but a model with 56 positions has no more to give."""
    folder = checkpoint("bert-cls", tmp_path)
    edit_json(folder / "config.json", max_position_embeddings=56)
    edit_json(folder / "tokenizer_config.json", model_max_length=56)
    edit_onnx(folder, shorten_positions)
    build(folder, tmp_path / "repository")
    for _, batch in requests([ids[:56] for ids in token_ids("bert-cls")]):
        (feed,) = feeds("openvino", batch)
        short, whole = (
            answer(repository, "bert-cls", "openvino", engine, feed)["embeddings"]
            for repository in (tmp_path / "repository", adopted)
        )
        assert cosines(short, whole).min() >= 0.999999


def shorten_positions(model: onnx.ModelProto) -> None:
    (table,) = (t for t in model.graph.initializer if "position_embeddings" in t.name)
    table.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(table)[:56], table.name))


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_onnx(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    path = graph_of(folder)
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def test_the_old_ends_and_what_only_they_needed_are_gone(adopted: Path) -> None:
    def graph(name: str) -> onnx.GraphProto:
        return onnx.load(adopted / f"{name}-encoder" / "1" / "model.onnx", load_external_data=False).graph

    for name in [*EMBEDDERS, RERANKER]:
        assert [value.name for value in graph(name).input] == ["input_ids", "lengths"]
    assert [value.name for value in graph("qwen3-embedding").output] == ["last_hidden_state"]
    pooler = [node for node in graph("bert-cls").node if node.op_type == "Tanh"]
    assert not pooler


def test_files_of_weights_are_copied_as_they_are(adopted: Path) -> None:
    """One that is named as ours gets another name."""
    exported, built = EXPORTED / "xlm-roberta" / "onnx", adopted / "xlm-roberta-encoder" / "1"
    for name in ("model.onnx_data", "embeddings.weight"):
        assert (built / name).read_bytes() == (exported / name).read_bytes()
    renamed = adopted / f"{RERANKER}-encoder" / "1" / "adopted-model.onnx.data"
    assert renamed.read_bytes() == (EXPORTED / RERANKER / "model.onnx.data").read_bytes()


@pytest.mark.parametrize("name", [*EMBEDDERS, RERANKER])
def test_builds_are_byte_identical(
    tmp_path: Path, adopted: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(name, tmp_path)
    build(folder, tmp_path / "repository")
    for path, digest in files(tmp_path / "repository").items():
        assert sha256(adopted / path) == digest
    build(folder, tmp_path / "repository")
    assert "up to date" in capsys.readouterr().out
    graph_of(folder).write_bytes(graph_of(folder).read_bytes() + b"\x2a\x00")
    build(folder, tmp_path / "repository")
    assert "built into" in capsys.readouterr().out


def test_weights_of_a_known_architecture_come_first(tmp_path: Path) -> None:
    build(checkpoint("bert-cls", tmp_path, weights=True), tmp_path / "both")
    build(TINY / "bert-cls", tmp_path / "weights")
    encoder = "bert-cls-encoder/1/model.onnx"
    assert (tmp_path / "both" / encoder).read_bytes() == (tmp_path / "weights" / encoder).read_bytes()


def test_an_unknown_architecture_is_adopted(tmp_path: Path, adopted: Path) -> None:
    folder = checkpoint("bert-cls", tmp_path, weights=True)
    edit_json(folder / "config.json", model_type="other")
    build(folder, tmp_path / "repository")
    encoder = "bert-cls-encoder/1/model.onnx"
    assert (tmp_path / "repository" / encoder).read_bytes() == (adopted / encoder).read_bytes()


def test_an_optimised_graph_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenVINO takes this one, and scores wrong by up to 0.3."""
    folder = checkpoint(RERANKER, tmp_path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(graph_of(folder), options)
    (folder / "optimised.onnx").replace(graph_of(folder))
    assert make.main([str(folder), "--repository", str(tmp_path / "repository")]) == 1
    message = capsys.readouterr().err
    assert "com.microsoft.FusedMatMul" in message
    assert "before it was optimised" in message


def test_a_pooled_output_of_unknown_width_takes_dimensions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint("nomic-bert", tmp_path)
    (folder / "modules.json").unlink()
    edit_onnx(folder, lambda model: set_dim(model.graph.output[0], 1, "wide"))
    assert make.main([str(folder), "--repository", str(tmp_path / "repository")]) == 1
    assert "does not declare how wide sentence_embedding is: say it with --dimensions" in capsys.readouterr().err
    build(folder, tmp_path / "repository", "--dimensions", "48")
    for texts, batch in requests(token_ids("nomic-bert")):
        (feed,) = feeds("openvino", batch)
        found = answer(tmp_path / "repository", "nomic-bert", "openvino", OnnxRuntime, feed)["embeddings"]
        assert cosines(found, expected("nomic-bert")["embeddings"][texts]).min() >= 0.99999


def set_dim(value: onnx.ValueInfoProto, axis: int, dim: str | int) -> None:
    shape = value.type.tensor_type.shape.dim[axis]
    shape.Clear()
    if isinstance(dim, int):
        shape.dim_value = dim
    else:
        shape.dim_param = dim


def odd_type(value: onnx.ValueInfoProto) -> None:
    value.type.tensor_type.elem_type = 999


def onnx_edit(change: Callable[[onnx.ModelProto], None]) -> Callable[[Path], None]:
    return lambda folder: edit_onnx(folder, change)


def add_input(name: str, dtype: int, shape: list[str | int]) -> Callable[[Path], None]:
    return onnx_edit(lambda model: model.graph.input.append(helper.make_tensor_value_info(name, dtype, shape)))


def set_opset(version: int) -> Callable[[Path], None]:
    return onnx_edit(lambda model: setattr(model.opset_import[0], "version", version))


def rename_outputs(model: onnx.ModelProto) -> None:
    for value in model.graph.output:
        model.graph.node.append(helper.make_node("Identity", [value.name], [f"my_{value.name}"]))
        value.name = f"my_{value.name}"


def foreign_operator(model: onnx.ModelProto) -> None:
    model.graph.node[-1].domain, model.graph.node[-1].op_type = "com.acme", "Odd"
    model.opset_import.append(helper.make_opsetid("com.acme", 1))


def leave_the_folder(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../secret"


def shorten(name: str, to: int) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        (path,) = folder.rglob(name)
        path.write_bytes(path.read_bytes()[:to])

    return cut


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.rglob(name)).unlink()


def write(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (graph_of(folder).write_bytes(content), None)[1]


def no_operator(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type = "None"


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("bert-cls", add_input("pixel_values", 1, [1, 3]), "has the input pixel_values; only input_ids,"),
        ("bert-cls", onnx_edit(lambda m: m.graph.input.pop(1) and None), "has no input attention_mask"),
        (
            "bert-cls",
            add_input("position_ids", TensorProto.FLOAT, ["b", "s"]),
            "declares position_ids FLOAT [b, s]",
        ),
        ("bert-cls", onnx_edit(lambda m: odd_type(m.graph.input[0])), "declares input_ids 999 [batch_size, "),
        (
            "bert-cls",
            add_input("past_key_values.0.key", 1, ["b", "heads", "past", 16]),
            "declares past_key_values.0.key FLOAT [b, heads, past, 16]",
        ),
        ("bert-cls", set_opset(9), "is of opset 9; opsets 11 to 23 can be adopted: export the model again"),
        ("bert-cls", set_opset(99), "is of opset 99; opsets 11 to 23"),
        ("bert-cls", onnx_edit(rename_outputs), "gives my_last_hidden_state, my_pooler_output; of an embedding"),
        (
            "bert-cls",
            onnx_edit(lambda m: set_dim(m.graph.output[0], 2, 64)),
            "of 64 values, but config.json says 48",
        ),
        (
            "qwen3-embedding",
            onnx_edit(foreign_operator),
            "has the operators com.acme.Odd, which are not ONNX's own",
        ),
        ("qwen3-embedding", onnx_edit(no_operator), "is not valid ONNX"),
        ("bert-cross-encoder", onnx_edit(rename_outputs), "gives my_logits; of a reranker's graph logits"),
        ("bert-cross-encoder", onnx_edit(lambda m: set_dim(m.graph.output[0], 1, 3)), "gives logits of 3 labels"),
        ("bert-cross-encoder", drop("model.onnx.data"), "has weights in 'model.onnx.data', which is not there"),
        ("xlm-roberta", drop("embeddings.weight"), "has weights in 'embeddings.weight', which is not there"),
        ("xlm-roberta", shorten("model.onnx_data", 1000), "has 1000 bytes, but model.onnx has weights up to"),
        ("xlm-roberta", onnx_edit(leave_the_folder), "asks for weights outside of its folder, in '../../secret'"),
        ("bert-cls", shorten("model.onnx", 5000), "is not a readable ONNX model"),
        ("bert-cls", write(b"version https://git-lfs.github.com/spec/v1\n"), "is not a readable ONNX model"),
        ("bert-cls", write(b""), "is not a readable ONNX model: it has no graph"),
        ("bert-cls", drop("modules.json"), "the checkpoint has no modules.json"),
        ("bert-cls", drop("model.onnx"), "the checkpoint has no model.safetensors"),
    ],
)
def test_a_graph_that_cannot_be_adopted(
    tmp_path: Path,
    adopted: Path,
    name: str,
    damage: Callable[[Path], None],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One sentence, and what was built before stays."""
    repository = tmp_path / "repository"
    repository.mkdir()
    for part in adopted.glob(f"{name}*"):
        shutil.copytree(part, repository / part.name)
    before = files(repository)
    folder = checkpoint(name, tmp_path)
    damage(folder)
    assert make.main([str(folder), "--repository", str(repository)]) == 1
    message = capsys.readouterr().err
    assert words in message
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert files(repository) == before
