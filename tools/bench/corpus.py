"""Real text at no download: the docstrings of Python's standard library, with their natural lengths."""

from __future__ import annotations

import ast
import random
import sysconfig
from pathlib import Path


def docstrings(count: int) -> list[str]:
    """The same `count` distinct docstrings on every call, in random order; fewer if there are not so many."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found[(ast.get_docstring(node) or "").strip()] = None
    texts = [text for text in found if text]
    random.Random(0).shuffle(texts)
    return texts[:count]
