"""Sparse vectors: tiny masked language models through the builder, both CPU engines, a real Triton and gateway."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import REFERENCE, ROOT, TINY, Precision, Stack, cosines
from engines import Array, OnnxRuntime, OpenVino, feeds, requests, states_fed, steps, token_ids
from safetensors.numpy import load_file, save_file

from build import make

NAMES = [
    "bert-splade",
    "bge-m3-sparse",
    "camembert-splade",
    "distilbert-splade",
    "modernbert-splade",
    "new",
    "roberta-splade",
    "xlm-roberta-splade",
]
TEXTS: list[str] = json.loads((TINY / "texts.json").read_text())
BLANK: list[str] = json.loads((REFERENCE / "blank.json").read_text())["texts"]
RUNS = [
    (OpenVino, "openvino"),
    pytest.param(
        OnnxRuntime,
        "onnxruntime",
        marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="ONNX Runtime 1.23, the last for 3.10"),
    ),
]
SPLADE = "1_SpladePooling/config.json"


def expected(name: str, start: str = "") -> Array:
    """[texts, vocabulary] as sentence-transformers gave it."""
    arrays = np.load(TINY / name / "expected.npz")
    counts = arrays[f"{start}value_counts"]
    dense = np.zeros(
        (len(counts), json.loads((TINY / name / "config.json").read_text())["vocab_size"]), np.float32
    )
    dense[np.repeat(np.arange(len(counts)), counts), arrays[f"{start}indices"]] = arrays[f"{start}values"]
    return dense


def opened(indices: Array, values: Array, size: int) -> Array:
    """Rows filled up with -1 and 0 as vectors of the vocabulary's size; each is in order and holds no zero."""
    dense = np.zeros((len(indices), size), np.float32)
    for row, ids, weights in zip(dense, indices, values, strict=True):
        count = int((ids >= 0).sum())
        assert (ids[count:] == -1).all()
        assert not weights[count:].any()
        assert (np.diff(ids[:count]) > 0).all()
        assert (weights[:count] > 0).all()
        row[ids[:count]] = weights[:count]
    return dense


def build(name: str, folder: Path, *options: str) -> None:
    if name in ("bge-m3-sparse", "new"):  # whose files name a model that embeds
        options = (*options, "--task", "embed_sparse")
    assert make.main([str(TINY / name), "--repository", str(folder), *options]) == 0


@pytest.mark.parametrize(("engine", "runtime"), RUNS)
@pytest.mark.parametrize("name", NAMES)
def test_graphs_give_what_the_reference_gives(
    name: str, runtime: str, engine: type[OnnxRuntime] | type[OpenVino], tmp_path: Path
) -> None:
    """And a text has the same bits alone and in any batch."""
    build(name, tmp_path, "--runtime", runtime)
    encoder, head = map(engine, steps(tmp_path, name))
    reference = expected(name)

    def answer(batch: list[Array]) -> Array:
        rows = []
        for feed in feeds(runtime, batch):
            states = encoder(**feed)["last_hidden_state"]
            found = head(last_hidden_state=states_fed(runtime, states), **feed)
            rows.append(opened(found["indices"], found["values"], reference.shape[1]))
        return np.concatenate(rows)

    ids = token_ids(name)
    for texts, batch in requests(ids):
        together = answer(batch)
        np.testing.assert_allclose(together, reference[texts], rtol=1e-5, atol=1e-5)
        alone = np.concatenate([answer([np.array([ids[i]], np.int32)]) for i in texts])
        np.testing.assert_array_equal(alone, together)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Precision]:
    """Both in one server, beside a model that embeds, in fp32 and then in bf16."""
    folder = tmp_path_factory.mktemp(f"sparse-{request.param}")
    for name in (*NAMES, "bert-cls"):
        build(name, folder / "repository")
    options = ["--repository", str(folder / "repository"), "--models", *NAMES, "bert-cls"]
    stack = Stack(folder / "work", options, {"ENCODER_PRECISION": request.param}).start()
    yield Precision(stack, {"fp32": 0.99999, "bf16": 0.999}[request.param])
    assert stack.stop() == 0


def embed_sparse(stack: Stack, texts: list[str], name: str) -> Array:
    answer = stack.post("embed", "/embed_sparse", {"inputs": texts, "model": name})
    assert answer.status == 200, answer.body
    rows = answer.json()
    width = max(map(len, rows))
    indices = np.array([[w["index"] for w in row] + [-1] * (width - len(row)) for row in rows], np.int32)
    values = np.array([[w["value"] for w in row] + [0] * (width - len(row)) for row in rows], np.float32)
    return opened(indices, values, expected(name).shape[1])


@pytest.mark.parametrize(("texts", "start"), [(TEXTS, ""), (BLANK, "blank_")])
@pytest.mark.parametrize("name", NAMES)
def test_vectors_equal_the_reference(served: Precision, name: str, texts: list[str], start: str) -> None:
    """By v2 infer and by the gateway, whose numbers are the same bits."""
    reference = expected(name, start)
    answer = served.stack.infer(name, text=texts)
    direct = opened(answer["indices"], answer["values"], reference.shape[1])
    some = reference.any(axis=1)  # a text whose words all weigh nothing has no direction
    least = served.minimum_cosine
    if least < 0.99999:  # as far again as the reference in bf16 is from itself
        said = json.loads((TINY / name / "expected.json").read_text())
        least = 2 * said.get("sparse_bf16", said["bf16"]) - 1
    assert cosines(direct[some], reference[some]).min(initial=1) >= least
    # In bf16, of eight bits, a sum that is nothing may come as a few units in the last place of the largest one.
    nothing = 0 if served.minimum_cosine >= 0.99999 else 2**-5 * reference.max()
    assert direct[~some].max(initial=0) <= nothing
    np.testing.assert_array_equal(embed_sparse(served.stack, texts, name), direct)


@pytest.mark.parametrize("name", NAMES)
def test_a_text_has_the_same_bits_in_any_company(served: Precision, name: str) -> None:
    together = embed_sparse(served.stack, TEXTS, name)

    def alone(i: int) -> npt.NDArray[Any]:
        return embed_sparse(served.stack, [TEXTS[i]], name)[0]

    with ThreadPoolExecutor(16) as clients:
        np.testing.assert_array_equal(list(clients.map(alone, range(len(TEXTS)))), together)


def test_one_text_by_the_first_sparse_model(served: Precision) -> None:
    answer = served.stack.post("embed", "/embed_sparse", {"inputs": TEXTS[0]})
    (row,) = answer.json()
    named = served.stack.post("embed", "/embed_sparse", {"inputs": [TEXTS[0]], "model": NAMES[0]}).json()
    assert [row] == named


def test_what_is_cut_and_what_is_refused(served: Precision) -> None:
    long = {"inputs": [TEXTS[0], "word " * 500]}
    cut = served.stack.post("embed", "/embed_sparse", long)
    assert cut.status == 200
    refused = served.stack.post("embed", "/embed_sparse", {**long, "truncate": False})
    assert refused.status == 413  # as of TEI's other routes
    assert "text 1 is longer than the 64 tokens that bert-splade reads" in refused.json()["error"]
    empty = served.stack.post("embed", "/embed_sparse", {"inputs": ["a", ""]})
    assert empty.status == 400
    assert "inputs[1]" in empty.json()["error"]
    left = served.stack.post("embed", "/embed_sparse", {"inputs": "a", "truncation_direction": "Left"})
    assert left.status == 400


def test_the_pages_example(served: Precision) -> None:
    page = (ROOT / "docs" / "clients.md").read_text()
    (code,) = re.findall(r"```python\n(from tritonclient.*?)```", page, re.DOTALL)
    code = code.replace("localhost:8201", f"127.0.0.1:{served.stack.ports['grpc']}").replace(
        '"splade"', repr(NAMES[0])
    )
    values: dict[str, Any] = {}
    exec(code, values)
    rows = embed_sparse(served.stack, ["one text", "another"], NAMES[0])
    assert [set(weights) for weights in values["weights"]] == [set(row.nonzero()[0]) for row in rows]
    assert all(
        row[i] == weight
        for row, weights in zip(rows, values["weights"], strict=True)
        for i, weight in weights.items()
    )


def test_a_model_of_another_task(served: Precision) -> None:
    sparse = served.stack.post("embed", "/embed", {"texts": ["a"], "model": "bert-splade"})
    assert sparse.status == 404
    assert sparse.json()["error"] == "no model 'bert-splade' for embed; this server has: bert-cls"
    dense = served.stack.post("embed", "/embed_sparse", {"inputs": "a", "model": "bert-cls"})
    assert dense.status == 404
    names = ", ".join(NAMES)
    assert dense.json()["error"] == f"no model 'bert-cls' for embed_sparse; this server has: {names}"


def test_the_list_of_models(served: Precision) -> None:
    models = {model["name"]: model for model in served.stack.get("embed", "/models").json()["models"]}
    assert {models[name]["task"] for name in NAMES} == {"embed_sparse"}
    assert models["bert-splade"]["dimensions"] == expected("bert-splade").shape[1]


def test_a_server_without_a_sparse_model(stack: Stack) -> None:
    answer = stack.post("embed", "/embed_sparse", {"inputs": "a"})
    assert answer.status == 404
    assert answer.json()["error"] == "no model for embed_sparse; this server has: none"


def refusal(
    folder: Path, capsys: pytest.CaptureFixture[str], file: str, changes: dict[str, Any], *options: str
) -> str:
    """What a build says of the BERT with keys of a file changed."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert make.main([str(folder), "--repository", str(folder.parent / "repository"), *options]) == 1
    return capsys.readouterr().err


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in (TINY / "bert-splade").rglob("*.*"):
        if path.is_file() and not path.name.startswith("expected"):
            target = folder / path.relative_to(TINY / "bert-splade")
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


def test_a_head_without_a_bias(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(TINY / "modernbert-splade", tmp_path / "copy")
    assert "decoder_bias = false" in refusal(folder, capsys, "config.json", {"decoder_bias": False})


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        (SPLADE, {"pooling_strategy": "mean"}, "asks for mean of relu"),
        (SPLADE, {"activation_function": "gelu"}, "asks for max of gelu"),
        (SPLADE, {"embedding_dimension": 7}, "pools 7 logits, but the language model gives 560"),
        (SPLADE, {"top_k": 7}, "top_k = 7, which is not read"),
        (
            "config.json",
            {"architectures": ["BertModel"]},
            "is of BertModel; sparse vectors are written for BertFor",
        ),
        ("config.json", {"tie_word_embeddings": False}, "no tensor 'cls.predictions.decoder.weight'"),
        ("config_sentence_transformers.json", {"max_active_dims": 8}, "max_active_dims = 8"),
    ],
)
def test_what_a_build_refuses(
    copy: Path, capsys: pytest.CaptureFixture[str], file: str, changes: dict[str, Any], sentence: str
) -> None:
    assert sentence in refusal(copy, capsys, file, changes)


def test_a_runtime_that_gives_no_ragged_results(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(copy, capsys, SPLADE, {}, "--runtime", "tensorrt")
    assert "is for embed_sparse, which tensorrt does not run: build it for openvino, onnxruntime or torch" in said


def test_lexical_weights_that_are_a_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--task", "embed_sparse", "--repository", str(tmp_path)]
    assert make.main([str(TINY / "xlm-roberta"), *options]) == 1
    said = capsys.readouterr().err
    assert "has no sparse_linear.safetensors" in said
    assert "save what it holds with safetensors" in said


def test_a_head_that_is_tied_and_another(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(copy / "model.safetensors")
    words = tensors["bert.embeddings.word_embeddings.weight"]
    save_file(tensors | {"cls.predictions.decoder.weight": words + 1}, copy / "model.safetensors")
    assert "but config.json ties them" in refusal(copy, capsys, SPLADE, {})


def test_a_bias_that_is_tied_and_another(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(copy / "model.safetensors")
    bias = tensors["cls.predictions.bias"]
    save_file(tensors | {"cls.predictions.decoder.bias": bias + 1}, copy / "model.safetensors")
    assert "decoder.bias beside another cls.predictions.bias" in refusal(copy, capsys, SPLADE, {})


def test_a_head_of_its_own_has_a_bias_of_its_own(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(copy / "model.safetensors")
    words = tensors["bert.embeddings.word_embeddings.weight"]
    save_file(tensors | {"cls.predictions.decoder.weight": words + 1}, copy / "model.safetensors")
    said = refusal(copy, capsys, "config.json", {"tie_word_embeddings": False})
    assert "no tensor 'cls.predictions.decoder.bias'" in said


def test_a_head_of_its_own_and_the_logarithm_twice(copy: Path) -> None:
    """Of a table that is the words' all the same, and of log(1 + log(1 + x)), by mathematics."""
    tensors = load_file(copy / "model.safetensors")
    own = {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
    }
    save_file(
        tensors | own | {"cls.predictions.bias": own["cls.predictions.decoder.bias"] + 1},
        copy / "model.safetensors",
    )
    for file, changes in (
        ("config.json", {"tie_word_embeddings": False}),
        (SPLADE, {"activation_function": "log1p_relu"}),
    ):
        path = copy / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    repository = copy.parent / "repository"
    assert make.main([str(copy), "--repository", str(repository)]) == 0
    encoder, head = map(OpenVino, steps(repository, "copy"))
    (texts, batch), *_ = requests(token_ids("bert-splade"))
    (feed,) = feeds("openvino", batch)
    found = head(last_hidden_state=states_fed("openvino", encoder(**feed)["last_hidden_state"]), **feed)
    reference = expected("bert-splade")[texts]
    dense = opened(found["indices"], found["values"], reference.shape[1])
    np.testing.assert_allclose(dense, np.log1p(reference), rtol=1e-5, atol=1e-5)
