"""Modules behind a transformer, every kind and option, against sentence-transformers with the same files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REFERENCE, TINY, cosines, rows
from engines import Array, OnnxRuntime, OpenVino, feeds, requests, states_fed, steps, token_ids
from safetensors.numpy import load_file, save_file
from test_accounts import Change, edit, graphs
from test_graphs import needs_opset_24

from build.errors import BuildError
from build.rendering.model_folder import write_model
from build.rendering.models import models_of
from build.sources.checkpoint import Checkpoint
from build.sources.obtain import describe
from build.target import Target

BASE = "bert-cls"
SCORED: dict[str, Any] = json.loads((REFERENCE / "scores.json").read_text())
SCORES = np.load(REFERENCE / "scores.npz")
FILES: dict[str, dict[str, Any]] = json.loads((REFERENCE / "heads.json").read_text())
EXPECTED = np.load(REFERENCE / "heads.npz")
IDS = token_ids(BASE)[: len(EXPECTED["mean"])]
ENGINES = [
    (OpenVino, "openvino"),
    (OpenVino, "tensorrt"),
    pytest.param(OnnxRuntime, "onnxruntime", marks=needs_opset_24),
]


def checkpoint(name: str, folder: Path) -> Path:
    """The tiny checkpoint with other modules behind it."""
    folder = shutil.copytree(TINY / BASE, folder / BASE, ignore=shutil.ignore_patterns("expected.*", "?_*"))
    for path, content in FILES[name].items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    weights: dict[str, dict[str, Array]] = {}
    for key in EXPECTED:
        head, _, place = key.partition("/")
        if head == name and place:
            module, tensor = place.split("/")
            weights.setdefault(module, {})[tensor] = EXPECTED[key]
    for module, tensors in weights.items():
        save_file(tensors, folder / module / "model.safetensors")
    return folder


def written(folder: Path, into: Path, runtime: str = "openvino", **asked: Any) -> tuple[Path, Path]:
    """What a build writes of the checkpoint: encoder and head."""
    entry = replace(describe(folder, BASE), **asked)
    for model in models_of(entry, Checkpoint(folder), Target(runtime)):
        write_model(model, into / model.config.name)
    return steps(into, BASE)


@cache
def states(engine: type[OpenVino] | type[OnnxRuntime], runtime: str, folder: Path) -> list[Any]:
    """Batches of several texts, and each text alone: which they are, and what the head of each is fed."""
    run = engine(written(TINY / BASE, folder, runtime)[0])
    batches = [*requests(IDS), *(([i], [np.array([ids], np.int32)]) for i, ids in enumerate(IDS))]
    found = []
    for texts, batch in batches:
        fed = feeds(runtime, batch)
        calls = [{"last_hidden_state": states_fed(runtime, run(**f)["last_hidden_state"]), **f} for f in fed]
        found.append((texts, calls))
    return found


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoders")


@pytest.mark.parametrize(("engine", "runtime"), ENGINES)
@pytest.mark.parametrize("name", FILES)
def test_modules_give_what_the_reference_gives(
    name: str, engine: type[OpenVino] | type[OnnxRuntime], runtime: str, scratch: Path, tmp_path: Path
) -> None:
    """Directions and lengths, and for a text the same bits in a batch as alone."""
    head = engine(written(checkpoint(name, tmp_path), tmp_path / "built", runtime)[1])
    alone: dict[int, Array] = {}
    for texts, calls in reversed(states(engine, runtime, scratch / runtime)):
        found = np.concatenate([head(**call)["embeddings"] for call in calls])
        expected = EXPECTED[name][texts]
        assert found.shape == expected.shape
        assert cosines(found, expected).min() >= 0.999999
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-5)
        for text, vector in zip(texts, found, strict=True):
            np.testing.assert_array_equal(vector, alone.setdefault(text, vector))
    assert len(alone) == len(IDS)


@pytest.mark.parametrize("path", [path for path in FILES["many"] if path.endswith("config.json")])
def test_a_key_that_nobody_knows_stops_the_build(path: str, tmp_path: Path) -> None:
    folder = checkpoint("many", tmp_path)
    edit(folder / path, lambda values: values.update(scale=2))
    with pytest.raises(BuildError, match=f"{path} has scale = 2, which is not read"):
        graphs(folder, tmp_path / "found")


@pytest.mark.parametrize("path", ["3_Dense", "5_LayerNorm"])
def test_a_tensor_that_nobody_reads_stops_the_build(path: str, tmp_path: Path) -> None:
    folder = checkpoint("many", tmp_path)
    file = folder / path / "model.safetensors"
    save_file(load_file(file) | {"other.bias": np.zeros(3, np.float32)}, file)
    with pytest.raises(BuildError, match=r"has tensor other\.bias"):
        graphs(folder, tmp_path / "found")


def test_modules_may_have_no_file(tmp_path: Path) -> None:
    """Normalize had none in older versions; Dropout does nothing whatever its file says."""
    folder = checkpoint("many", tmp_path)
    expected = graphs(folder, tmp_path / "expected")
    for path in ("2_Normalize", "4_Dropout", "7_Normalize"):
        shutil.rmtree(folder / path)
    assert graphs(folder, tmp_path / "found") == expected


def test_flags_count_only_where_nothing_newer_is_said(tmp_path: Path) -> None:
    """As in the reference, which drops them then."""
    folder = checkpoint("max", tmp_path)
    expected = graphs(folder, tmp_path / "expected")
    edit(folder / "1_Pooling" / "config.json", lambda values: values.update(pooling_mode_cls_token=True))
    assert graphs(folder, tmp_path / "found") == expected


@pytest.mark.parametrize("name", ["mean", "many", "cut"])
@pytest.mark.parametrize("normalise", [True, False])
def test_unit_length_as_it_is_asked_for(name: str, normalise: bool, scratch: Path, tmp_path: Path) -> None:
    """Whatever the modules say last, and behind a cut that the checkpoint asks for."""
    head = OpenVino(written(checkpoint(name, tmp_path), tmp_path / "built", normalise=normalise)[1])
    texts, (call, *_) = states(OpenVino, "openvino", scratch / "openvino")[-1]
    vector = head(**call)["embeddings"]
    assert cosines(vector, EXPECTED[name][texts]).min() >= 0.999999
    assert (abs(np.linalg.norm(vector) - 1) < 1e-5) == normalise


def test_asked_dimensions_take_the_place_of_the_checkpoints(scratch: Path, tmp_path: Path) -> None:
    """Cut before the norm, as --dimensions always does."""
    head = OpenVino(written(checkpoint("cut", tmp_path), tmp_path / "built", dimensions=30)[1])
    texts, (call, *_) = states(OpenVino, "openvino", scratch / "openvino")[-1]
    vector, expected = head(**call)["embeddings"], EXPECTED["mean"][texts][:, :30]
    assert cosines(vector, expected).min() >= 0.999999
    assert abs(np.linalg.norm(vector) - 1) < 1e-5


def reranker(name: str, folder: Path) -> Path:
    """A tiny reranker with other files."""
    base = SCORED[name]["checkpoint"]
    folder = shutil.copytree(TINY / base, folder / base, ignore=shutil.ignore_patterns("expected.*"))
    for path, content in SCORED[name]["files"].items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    return folder


def pair_ids(name: str) -> list[list[int]]:
    if f"{name}/token_ids" in SCORES:
        return rows(SCORES[f"{name}/token_ids"], SCORES[f"{name}/token_counts"])
    return token_ids(SCORED[name]["checkpoint"])[: len(SCORES[name])]


@pytest.mark.parametrize(("engine", "runtime"), ENGINES)
@pytest.mark.parametrize("name", SCORED)
def test_scores_are_the_checkpoints_own_cross_encoders(
    name: str, engine: type[OpenVino] | type[OnnxRuntime], runtime: str, tmp_path: Path
) -> None:
    folder = reranker(name, tmp_path)
    entry = describe(folder, "reranker")
    assert entry.tasks == ("rerank",)
    for model in models_of(entry, Checkpoint(folder), Target(runtime)):
        write_model(model, tmp_path / model.config.name)
    encoder, head = map(engine, steps(tmp_path, "reranker"))
    for pairs, batch in requests(pair_ids(name)):
        calls = feeds(runtime, batch)
        found = [
            head(last_hidden_state=states_fed(runtime, encoder(**call)["last_hidden_state"]), **call)
            for call in calls
        ]
        scores = np.concatenate([one["score"][:, 0] for one in found])
        np.testing.assert_allclose(scores, SCORES[name][pairs], atol=2e-5)


@pytest.mark.parametrize("name", ["one token over another", "one token"])
def test_a_language_models_pairs_are_read_as_the_reference_reads_them(name: str, tmp_path: Path) -> None:
    """One behind the other, without a template."""
    folder = reranker(name, tmp_path)
    config = models_of(describe(folder, "reranker"), Checkpoint(folder), Target())[0].config
    assert [one.name for one in config.input] == ["query", "passage"]
    tokenizer = Checkpoint(folder).tokenizer
    pairs = json.loads((TINY / "pairs.json").read_text())[: len(SCORES[name])]
    tokenizer.enable_truncation(192)
    assert [encoding.ids for encoding in tokenizer.encode_batch(pairs)] == pair_ids(name)


REFUSED: dict[str, tuple[str, str, Change, str]] = {
    "another activation": (
        "Identity",
        "config.json",
        lambda values: values["sentence_transformers"].update(activation_fn="torch.nn.modules.activation.Softmax"),
        r"with torch\.nn\.modules\.activation\.Softmax; scores are written for torch.nn's Identity",
    ),
    "another key of the library": (
        "Identity",
        "config.json",
        lambda values: values["sentence_transformers"].update(scale=2),
        r"config\.json has sentence_transformers\.scale = 2, which is not read",
    ),
    "another key of the module": (
        "one token",
        "1_LogitScore/config.json",
        lambda values: values.update(scale=2),
        "has scale = 2, which is not read",
    ),
    "other logits": (
        "one token",
        "1_LogitScore/config.json",
        lambda values: values.update(module_input_name="scores"),
        "module_input_name = .scores.",
    ),
    "a token past the last": (
        "one token",
        "1_LogitScore/config.json",
        lambda values: values.update(true_token_id=640),
        "the score is of token 640, but the language model knows 640",
    ),
    "a chat template": (
        "one token",
        "sentence_bert_config.json",
        lambda values: values["modality_config"].update(message={"method": "forward"}),
        "modality_config",
    ),
    "more modules": (
        "Identity, beside modules",
        "modules.json",
        lambda modules: modules.append(
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
        ),
        "lists Transformer, Pooling; scores are written for a Transformer that classifies",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_scores_are_refused_by_name(case: str, tmp_path: Path) -> None:
    name, path, change, words = REFUSED[case]
    folder = reranker(name, tmp_path)
    edit(folder / path, change)
    with pytest.raises(BuildError, match=words):
        graphs(folder, tmp_path / "found")
