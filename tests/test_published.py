"""Configuration files of published models: ours are read up to the weights, all others are refused by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY
from safetensors.numpy import save_file

from build import family
from build.checkpoint import Checkpoint
from build.errors import BuildError
from build.family import ENCODERS
from build.source import describe
from build.target import Target

MODELS: dict[str, dict[str, Any]] = json.loads((ROOT / "tests" / "reference" / "published.json").read_text())[
    "models"
]
REFUSED = {
    "avsolatorio/NoInstruct-small-Embedding-v0": "lists Transformer, Pooling, Pooling, Normalize",
    "Hum-Works/lodestone-base-4096-v1": "no n_positions or max_position_embeddings",
    "infgrad/Jasper-Token-Compression-600M": "has auto_map",
    "jinaai/jina-embeddings-v2-base-en": "has auto_map",
    "xlm-roberta reranker with code of its own": "has auto_map",
}
"""Models of types that we write, which are other models all the same -> what the sentence names."""

OTHERS = [name for name, files in MODELS.items() if files["config.json"].get("model_type") not in ENCODERS]
WRITTEN = sorted(set(MODELS) - set(OTHERS) - set(REFUSED))
MODULES = [
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{path[2:] or 'Transformer'}"}
    for i, path in enumerate(["", "1_Pooling"])
]


def restored(value: Any) -> Any:
    """The fact as a file has it: an empty map or text where it was only counted."""
    if isinstance(value, dict):
        return {key: restored(part) for key, part in value.items()}
    counted = isinstance(value, str) and re.fullmatch(r"<\d+ (entries|characters|templates)>", value)
    return ({} if counted[1] == "entries" else "") if counted else value


def checkpoint(name: str, folder: Path) -> Checkpoint:
    """The model without a single weight; files that its copy lacks are as plain as can be."""
    files = {path: restored(content) for path, content in MODELS[name].items() if path != "source"}
    config = files["config.json"]
    files.setdefault("tokenizer_config.json", {})
    if not config["architectures"][0].endswith(("Classification", "CausalLM")):
        files.setdefault("modules.json", MODULES)
        width = config.get("hidden_size", config.get("n_embd"))
        files.setdefault("1_Pooling/config.json", {"word_embedding_dimension": width, "pooling_mode": "mean"})
    for path, content in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    save_file({}, folder / "model.safetensors")
    shutil.copy(TINY / "bert-cls" / "tokenizer.json", folder)
    return Checkpoint(folder)


def problems(name: str, folder: Path) -> list[str]:
    """What the build of each graph says, or of the family before there is one."""
    model = checkpoint(name, folder)
    said = []
    try:
        parts = family.models(describe(folder, "published"), model, Target())
    except BuildError as error:
        return [str(error)]
    for part in parts:
        try:
            family.write(part, folder / "built" / part.config.name)
        except BuildError as error:
            said.append(str(error))
    return said


def test_there_are_enough() -> None:
    assert len(MODELS) > 70
    assert len(WRITTEN) > 50
    assert {MODELS[name]["config.json"]["model_type"] for name in WRITTEN} == set(ENCODERS)


@pytest.mark.parametrize("name", WRITTEN)
def test_nothing_but_weights_is_missing(name: str, tmp_path: Path) -> None:
    said = problems(name, tmp_path)
    assert [text for text in said if not re.search(r"have no tensor|has no \S*model\.safetensors", text)] == []
    assert said


@pytest.mark.parametrize("name", OTHERS)
def test_other_types_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (said,) = problems(name, tmp_path)
    assert f"has model_type {MODELS[name]['config.json'].get('model_type')!r}" in said


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_of_our_types_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (said,) = problems(name, tmp_path)
    assert REFUSED[name] in said
