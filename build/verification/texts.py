"""Real text at no download: the docstrings of Python's standard library."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterable
from functools import cache
from pathlib import Path


@cache
def docstrings() -> list[str]:
    """Distinct docstrings with their natural lengths, the same on every call, in random order."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found[(ast.get_docstring(node) or "").strip()] = None
    return shuffled(text for text in found if text)


def shuffled(texts: Iterable[str]) -> list[str]:
    """The texts in a random order, the same on every call."""
    shuffled = list(texts)
    random.Random(0).shuffle(shuffled)
    return shuffled
