"""What the README shows is what the stack does."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from conftest import ROOT, Stack

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^\$ (curl .*)\n(.*)$", README, re.MULTILINE)
NUMBER = re.compile(r"-?\d+\.\d+")
CONVENTION = {"8101": "embed", "8102": "rerank", "8200": "http"}


@pytest.mark.parametrize(("command", "shown"), EXAMPLES)
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


def test_python_example(stack: Stack) -> None:
    (code,) = re.findall(r"```python\n(import numpy.*?)```", README, re.DOTALL)
    values: dict[str, object] = {}
    exec(code.replace("localhost:8201", f"127.0.0.1:{stack.ports['grpc']}"), values)
    assert (values["embeddings"] == stack.embed(["one text", "and another, of any length"])).all()


def test_clients_are_of_the_versions_that_are_tested() -> None:
    lock = (ROOT / "clients.lock").read_text()
    (table,) = re.findall(r"\| clients tested \|\n(.*?)\n\n", README, re.DOTALL)
    cells = [cell.partition("JavaScript: ") for cell in table.split("|")]
    python = re.findall(r"([a-z][a-z-]+) (\d[\d.]+)", " ".join(cell[0] for cell in cells))
    assert len(python) == 12
    assert all(f"{name}=={version} " in lock for name, version in python), python
    package = json.loads((ROOT / "tests" / "clients" / "npm" / "package.json").read_text())
    javascript = re.findall(r"([@a-z][@a-z/-]+) (\d[\d.]+)", " ".join(cell[2] for cell in cells))
    assert dict(javascript).items() <= package["dependencies"].items()
    # The others are what these are made for.
    assert package["dependencies"].keys() - dict(javascript) == {"@langchain/core", "chromadb", "cohere-ai-7"}


def test_commands_and_links_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for line in re.findall(r"`make ([a-z -]+)", README) for word in line.split()} <= targets
    assert re.findall(r"^make (\w+) +#", README, re.MULTILINE) == ["serve", "test"]
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / link).exists()


def test_every_promise_has_its_test() -> None:
    page = (ROOT / "tools" / "shim" / "PROMISES.md").read_text()
    named = re.findall(r"(tests/test_\w+\.py)::(\w+)", page)
    assert len(named) > 40
    assert [name for file, name in named if f"\ndef {name}(" not in (ROOT / file).read_text()] == []
    rows = [line for line in page.splitlines() if line.startswith("|") and not re.match(r"\|[-|]+$", line)]
    tables = [line for line in rows if line.endswith("| test |")]
    assert len(tables) == 3
    faults = (ROOT / "tests" / "test_faults.py").read_text()
    promised = {name for file, name in named if file == "tests/test_faults.py"}
    assert set(re.findall(r"^def (test_\w+)", faults, re.MULTILINE)) <= promised
