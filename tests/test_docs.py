"""What the pages show is what the stack does, and their links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Stack

from tools import docs

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
DEPLOY = ROOT / "tools" / "deploy"
CATALOG = ROOT / "build" / "catalog" / "README.md"
PAGES = {path: path.read_text() for path in (README, ROOT / "CONTRIBUTING.md", CATALOG, *DOCS)}
CLIENTS = PAGES[ROOT / "docs" / "clients.md"]
EXAMPLES = {
    command: answer
    for text in PAGES.values()
    for command, answer in re.findall(r"^\$ (curl .*)\n(.*)$", text, re.MULTILINE)
}
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NUMBER = re.compile(r"-?\d+\.\d+")
CONVENTION = {"8101": "embed", "8102": "rerank", "8200": "http"}


@pytest.mark.parametrize(("command", "shown"), EXAMPLES.items())
def test_examples_give_what_is_shown(stack: Stack, command: str, shown: str) -> None:
    """To the third digit, for CPUs that compute in another precision."""
    for port, name in CONVENTION.items():
        command = command.replace(f"localhost:{port}", f"127.0.0.1:{stack.ports[name]}")
    output = subprocess.check_output(command, shell=True, text=True)
    expected = [float(number) for number in NUMBER.findall(shown)]
    numbers = [float(number) for number in NUMBER.findall(output)]
    if shown.endswith("..."):
        shown, numbers = shown.removesuffix("..."), numbers[: len(expected)]
        output = ",".join(output.split(",")[: len(expected)]) + ","
    assert NUMBER.sub("#", output) == NUMBER.sub("#", shown)
    assert numbers == pytest.approx(expected, abs=5e-3)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5
    assert sum(f"$ {command}" in PAGES[README] for command in EXAMPLES) == 2


def test_python_example(stack: Stack) -> None:
    (code,) = re.findall(r"```python\n(import numpy.*?)```", CLIENTS, re.DOTALL)
    values: dict[str, object] = {}
    exec(code.replace("localhost:8201", f"127.0.0.1:{stack.ports['grpc']}"), values)
    assert (values["embeddings"] == stack.embed(["one text", "and another, of any length"])).all()


CLIENT_EXAMPLES = re.findall(
    r"^```python\n((?:import|from) (openai|langchain_openai|cohere)\b.*?)^```$",
    PAGES[README] + CLIENTS,
    re.MULTILINE | re.DOTALL,
)


def test_every_client_has_its_example() -> None:
    assert [package for _, package in CLIENT_EXAMPLES] == ["openai", "langchain_openai", "cohere"]


@pytest.mark.parametrize(("code", "package"), CLIENT_EXAMPLES, ids=[package for _, package in CLIENT_EXAMPLES])
def test_examples_of_clients(stack: Stack, code: str, package: str, tmp_path: Path) -> None:
    """They give what the gateway's own dialect does."""
    if not PYTHON.exists():
        pytest.skip("`make .venv-clients/clients.lock` installs the clients")
    code = code.replace("localhost:8101", f"127.0.0.1:{stack.ports['embed']}")
    shown = "[best.index, best.relevance_score]" if package == "cohere" else "vectors"
    output = subprocess.check_output(
        [PYTHON, "-c", f"{code}\nimport json\nprint(json.dumps({shown}))"],
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )
    if package == "cohere":
        documents = ["The bank raised its rates.", "Photosynthesis turns light into sugar."]
        scores = stack.rerank("How do plants make sugar?", documents)["scores"]
        assert json.loads(output) == [1, pytest.approx(max(scores), rel=1e-6)]
    else:
        np.testing.assert_allclose(json.loads(output), stack.embed(["a text", "and another"]), rtol=1e-6)


def test_clients_are_of_the_versions_that_are_tested() -> None:
    lock = (ROOT / "clients.lock").read_text()
    (table,) = re.findall(r"\| clients tested \|\n(.*?)\n\n", CLIENTS, re.DOTALL)
    cells = [cell.partition("JavaScript: ") for cell in table.split("|")]
    python = re.findall(r"([a-z][a-z-]+) (\d[\d.]+)", " ".join(cell[0] for cell in cells))
    assert len(python) == 12
    assert all(f"{name}=={version} " in lock for name, version in python), python
    package = json.loads((ROOT / "tests" / "clients" / "npm" / "package.json").read_text())
    javascript = re.findall(r"([@a-z][@a-z/-]+) (\d[\d.]+)", " ".join(cell[2] for cell in cells))
    assert dict(javascript).items() <= package["dependencies"].items()
    # The others are what these are made for.
    assert package["dependencies"].keys() - dict(javascript) == {"@langchain/core", "chromadb", "cohere-ai-7"}


def page(path: Path) -> str:
    """What a parametrized test is called."""
    return path.stem


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_links_lead_somewhere(path: Path) -> None:
    """To a file of the checkout, and to a heading where they name one."""
    links = [link for link in LINK.findall(FENCE.sub("", PAGES[path])) if not re.match(r"https?:", link)]
    for link in links:
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def anchors(text: str) -> set[str]:
    """Those that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


OTHERS = {"--help", "--no-normalise", "--from-file", "--model-repository", "--model-control-mode", "--load-model"}
OTHERS |= {"--gpus", "--shm-size", "--remove-destination"}
"""Options of argparse itself, kubectl, tritonserver, Docker and cp."""


@pytest.mark.parametrize("path", [path for path in PAGES if path.stem != "profiling"], ids=page)
def test_options_and_settings_exist(path: Path) -> None:
    """Those of the commands, and of the environment; the page of profiling is of other people's commands."""
    sources = [file.read_text() for folder in ("build", "tools") for file in sorted((ROOT / folder).rglob("*.py"))]
    settings = "\n".join([*sources, (ROOT / "Makefile").read_text(), (DEPLOY / "compose.yaml").read_text()])
    options = set(re.findall(r'"(--[a-z-]+)"', "\n".join(sources)))
    assert set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", PAGES[path])) <= options | OTHERS
    variables = re.findall(r"`([A-Z]+_[A-Z_]+)[`=]", PAGES[path])
    assert [name for name in variables if name not in settings] == []


def test_every_page_is_reached_from_the_front() -> None:
    links = set(LINK.findall(PAGES[README]))
    assert {str(path.relative_to(ROOT)) for path in (*DOCS, ROOT / "CONTRIBUTING.md")} <= links


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_commands_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z -]+)", PAGES[path], re.MULTILINE)
    assert {word for line in named for word in line.split()} <= targets
    modules = set(re.findall(r"python3? -m ((?:build|tools)\.[a-z_.]+)", PAGES[path]))
    assert [name for name in modules if importlib.util.find_spec(name.rstrip(".")) is None] == []


def test_the_site_has_every_page() -> None:
    """`make docs` builds it, which checks its links by the generator's own rules."""
    nav = re.findall(r'"([^"]+\.md)"', (ROOT / "docs" / "zensical.toml").read_text())
    assert {ROOT / path if path != docs.FRONT else README for path in nav} == {*docs.pages()} == {*PAGES}
    assert len(nav) == len(PAGES)


def test_the_front_page_has_two_commands() -> None:
    assert re.findall(r"^make (\w+) +#", PAGES[README], re.MULTILINE) == ["serve", "test"]


def test_every_promise_has_its_test() -> None:
    text = PAGES[ROOT / "docs" / "promises.md"]
    named = re.findall(r"(tests/test_\w+\.py)::(\w+)", text)
    assert len(named) > 40
    assert [name for file, name in named if f"\ndef {name}(" not in (ROOT / file).read_text()] == []
    rows = [line for line in text.splitlines() if line.startswith("|") and not re.match(r"\|[-|]+$", line)]
    tables = [line for line in rows if line.endswith("| test |")]
    assert len(tables) == 3
    faults = (ROOT / "tests" / "test_faults.py").read_text()
    promised = {name for file, name in named if file == "tests/test_faults.py"}
    assert set(re.findall(r"^def (test_\w+)", faults, re.MULTILINE)) <= promised
