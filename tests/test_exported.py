"""Which exported graph is adopted, and what the command line says of a model whose files do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import TINY, cosines
from engines import Array, OnnxRuntime, feeds, requests, token_ids
from onnx import helper
from test_adoption import EXPORTED, RERANKER, answer, build, checkpoint, edit_json, edit_onnx, graph_of
from test_families import expected

from build import make


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one sentence that a build ends with; it writes nothing."""
    repository = folder.parent / "refused"
    assert make.main([str(folder), "--repository", str(repository), *options]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert not list(repository.glob("*"))
    return message


def plain(name: str, folder: Path) -> Path:
    """A checkpoint as transformers saves it, without sentence-transformers' files."""
    target = checkpoint(name, folder)
    for extra in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (target / extra).unlink(missing_ok=True)
    shutil.rmtree(target / "1_Pooling", ignore_errors=True)
    return target


def at(folder: Path, place: str) -> Path:
    """The same checkpoint with its graph in another place."""
    target = folder / place
    target.parent.mkdir(exist_ok=True)
    graph_of(folder).rename(target)
    return folder


def embeddings(repository: Path, name: str, ids: list[list[int]], runtime: str = "openvino") -> Array:
    """Of every text, in one batch."""
    width = max(map(len, ids))
    rows = np.array([row + [-1] * (width - len(row)) for row in ids], np.int32)
    (feed,) = feeds(runtime, [rows])
    return answer(repository, name, runtime, OnnxRuntime, feed)["embeddings"]


def token_vectors(name: str) -> list[Array]:
    """[T, H] of every text, by the exported graph as torch left it, each text alone."""
    session = onnxruntime.InferenceSession(graph_of(EXPORTED / name))
    dtype = {value.name: np.int64 for value in session.get_inputs()}
    found = []
    for ids in token_ids(name):
        known = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": [0] * len(ids)}
        feed = {key: np.array([known[key]], kind) for key, kind in dtype.items()}
        found.append(session.run(["last_hidden_state"], feed)[0][0])
    return found


@pytest.mark.parametrize("place", ["onnx/model_fp16.onnx", "model_quantized.onnx", "onnx/my model.onnx"])
def test_a_graph_of_any_name(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = at(checkpoint("bert-cls", tmp_path), place)
    message = refused(folder, capsys)
    assert f"the file that --onnx names; it has {place}" in message
    build(folder, tmp_path / "repository", "--onnx", place)
    vectors = embeddings(tmp_path / "repository", "bert-cls", token_ids("bert-cls"))
    assert cosines(vectors, expected("bert-cls")["embeddings"]).min() >= 0.99999


def test_a_graph_that_is_named_comes_before_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint("bert-cls", tmp_path, weights=True)
    build(folder, tmp_path / "repository", "--onnx", "model.onnx")
    encoder = onnx.load(tmp_path / "repository/bert-cls-encoder/1/model.onnx", load_external_data=False)
    assert any(node.name.startswith("adopted/") for node in encoder.graph.node)
    build(folder, tmp_path / "other")
    encoder = onnx.load(tmp_path / "other/bert-cls-encoder/1/model.onnx", load_external_data=False)
    assert not any(node.name.startswith("adopted/") for node in encoder.graph.node)
    capsys.readouterr()
    assert "the checkpoint has no none.onnx; it has model.onnx" in refused(folder, capsys, "--onnx", "none.onnx")
    assert "the checkpoint has no ../model.onnx" in refused(folder, capsys, "--onnx", "../model.onnx")
    assert "have no output to choose: add --onnx FILE" in refused(folder, capsys, "--output", "logits")


def test_a_page_that_refuses_names_the_graph_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint("bert-cls", tmp_path, weights=True)
    edit_json(folder / "config.json", hidden_act="swish")
    message = refused(folder, capsys)
    assert "hidden_act" in message
    assert "its exported graph can be taken instead: --onnx model.onnx" in message


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("unit_length", [True, False])
def test_a_plain_checkpoint_is_pooled_on_request(tmp_path: Path, pooling: str, unit_length: bool) -> None:
    """As the repositories of transformers.js are: config, tokenizer and onnx/model.onnx."""
    folder = at(plain("bert-cls", tmp_path), "onnx/model.onnx")
    options = ["--pooling", pooling, "--normalise" if unit_length else "--no-normalise"]
    build(folder, tmp_path / "repository", *options)
    pool = {
        "mean": lambda states: states.mean(0),
        "cls": lambda states: states[0],
        "last": lambda states: states[-1],
    }
    vectors = np.array([pool[pooling](states) for states in token_vectors("bert-cls")])
    if unit_length:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = embeddings(tmp_path / "repository", "bert-cls", token_ids("bert-cls"))
    np.testing.assert_allclose(found, vectors, atol=1e-5)
    facts = json.loads((tmp_path / "repository/bert-cls/build.json").read_text())["facts"]
    assert facts["unit_length"] == ("true" if unit_length else "false")


def test_weights_too_are_pooled_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = plain("bert-cls", tmp_path)
    graph_of(folder).unlink()
    shutil.copy(TINY / "bert-cls" / "model.safetensors", folder)
    message = refused(folder, capsys)
    assert "has no modules.json" in message
    assert "with --pooling mean, cls or last, and --normalise for unit length" in message
    build(folder, tmp_path / "repository", "--pooling", "cls", "--normalise", "--runtime", "onnxruntime")
    vectors = embeddings(tmp_path / "repository", "bert-cls", token_ids("bert-cls"), "onnxruntime")
    assert cosines(vectors, expected("bert-cls")["embeddings"]).min() >= 0.99999


def test_what_is_pooled_already_is_not_pooled_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint("nomic-bert", tmp_path)
    message = refused(folder, capsys, "--pooling", "mean")
    assert "gives sentence_embedding, which is pooled already: leave --pooling out" in message
    message = refused(folder, capsys, "--no-normalise")
    assert "gives sentence_embedding of unit length already: leave --no-normalise out" in message
    message = refused(checkpoint(RERANKER, tmp_path), capsys, "--pooling", "mean")
    assert "is a reranker, so its tokens' vectors are not pooled: leave --pooling and --normalise out" in message


def test_an_output_of_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint("bert-cls", tmp_path)
    edit_onnx(folder, rename_outputs)
    assert "name an output that is like these with --output" in refused(folder, capsys)
    message = refused(folder, capsys, "--output", "none")
    assert "has no output none; it gives my_last_hidden_state, my_pooler_output" in message
    build(folder, tmp_path / "repository", "--output", "my_last_hidden_state")
    vectors = embeddings(tmp_path / "repository", "bert-cls", token_ids("bert-cls"))
    assert cosines(vectors, expected("bert-cls")["embeddings"]).min() >= 0.99999


def rename_outputs(model: onnx.ModelProto) -> None:
    for value in model.graph.output:
        model.graph.node.append(helper.make_node("Identity", [value.name], [f"my_{value.name}"]))
        value.name = f"my_{value.name}"


def test_the_pooled_one_of_two_outputs(tmp_path: Path) -> None:
    """Tokens are taken where modules say how to pool them; the graph's own pooling if it is asked for."""
    folder = checkpoint("xlm-roberta", tmp_path)
    build(folder, tmp_path / "repository", "--output", "sentence_embedding")
    assert not (tmp_path / "repository" / "xlm-roberta-pooling").exists()
    vectors = embeddings(tmp_path / "repository", "xlm-roberta", token_ids("xlm-roberta"))
    assert cosines(vectors, expected("xlm-roberta")["embeddings"]).min() >= 0.999


def test_a_task_that_the_files_do_not_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second text's segment still reaches the graph."""
    folder = checkpoint(RERANKER, tmp_path)
    edit_json(folder / "config.json", architectures=["BertModel"])
    (folder / "modules.json").unlink()
    assert "or say --task rerank if the model is a reranker" in refused(folder, capsys)
    build(folder, tmp_path / "repository", "--task", "rerank")
    for texts, batch in requests(token_ids(RERANKER)):
        (feed,) = feeds("openvino", batch)
        found = answer(tmp_path / "repository", RERANKER, "openvino", OnnxRuntime, feed)["score"][:, 0]
        np.testing.assert_allclose(found, expected(RERANKER)["scores"][texts], atol=1e-4)
    edit_json(folder / "config.json", architectures=["BertForSequenceClassification"])
    message = refused(folder, capsys, "--task", "embed")
    assert "gives logits; of an embedding model's graph" in message


def test_torch_names_the_runtimes_that_adopt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint("xlm-roberta", tmp_path)
    message = refused(folder, capsys, "--runtime", "torch")
    assert "build it for openvino, onnxruntime or tensorrt" in message
