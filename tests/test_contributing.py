"""What CONTRIBUTING.md shows is there: its commands and its tolerances."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from test_graphs import COSINE, SCORE

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
CONSOLE = "\n".join(re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL))
PICKS = re.findall(r"^\.venv/bin/python -m pytest -x -q (.+)$", CONSOLE, re.MULTILINE)


def test_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", PAGE, re.MULTILINE))
    assert named == {"build", "docs", "lint", "lock", "test"} <= targets
    modules = set(re.findall(r"python -m ([a-z_.]+\.[a-z_.]+)", PAGE))
    assert modules == {"build.catalog", "build.verify", "tools.shim.openapi"}
    assert len(PICKS) == 7
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


@pytest.mark.parametrize("options", sorted(set(PICKS)))
def test_inner_loops_pick_tests(options: str) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *shlex.split(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tolerances_are_those_of_the_tests() -> None:
    (header,) = re.findall(r"^\| against the reference \|(.+)\|$", PAGE, re.MULTILINE)
    precisions = [word.strip() for word in header.split("|")]
    for row, bounds in (("lowest cosine", COSINE), ("largest difference", SCORE)):
        (cells,) = re.findall(rf"^\| {row}[^|]*\|(.+)\|$", PAGE, re.MULTILINE)
        assert dict(zip(precisions, map(float, cells.split("|")), strict=True)) == bounds
