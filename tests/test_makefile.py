"""The Makefile, and what git leaves out of what it makes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

LOCK = f"nothing-of-the-kind==1.0 --hash=sha256:{'0' * 64}\n"


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", f"PYTHON={sys.executable}", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of a checkout as an installation needs, and no wheels."""
    for name in ("Makefile", "tools/__init__.py", "tools/preflight.py", "build/__init__.py", "build/gpu.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "wheels").mkdir()
    return tmp_path


def test_an_installation_is_a_line_and_its_errors_are_shown(checkout: Path) -> None:
    lock = checkout / "serve.lock"
    lock.write_text(LOCK)
    failed = make(checkout, "setup", "WHEELS=wheels")
    assert failed.returncode != 0
    assert "No matching distribution found for nothing-of-the-kind==1.0" in failed.stderr
    assert not (checkout / ".venv" / "serve.lock").exists()
    lock.write_text("")
    done = make(checkout, "setup", "WHEELS=wheels")
    assert (done.returncode, done.stdout) == (0, "installing serve.lock into .venv\n")
    assert (checkout / ".venv" / "serve.lock").exists()
    assert make(checkout, "setup").stdout == "make: Nothing to be done for 'setup'.\n"


def test_convert_wants_a_document_before_anything_is_installed(checkout: Path) -> None:
    done = make(checkout, "convert")
    assert done.returncode != 0
    assert "make convert needs a document: make convert FILE=scan.pdf" in done.stderr
    assert not list(checkout.glob(".venv*"))


def test_a_quick_benchmark_leaves_the_pages() -> None:
    def report(*words: str) -> bool:
        return "tools.bench.report" in make(ROOT, "--dry-run", "bench", *words).stdout

    assert report()
    assert not report("ARGS=--quick")


def test_git_has_the_default_familys_configurations_alone() -> None:
    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)

    assert git("check-ignore", "model_repository/minilm-128/config.pbtxt").returncode == 0
    tracked = git("ls-files", "model_repository").stdout
    assert tracked
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard", "model_repository").stdout == ""
