"""Modules import in one direction: each folder or file what the table allows it, and nothing else of ours."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# Folder or file -> what it may import; a folder's files also each other.
ALLOWED = {
    "build.errors": "",
    "build.gpu": "",
    "build.memory": "",
    "build.inspect": "",
    "build.config": "build.errors",
    "build.tasks": "",
    "build.runtimes": "build.tasks",
    "build.target": "build.errors build.runtimes",
    "build.catalog": "build.errors build.runtimes build.tasks",
    # Copied beside the models, where nothing of ours is installed.
    "build.steps": "",
    "build.sources": "build.catalog build.errors build.steps build.tasks",
    # The texts around a query are for the reference, too, which has no onnx.
    "build.graphs.templates": "",
    "build.graphs": "build.catalog build.errors build.graphs.templates build.sources build.target",
    "build.check": "build.config build.errors build.memory build.sources build.steps",
    "build.rendering": "build.catalog build.check build.config build.errors build.graphs build.runtimes "
    "build.sources build.steps build.target build.tasks",
    # Plans are compiled and checked where nothing is built.
    "build.plans": "build.config build.errors build.graphs build.runtimes build.sources",
    "build.make": "build.catalog build.config build.errors build.gpu build.rendering build.runtimes build.sources "
    "build.target build.tasks",
    # What is verified is served: the one place of the builder that knows where a stack listens.
    "build.verification.references": "build.errors build.graphs.templates",
    "build.verification": "build.errors build.tasks build.verification.references tools.direct",
    "build.verify": "build.catalog build.config build.errors build.verification build.verification.references "
    "tools.command",
    "tools.access": "",
    "tools.direct": "",
    "tools.option_types": "",
    "tools.command": "tools.access tools.option_types",
    "tools.ports": "tools.command",
    "tools.repository": "build.config build.errors tools.command",
    "tools.preflight": "build.gpu",
    "tools.alive": "tools.access tools.command tools.direct",
    "tools.check_plans": "build.config build.errors build.plans",
    "tools.tritonserver": "tools.access tools.check_plans tools.command",
    # The gateway is an image of its own, with what reads a model's configuration of the builder.
    "tools.shim": "build.config build.errors build.gpu build.memory build.tasks tools.access tools.command "
    "tools.direct tools.ports tools.repository",
    "tools.triton": "build.config build.errors build.gpu tools.access tools.command tools.ports tools.preflight "
    "tools.repository",
    "tools.serve": "build.catalog build.tasks tools.access tools.command tools.direct tools.ports tools.shim "
    "tools.triton",
    "tools.deploy": "build.gpu tools.command tools.direct",
    "tools.bench.gpu": "build.errors build.gpu build.graphs build.rendering build.runtimes build.sources "
    "build.steps build.verification build.verification.references tools.bench tools.command tools.direct",
    "tools.bench": "build.catalog build.graphs build.rendering build.runtimes build.sources build.verification "
    "tools.command tools.direct tools.triton",
    # Where it runs, nothing of the server's is installed.
    "tools.backfill": "tools.command tools.direct",
    "tools.documents": "tools.command tools.direct",
    "tools.search": "tools.backfill",
    "tools.docs": "tools.command",
    "tools.soak": "tools.bench tools.command tools.shim",
}


def entry(module: str) -> str | None:
    """The entry of the table that a module falls under."""
    return next((name for name in ALLOWED if f"{module}.".startswith(f"{name}.")), None)


def imports(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, wherever in it."""
    module = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*(module[: -node.level] if node.level else ()), *filter(None, [node.module])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        yield from (name for name in names if name.split(".")[0] in ("build", "tools"))


SOURCES = sorted(path for folder in ("build", "tools") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_what_the_table_allows(path: Path) -> None:
    own = entry(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if path.name == "__init__.py" and own is None:
        assert not list(imports(path))
        return
    assert own is not None, "the table has no entry for it"
    assert {entry(name) or name for name in imports(path)} <= {own, *ALLOWED[own].split()}


def test_the_table_has_one_direction() -> None:
    TopologicalSorter({own: names.split() for own, names in ALLOWED.items()}).prepare()  # CycleError


def test_no_files_import_each_other() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}
    of_name = {
        name: {found for whole in imports(path) for found in (whole, whole.rpartition(".")[0])} & modules.keys()
        for name, path in modules.items()
    }
    TopologicalSorter(of_name).prepare()  # CycleError


@pytest.mark.parametrize("graph", sorted(path.stem for path in (ROOT / "build" / "graphs").glob("*.py")))
def test_a_graph_loads_no_client_of_the_hub(graph: str) -> None:
    code = f"import sys, build.graphs.{graph}; sys.exit('huggingface_hub' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("word", ["is not healthy", "8101", "8102", "8103", "8200", "8201", "8202"])
def test_what_all_share_is_written_once(word: str) -> None:
    places = [path for path in SOURCES for line in path.read_text().splitlines() if word in line]
    assert places == [ROOT / "tools" / "command.py"]
