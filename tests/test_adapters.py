"""Adapters of tasks, which are added to the weights: jina-embeddings-v3 as its published checkpoint lays them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, cosines
from engines import OpenVino, feeds, requests, states_fed, steps, token_ids
from safetensors.numpy import load_file, save_file
from test_accounts import edit
from test_graphs import COSINE

from build import catalog, make
from build.config import read_config
from build.errors import BuildError
from build.rendering.model_folder import write_model
from build.rendering.models import models_of
from build.sources.checkpoint import Checkpoint
from build.sources.obtain import describe
from build.sources.settings import check_nothing_is_left
from build.target import PRECISIONS, Target

NAME = "jina-v3-adapters"
EXPECTED = np.load(TINY / NAME / "expected.npz")
TASKS = ["retrieval.query", "retrieval.passage", "text-matching"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(TINY / NAME, tmp_path / NAME, ignore=shutil.ignore_patterns("expected.*"))


def written(folder: Path, into: Path, adapter: str | None, target: Target = Target()) -> None:  # noqa: B008
    """Writes the family; raises BuildError as the build does."""
    checkpoint = Checkpoint(folder)
    for model in models_of(replace(describe(folder, "jina"), adapter=adapter), checkpoint, target):
        write_model(model, into / model.config.name)
    check_nothing_is_left(checkpoint.unread_tensors(), ())


def vectors(folder: Path, target: Target) -> np.ndarray:
    encoder, head = map(OpenVino, steps(folder, "jina"))
    found: dict[int, np.ndarray] = {}
    for texts, batch in requests(token_ids(NAME)):
        rows = []
        for feed in feeds(target.runtime, batch):
            states = encoder(**feed)["last_hidden_state"]
            rows.append(head(last_hidden_state=states_fed(target.runtime, states), **feed)["embeddings"])
        found |= dict(zip(texts, np.concatenate(rows), strict=True))
    return np.array([found[i] for i in range(len(found))])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("adapter", [None, *TASKS])
def test_each_adapter_gives_what_the_reference_gives(adapter: str | None, precision: str, tmp_path: Path) -> None:
    """They are far from each other, so that none can stand for another."""
    target = Target("openvino", precision)
    written(TINY / NAME, tmp_path, adapter, target)
    found = vectors(tmp_path, target)
    assert cosines(found, EXPECTED[adapter or "embeddings"]).min() >= COSINE[precision]
    for other in {None, *TASKS} - {adapter}:
        assert cosines(found, EXPECTED[other or "embeddings"]).max() < 0.99


def test_the_command_takes_one(tmp_path: Path) -> None:
    """And the family says which."""
    options = ["--adapter", "retrieval.query", "--name", "jina-query", "--repository", str(tmp_path)]
    assert make.main([str(TINY / NAME), *options]) == 0
    written(TINY / NAME, tmp_path / "expected", "retrieval.query")
    weights = [
        folder / "1" / "model.onnx.data"
        for folder in (tmp_path / "jina-query-encoder", tmp_path / "expected" / "jina-encoder")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    parameters = read_config(tmp_path, "jina-query").parameters
    assert parameters["adapter"].string_value == "retrieval.query"
    tokenizer = (tmp_path / "jina-query-tokenizer" / "config.pbtxt").read_text()
    assert "Represent the query for retrieving evidence documents: " in tokenizer


def test_a_page_with_an_adapter_is_built_by_its_own_name_alone() -> None:
    """The repository's name stands for what the reference gives without a task."""
    assert catalog.load("jina-embeddings-v3-query").adapter == "retrieval.query"
    assert catalog.find("jinaai/jina-embeddings-v3", "") is None
    assert catalog.served_name("jinaai/jina-embeddings-v3") == "jina-embeddings-v3"


def said(**keys: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda values: values.update(keys))


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[f"roberta.{name}"]
        save_file(tensors, folder / "model.safetensors")

    return change


def other_code(folder: Path) -> None:
    said(auto_map={"AutoModel": "modeling_other.Model"})(folder)


FC2 = "encoder.layers.1.mlp.fc2.parametrizations.weight"
REFUSED: dict[str, tuple[Callable[[Path], None], str | None, str]] = {
    "another": (
        said(),
        "separation",
        "has no adapter 'separation': choose retrieval.query or retrieval.passage or",
    ),
    "none": (
        said(lora_adaptations=[], load_trained_adapters=False),
        TASKS[0],
        "'retrieval.query': leave --adapter",
    ),
    "none is loaded": (said(load_trained_adapters=False), TASKS[0], "load_trained_adapters = false"),
    "of a layer none": (without(f"{FC2}.0.lora_A"), TASKS[0], f"no tensor '{FC2}.0.lora_A'"),
    "of a layer none, unused": (without(f"{FC2}.0.lora_A"), None, f"no tensor '{FC2}.0.lora_A'"),
    "other ranks": (said(lora_rank=4), None, r"lora_A of shape \[3, 1, 3\], .* asks for \[3, 1, 4\]"),
    "fewer": (said(lora_adaptations=TASKS[:2]), None, r"lora_A of shape \[3, 1, 3\], .* asks for \[2, 1, 3\]"),
    "learned positions": (said(position_embedding_type="absolute"), None, 'position_embedding_type = "absolute"'),
    "cut": (said(truncate_dim=24), None, "truncate_dim = 24"),
    "another type": (said(model_type="bert"), None, 'model_type = "bert"'),
    "other code": (other_code, None, "code of its own computes it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused(case: str, folder: Path, tmp_path: Path) -> None:
    change, adapter, words = REFUSED[case]
    change(folder)
    with pytest.raises(BuildError, match=words):
        written(folder, tmp_path, adapter)


def test_one_is_refused_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"has no adapter 'retrieval\.query': leave --adapter out"):
        written(TINY / "jina-v3", tmp_path, "retrieval.query")


def test_a_tensor_that_nobody_reads_stops_the_build(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    other = "roberta.encoder.layers.1.norm1.parametrizations.weight.0.lora_A"
    save_file(tensors | {other: np.zeros(3, np.float32)}, folder / "model.safetensors")
    with pytest.raises(BuildError, match=r"norm1\.parametrizations\.weight\.0\.lora_A, which is not read"):
        written(folder, tmp_path, "text-matching")
