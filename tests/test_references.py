"""`build.verify` on every kind of model that is built, by the real command in the environment that has torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, TINY, Stack
from safetensors.numpy import load_file, save_file
from test_classifiers import classifier
from test_quality import PYTHON, torch

from build import make

__all__ = ["torch"]

TEXTS: list[str] = [text for text in json.loads((TINY / "texts.json").read_text()) if text.split()][:12]
FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "splade": ("bert-splade", "embed_sparse", ()),
    "lexical": ("bge-m3-sparse", "embed_sparse", ("--task", "embed_sparse")),
    "colbert": ("bert-colbert", "embed_all", ()),
    "colbert-rerank": ("bert-colbert", "rerank", ()),
    "m3": ("bge-m3-colbert", "embed_all", ("--task", "rerank")),
    "m3-rerank": ("bge-m3-colbert", "rerank", ()),
    "states": ("bert-cls", "embed_all", ("--task", "embed_all")),
    "classes": ("bert", "classify", ()),
    "mxbai": ("mxbai-reranker", "rerank", ("--task", "rerank")),
    "converted": ("qwen3-classifier", "rerank", ("--task", "rerank")),
    "jina": ("jina-v3-adapters", "embed", ("--adapter", "retrieval.query")),
    "static": ("static", "embed", ()),
    "model2vec": ("model2vec-mapped", "embed", ()),
    "t5": ("t5", "embed", ()),
}
"""Name -> its checkpoint, what it does, and how it is built; a name of `-rerank` comes with the one before it."""
ALTERED = {
    "splade": ("model.safetensors", "cls.predictions.bias"),
    "lexical": ("sparse_linear.safetensors", "weight"),
    "colbert": ("1_Dense/model.safetensors", "linear.weight"),
    "m3-rerank": ("colbert_linear.safetensors", "weight"),
    "classes": ("model.safetensors", "classifier.bias"),
    "mxbai": ("model.safetensors", "model.norm.weight"),
    "converted": ("model.safetensors", "score.weight"),
    "jina": ("model.safetensors", "roberta.encoder.layers.1.mlp.fc2.parametrizations.weight.0.lora_B"),
    "model2vec": ("model.safetensors", "weights"),
    "t5": ("2_Dense/model.safetensors", "linear.weight"),
}
"""Family -> a file of its checkpoint, and the tensor of which one weight is altered."""
OTHERS = {
    "splade": ("bert-cls", "is of BertModel and has no sparse_linear.safetensors: it weighs no words"),
    "jina": ("jina-bert", "has no adapter 'retrieval.query': it has none"),
    "static": ("nomic-bert-moe", "cannot be loaded: "),
    "classes": ("jina-reranker", "is computed by code of its own, which is never run"),
    "t5": ("new", "cannot be loaded: "),
}
"""Family -> a checkpoint that transformers has no class for, and what is said of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


@pytest.fixture(scope="module")
def checkpoints(folder: Path) -> dict[str, Path]:
    """Of each family; those of one checkpoint have one folder."""
    return {
        name: classifier(checkpoint, folder) if task == "classify" else TINY / checkpoint
        for name, (checkpoint, task, _) in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def served(folder: Path, checkpoints: dict[str, Path]) -> Iterator[Stack]:
    """All of them, in fp32."""
    repository = ["--repository", str(folder / "repository")]
    for name, (_, _, options) in FAMILIES.items():
        if not name.endswith("-rerank"):
            assert make.main([str(checkpoints[name]), "--name", name, *options, *repository]) == 0
    stack = Stack(folder / "work", [*repository, "--models", *FAMILIES], {"ENCODER_PRECISION": "fp32"}).start()
    yield stack
    assert stack.stop() == 0


def altered(name: str, checkpoint: Path, folder: Path) -> Path:
    """A copy in which one weight is another."""
    shutil.copytree(checkpoint, folder)
    file, tensor = ALTERED[name]
    tensors = load_file(folder / file)
    flat = tensors[tensor] = tensors[tensor].copy()
    place = (0, *np.unravel_index(abs(flat[0]).argmax(), flat[0].shape)) if name == "jina" else None
    flat[place or np.unravel_index(abs(flat).argmax(), flat.shape)] += 2
    save_file(tensors, folder / file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def reports(served: Stack, checkpoints: dict[str, Path], folder: Path) -> tuple[dict[str, Any], str]:
    """Every report, the command's own and that of the altered checkpoints, and what it said."""
    (folder / "texts.txt").write_text("\n".join(" ".join(text.split()) for text in TEXTS))
    url = f"localhost:{served.ports['grpc']}"
    calls = []
    for kind, against in (
        ("own", checkpoints),
        ("altered", {name: altered(name, checkpoints[name], folder / f"altered-{name}") for name in ALTERED}),
        ("other", {name: TINY / other for name, (other, _) in OTHERS.items()}),
    ):
        for name, checkpoint in against.items():
            call = [name, "--reference", str(checkpoint), "--url", url, "--texts", str(folder / "texts.txt")]
            calls.append([*call, "--tolerance", "0.99999", "--report", str(folder / f"{kind} {name}.json")])
    code = f"from build.verify import main; print([main(call) for call in {calls}])"
    done = subprocess.run(
        [str(PYTHON), "-c", code],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    statuses = json.loads(done.stdout.splitlines()[-1])
    assert statuses[: len(FAMILIES)] == [0 if found[f"own {name}"]["passed"] else 1 for name in FAMILIES]
    assert set(statuses[len(FAMILIES) :]) == {1}
    return found, done.stderr


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_agrees_with_the_reference_of_its_kind(reports: tuple[dict[str, Any], str], name: str) -> None:
    report = reports[0][f"own {name}"]
    assert report["task"] == FAMILIES[name][1]
    assert report["passed"], report["worst"][0]
    assert (report["token_ids"]["compared"] > 0) is not name.endswith("-rerank")


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("name", ALTERED)
def test_one_altered_weight_is_found(reports: tuple[dict[str, Any], str], name: str) -> None:
    report = reports[0][f"altered {name}"]
    assert not report["passed"]
    assert report["token_ids"]["different"] == 0


@pytest.mark.usefixtures("torch")
def test_a_checkpoint_without_a_reference_is_one_sentence(reports: tuple[dict[str, Any], str]) -> None:
    """Where transformers has a class of the type's name, it would be loaded with random weights."""
    said = [line for line in reports[1].splitlines() if line.startswith("error: ")]
    for line, (name, words) in zip(said, OTHERS.values(), strict=True):
        assert f"{name} {words}" in line
