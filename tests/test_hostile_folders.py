"""What lies in a checkpoint folder is read only where it is the folder's own, and one build at a time writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, TINY
from containers import until
from safetensors.numpy import load_file, save_file
from test_accounts import copied

from build.sources.files import sha256


def link(name: str, to: str) -> Callable[[Path], None]:
    """The file is a link."""

    def change(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(to)

    return change


def fifo(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def folder_in_place(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def index(shard: str) -> Callable[[Path], None]:
    """An index of weights that names such a file, in place of the weights."""
    return index_of(json.dumps({"metadata": {}, "weight_map": {"norm.weight": shard}}))


def index_of(content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(content)

    return change


def header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """The weights say another thing of their tensors."""

    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        values = json.loads(content[8:end])
        change(values)
        written = json.dumps(values).encode()
        path.write_bytes(len(written).to_bytes(8, "little") + written + content[end:])

    return rewrite


def of_first(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda values: next(values[key] for key in values if key != "__metadata__").update({name: value})


def as_modules(path: str) -> Callable[[Path], None]:
    """The pooling module lies at such a path."""

    def change(folder: Path) -> None:
        modules = json.loads((folder / "modules.json").read_text())
        modules[1]["path"] = path
        (folder / "modules.json").write_text(json.dumps(modules))

    return change


def module_is_a_file(folder: Path) -> None:
    shutil.rmtree(folder / "1_Pooling")
    (folder / "1_Pooling").write_text("{}")


def circle(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("other.json")
    (folder / "other.json").symlink_to("config.json")


def special(content: dict[str, Any]) -> Callable[[Path], None]:
    """What the tokenizer puts around a text."""

    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": content}))

    return change


def sparse(name: str, size: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.truncate(size)

    return change


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


OTHER = str(TINY / "bert-cross-encoder")
CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights elsewhere": (
        link("model.safetensors", f"{OTHER}/model.safetensors"),
        "leads outside of the checkpoint",
    ),
    "settings elsewhere": (link("config.json", "/etc/hostname"), "leads outside of the checkpoint"),
    "a tokenizer elsewhere": (
        link("tokenizer.json", f"{OTHER}/tokenizer.json"),
        "leads outside of the checkpoint",
    ),
    "a module elsewhere": (link("1_Pooling", str(TINY / "xlm-roberta" / "1_Pooling")), "leads outside"),
    "no end": (link("config.json", "/dev/zero"), "is no regular file"),
    "no end of weights": (link("model.safetensors", "/dev/zero"), "is no regular file"),
    "a pipe": (fifo("config.json"), "is no regular file"),
    "a pipe of weights": (fifo("model.safetensors"), "is no regular file"),
    "a pipe of a tokenizer": (fifo("tokenizer.json"), "is no regular file"),
    "a folder": (folder_in_place("tokenizer.json"), "is no regular file"),
    "a shard above": (index("../bert/model.safetensors"), "has no ../bert/model.safetensors"),
    "a shard elsewhere": (index(f"{OTHER}/model.safetensors"), "leads outside of the checkpoint"),
    "an index of nothing": (index_of("{}"), "has no weight_map"),
    "an index that is a list": (index_of('{"weight_map": []}'), "must be a JSON object"),
    "a shard that is a number": (index_of('{"weight_map": {"a": 3}}'), "must be a text"),
    "a shard of no name": (index("a\0b"), "the checkpoint has no a\0b"),
    "a shard of a long name": (index("a" * 5000), "the checkpoint has no aaaa"),
    "a link to nowhere": (link("tokenizer_config.json", "none.json"), "none.json, which is not there"),
    "weights that lead nowhere": (link("model.safetensors", "none"), "none, which is not there"),
    "modules that lead nowhere": (link("modules.json", "none"), "none, which is not there"),
    "a circle of links": (circle, "config.json cannot be followed to a file"),
    "a module that is a file": (module_is_a_file, "cannot be followed to a file: Not a directory"),
    "a module of no name": (as_modules("a\0b"), "cannot be followed to a file"),
    "a module of a long name": (as_modules("a" * 5000), "cannot be followed to a file: File name too long"),
    "a template of tokens that are not there": (
        special(
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[NONE]", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
        "tokenizer.json puts '[NONE]' around a text and does not say which ids that has",
    ),
    "a tokenizer without end": (sparse("tokenizer.json", 300 << 20), "no file of settings is larger"),
    "weights that were cut": (sparse("model.safetensors", 5000), "is not a readable safetensors file"),
    "a header without end": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64) and None,
        "is not a readable safetensors file",
    ),
    "tensors over each other": (header(of_first("data_offsets", [0, 8])), "is not a readable safetensors file"),
    "a tensor before the first": (header(of_first("data_offsets", [-8, 0])), "is not a readable safetensors file"),
    "a tensor past the end": (header(of_first("data_offsets", [0, 1 << 60])), "not a readable safetensors file"),
    "a shape past the end": (header(of_first("shape", [1 << 40, 1 << 40])), "not a readable safetensors file"),
    "a type of no name": (header(of_first("dtype", "F1")), "is not a readable safetensors file"),
    "modules that are an object": (text("modules.json", "{}"), "must hold a JSON list"),
    "modules that are numbers": (text("modules.json", "[1]"), "must be a JSON object"),
    "deep": (text("config.json", "[" * 200_000), "not valid JSON"),
    "large": (text("config.json", " " * (65 << 20)), "no file of settings is larger"),
}


def command(folder: Path, repository: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "build.make", str(folder), "--repository", str(repository), *options]


@pytest.mark.parametrize("case", CASES)
def test_only_a_folders_own_files_are_read(case: str, tmp_path: Path) -> None:
    change, words = CASES[case]
    folder = copied("bert-cls", tmp_path)
    change(folder)
    done = subprocess.run(
        command(folder, tmp_path / "repository"), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    folder = copied("bert-cls", tmp_path)
    (folder / "blobs").mkdir()
    (folder / "model.safetensors").rename(folder / "blobs" / "weights")
    (folder / "model.safetensors").symlink_to("blobs/weights")
    subprocess.run(command(folder, tmp_path / "repository"), cwd=ROOT, check=True)


def test_links_into_what_a_cache_shares_are_followed(tmp_path: Path) -> None:
    """huggingface_hub keeps what came by Xet once for all repositories, and links to it from each."""
    folder = copied("bert-cls", tmp_path)
    cache = tmp_path / "hub"
    home, shared = cache / "models--org--tiny", cache / "blobs" / "ab"
    (home / "snapshots").mkdir(parents=True)
    (home / "blobs").mkdir()
    shared.mkdir(parents=True)
    snapshot = folder.rename(home / "snapshots" / ("0" * 40))
    for i, path in enumerate(path for path in snapshot.rglob("*") if path.is_file()):
        path.rename(shared / str(i))
        (home / "blobs" / str(i)).symlink_to(f"../../blobs/ab/{i}")
        path.symlink_to(home / "blobs" / str(i))
    subprocess.run(command(snapshot, tmp_path / "repository"), cwd=ROOT, check=True)
    (cache / "other").mkdir()
    (shared / "0").rename(cache / "other" / "0")
    (home / "blobs" / "0").unlink()
    (home / "blobs" / "0").symlink_to(cache / "other" / "0")
    again = command(snapshot, tmp_path / "repository", "--dimensions", "24")
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "leads outside of the checkpoint" in done.stderr


def test_the_whole_file_of_weights_goes_before_shards(tmp_path: Path) -> None:
    """As transformers reads a checkpoint that has both."""
    folder = copied("bert-cls", tmp_path)
    subprocess.run(command(folder, tmp_path / "repository"), cwd=ROOT, check=True)
    before = built(tmp_path / "repository")
    weights = load_file(folder / "model.safetensors")
    save_file({name: np.zeros_like(values) for name, values in weights.items()}, folder / "shard.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(weights, "shard.safetensors")})
    )
    shutil.rmtree(tmp_path / "repository")
    subprocess.run(command(folder, tmp_path / "repository"), cwd=ROOT, check=True)
    after = built(tmp_path / "repository")
    assert after.pop("bert-cls/build.json") != before.pop("bert-cls/build.json")
    assert after == before


def test_weights_too_large_for_their_precision(tmp_path: Path) -> None:
    folder = copied("bert-cls", tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][5, 3] = 7e4
    save_file(weights, folder / "model.safetensors")
    options = ("--runtime", "onnxruntime", "--precision", "fp16")
    done = subprocess.run(
        command(folder, tmp_path / "repository", *options), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "of up to 7e+04, which float16 cannot hold: build it with --precision bf16 or fp32" in done.stderr
    subprocess.run(command(folder, tmp_path / "repository", *options[:2]), cwd=ROOT, check=True)


def built(repository: Path) -> dict[str, str]:
    return {str(path.relative_to(repository)): sha256(path) for path in repository.rglob("*") if path.is_file()}


def test_builds_of_one_family_wait_for_each_other(tmp_path: Path) -> None:
    """Two of different dimensions, started together, again and again: the family is always of one of them."""
    folder = copied("bert-cls", tmp_path)
    expected = []
    for i, dimensions in enumerate(("48", "24")):
        subprocess.run(command(folder, tmp_path / str(i), "--dimensions", dimensions), cwd=ROOT, check=True)
        expected.append(built(tmp_path / str(i)))
    assert expected[0] != expected[1]
    for _ in range(4):
        both = [
            subprocess.Popen(command(folder, tmp_path / "both", "--dimensions", dimensions), cwd=ROOT)
            for dimensions in ("48", "24")
        ]
        assert [process.wait() for process in both] == [0, 0]
        assert built(tmp_path / "both") in expected


def test_what_a_killed_build_left_is_cleaned(tmp_path: Path) -> None:
    """And the family of before is untouched."""
    folder, repository = copied("bert-cls", tmp_path), tmp_path / "repository"
    subprocess.run(command(folder, repository), cwd=ROOT, check=True)
    before = built(repository)
    process = subprocess.Popen(command(folder, repository, "--dimensions", "24"), cwd=ROOT)
    until(lambda: (repository / ".building").exists() or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = {name: value for name, value in built(repository).items() if not name.startswith(".building")}
    assert left == before
    subprocess.run(command(folder, repository, "--name", "other"), cwd=ROOT, check=True)
    assert not (repository / ".building").exists()


def test_a_build_with_nothing_to_do_cleans_too(tmp_path: Path) -> None:
    """A Triton that loads everything takes what a killed build left for a model, and ends."""
    folder, repository = copied("bert-cls", tmp_path), tmp_path / "repository"
    subprocess.run(command(folder, repository), cwd=ROOT, check=True)
    (repository / ".building" / "bert-cls").mkdir(parents=True)
    done = subprocess.run(command(folder, repository), cwd=ROOT, check=True, capture_output=True, text=True)
    assert "up to date" in done.stdout
    assert not (repository / ".building").exists()


def test_the_second_build_says_that_it_waits(tmp_path: Path) -> None:
    folder, repository = copied("bert-cls", tmp_path), tmp_path / "repository"
    repository.mkdir()
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(); input()"
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(repository)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert first.stdout is not None
    first.stdout.readline()
    second = subprocess.Popen(command(folder, repository), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert second.stdout is not None
    assert second.stdout.readline() == f"waiting for another build into {repository}\n"
    time.sleep(0.2)
    assert second.poll() is None
    first.communicate(b"\n")
    assert second.wait() == 0
    second.stdout.close()
