"""What set-up and builds make of a machine's GPUs, told by a stand-in for nvidia-smi on PATH."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, Stack

from build import catalog, gpu, make
from build.config import read_config, runtime_of

H200 = "0, GPU-11, NVIDIA H200, 9.0, 580.95.05, 143771, 143167"
SMALL = "0, GPU-22, NVIDIA GeForce RTX 3060, 8.6, 595.10, 12288, 11264"
TURING = "1, GPU-33, NVIDIA GeForce RTX 2080, 7.5, 580.95.05, 8192, 8000"
OLD_DRIVER = "0, GPU-44, NVIDIA L4, 8.9, 550.54, 23034, 22500"
SPARK = "0, GPU-55, NVIDIA GB10, 12.1, 580.95.05, [N/A], [N/A]"

Smi = Callable[..., None]


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smi:
    """Puts an nvidia-smi before all others that tells of these cards, or of no driver where there are none."""

    def put(*cards: str) -> None:
        write_smi(tmp_path / "bin", *cards)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CC", "cc")
    return put


def write_smi(folder: Path, *cards: str) -> None:
    folder.mkdir(exist_ok=True)
    lines = "".join(f"echo '{card}'\n" for card in cards) or "echo 'No devices were found'\nexit 6\n"
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
    (folder / "nvidia-smi").chmod(0o755)


def locks() -> list[str]:
    """The locks that `make setup` would install from, were nothing installed."""
    command = ["make", "-n", "-W", "serve.lock", "-W", "gpu.lock", f"PYTHON={sys.executable}", "setup"]
    return re.findall(r"-r (\w+\.lock)", subprocess.check_output(command, cwd=ROOT, text=True))


def notes() -> str:
    """What the preflight says on stderr."""
    command = [sys.executable, "-m", "tools.preflight"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stderr


needs_headers = pytest.mark.skipif(
    not Path(sysconfig.get_path("include"), "Python.h").exists(), reason="there is no Python.h"
)


@needs_headers
@pytest.mark.parametrize("cards", [(H200,), (SMALL, SMALL.replace("22", "23")), (SPARK,)])
def test_a_card_that_torch_can_use(smi: Smi, cards: tuple[str, ...]) -> None:
    smi(*cards)
    assert locks() == ["gpu.lock"]
    assert notes() == ""


@pytest.mark.parametrize(
    ("cards", "words"),
    [
        ((), ""),
        ((OLD_DRIVER,), "the NVIDIA driver is 550.54, and torch's CUDA 13.0 needs 580 or newer: update it"),
        ((H200, TURING), "NVIDIA GeForce RTX 2080 has compute capability 7.5, and torch's attention needs 8.0"),
    ],
)
def test_nothing_changes_where_torch_can_use_no_card(smi: Smi, cards: tuple[str, ...], words: str) -> None:
    smi(*cards)
    assert locks() == ["serve.lock"]
    assert words in (said := notes())
    assert said.startswith("note: the GPU is not used: ") == bool(words)


@needs_headers
@pytest.mark.parametrize("visible", ["0", "GPU-11"])
def test_cards_that_are_not_visible_do_not_count(smi: Smi, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    smi(H200, TURING)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [card.name for card in gpu.cards()] == ["NVIDIA H200"]
    assert locks() == ["gpu.lock"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert locks() == ["serve.lock"]


def test_what_torch_compiles_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_smi(tmp_path, H200)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "with gcc or clang, and there is neither" in next(gpu.problems(gpu.cards()))
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert "with Python.h, which is missing: apt install python3" in next(gpu.problems(gpu.cards()))


def test_a_model_that_no_card_has_memory_for(smi: Smi, capsys: pytest.CaptureFixture[str]) -> None:
    smi(SMALL)
    assert make.own_runtime(catalog.load("qwen3-embedding-8b"), None) == "openvino"
    said = capsys.readouterr().out
    assert "it needs 17.1 GB of memory on it, and 11.8 GB are free; " in said
    assert "qwen3-embedding-4b, qwen3-reranker-0.6b" in said
    assert "8b" not in said.partition("free; ")[2]
    make.own_runtime(catalog.load("qwen3-embedding-4b"), "fp32")
    assert "it needs 18.1 GB" in capsys.readouterr().out
    smi(SPARK)
    make.own_runtime(catalog.load("qwen3-embedding-8b"), None)
    assert "of memory" not in capsys.readouterr().out


def test_auto_without_torch(tmp_path: Path, smi: Smi, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(TINY / "bert-cls"), "--runtime", "auto", "--repository", str(tmp_path / "repository")]
    smi()
    assert make.main(words) == 0
    assert "GPU" not in capsys.readouterr().out
    smi(OLD_DRIVER)
    assert make.main(words) == 0
    assert "bert-cls: built for the CPU, not the GPU: the NVIDIA driver" in capsys.readouterr().out
    assert runtime_of(read_config(tmp_path / "repository", "bert-cls-encoder")) == "openvino"


def test_a_family_of_torch_without_torch(tmp_path: Path) -> None:
    options = ["--repository", str(tmp_path / "repository")]
    assert make.main([str(TINY / "bert-cls"), "--runtime", "torch", *options]) == 0
    stack = Stack(tmp_path, [*options, "--models", "bert-cls"])
    stack.launch()
    assert stack.process.wait(60) == 1
    assert "bert-cls-encoder is built for torch, which is not installed here: build it with" in stack.errors()


def test_locks_agree() -> None:
    gpus, serve = (
        set(re.findall(r"^\S+==\S+", (ROOT / f"{name}.lock").read_text(), re.M)) for name in ("gpu", "serve")
    )
    assert serve < gpus
    (torch,) = re.findall(r"^torch==\S+", (ROOT / "tests" / "torch.txt").read_text(), re.M)
    assert torch in gpus
    assert "://" not in (ROOT / "gpu.lock").read_text()
    assert any(one.startswith(f"cuda-toolkit=={gpu.CUDA}.") for one in gpus)
