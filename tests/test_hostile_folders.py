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

import pytest
from conftest import ROOT, TINY
from containers import until
from test_accounts import copied

from build.files import sha256


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
    """An index of weights that names such a file."""
    return lambda folder: (
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"norm.weight": shard}})
        )
        and None
    )


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
    "an index of nothing": (text("model.safetensors.index.json", "{}"), "has no weight_map"),
    "an index that is a list": (
        text("model.safetensors.index.json", '{"weight_map": []}'),
        "must be a JSON object",
    ),
    "a shard that is a number": (
        text("model.safetensors.index.json", '{"weight_map": {"a": 3}}'),
        "must be a text",
    ),
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
