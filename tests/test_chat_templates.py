"""Rerankers that sentence-transformers asks in the words of a chat's template, of a language model's logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REFERENCE, TINY, Stack, rows

from build import make
from build.errors import BuildError
from build.rendering.models import models_of
from build.sources.checkpoint import Checkpoint
from build.sources.obtain import describe
from build.target import Target

PAIRS: list[list[str]] = json.loads((TINY / "pairs.json").read_text())
QUERIES, PASSAGES = [query for query, _ in PAIRS], [passage for _, passage in PAIRS]
CHATS: dict[str, dict[str, str]] = json.loads((REFERENCE / "chats.json").read_text())
EXPECTED = np.load(REFERENCE / "chats.npz")


def checkpoint(name: str, folder: Path) -> Path:
    """The tiny reranker with the files that sentence-transformers saved."""
    folder = shutil.copytree(TINY / "qwen3-reranker", folder / name, ignore=shutil.ignore_patterns("expected.*"))
    for path, content in CHATS[name].items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(content)
    return folder


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("chats")
    for name in CHATS:
        assert make.main([str(checkpoint(name, folder)), "--repository", str(folder / "repository")]) == 0
    options = ["--repository", str(folder / "repository"), "--models", *CHATS]
    stack = Stack(folder / "work", options, {"ENCODER_PRECISION": "fp32"}).start()
    yield stack
    assert stack.stop() == 0


@pytest.mark.parametrize("name", CHATS)
def test_scores_and_tokens_are_the_references(stack: Stack, name: str) -> None:
    """Past the window too, where the words behind a passage are put back over its last tokens."""
    counts = EXPECTED[f"{name}/token_counts"]
    assert counts.max() == 192
    ids = stack.infer(f"{name}-tokenizer", query=QUERIES, passage=PASSAGES)["input_ids"]
    assert [row[row >= 0].tolist() for row in ids] == rows(EXPECTED[f"{name}/token_ids"], counts)
    answer = stack.infer(name, query=QUERIES, passage=PASSAGES)
    np.testing.assert_allclose(answer["logit"][:, 0], EXPECTED[name], atol=1e-4)
    np.testing.assert_allclose(answer["score"][:, 0], 1 / (1 + np.exp(-EXPECTED[name])), atol=1e-4)
    assert (answer["token_count"][:, 0] == counts).all()


@pytest.mark.parametrize("name", CHATS)
def test_an_instruction_is_the_references_prompt(stack: Stack, name: str) -> None:
    instruction = ["Find the answer?"] * len(PAIRS)
    answer = stack.infer(name, query=QUERIES, passage=PASSAGES, instruction=instruction)
    np.testing.assert_allclose(answer["logit"][:, 0], EXPECTED[f"{name}/instructed"], atol=1e-4)


Change = Callable[[str], str]
REFUSED: dict[str, tuple[str, str, Change, str]] = {
    "a passage is changed": (
        "told",
        "chat_template.jinja",
        lambda text: text.replace(
            "document: {{ message.content[0].text", "document: {{ message.content[0].text|trim"
        ),
        r"changes a passage such as ' .n two  words.n.n'",
    ),
    "a passage is left out": (
        "told",
        "chat_template.jinja",
        lambda text: text.replace("document: {{ message.content[0].text }}", ""),
        "leaves query or passage out",
    ),
    "the roles of a chat": (
        "asked",
        "chat_template.jinja",
        lambda _: "{{ messages[0].role }}{{ raise_exception('no user') }}",
        "cannot be written for a query and a passage: no user",
    ),
    "no template": (
        "asked",
        "chat_template.jinja",
        lambda _: "{% if %}",
        "is no template of Jinja that is read here",
    ),
    "an attribute of Python": (
        "asked",
        "chat_template.jinja",
        lambda _: "{{ messages.__class__.__mro__ }}",
        "cannot be written for a query and a passage: .*unsafe",
    ),
    "another argument": (
        "told",
        "sentence_bert_config.json",
        lambda text: text.replace('"add_generation_prompt": true', '"max_length": 8'),
        "has processing_kwargs.chat_template.max_length",
    ),
    "a template by another's name": (
        "told",
        "sentence_bert_config.json",
        lambda text: text.replace('"add_generation_prompt": true', '"chat_template": "../chat_template"'),
        r"is asked in the words of '\.\./chat_template', but has no chat_template\.jinja",
    ),
    "arguments of the tokenizer": (
        "told",
        "sentence_bert_config.json",
        lambda text: text.replace('"processing_kwargs": {', '"processing_kwargs": {"text": {"max_length": 8},'),
        "has processing_kwargs.text = .*, which is not read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_templates_are_refused_by_name(case: str, tmp_path: Path) -> None:
    name, path, change, words = REFUSED[case]
    folder = checkpoint(name, tmp_path)
    file = folder / path
    file.write_text(change(file.read_text()))
    with pytest.raises(BuildError, match=words):
        models_of(describe(folder, name), Checkpoint(folder), Target())


def test_a_build_says_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make.main([str(TINY / "qwen3-vl-reranker"), "--repository", str(tmp_path)]) == 0
    said = "qwen3-vl-reranker: its half that sees pictures and videos is left out; it reads texts\n"
    assert said in capsys.readouterr().out
    record = json.loads((tmp_path / "qwen3-vl-reranker" / "build.json").read_text())
    assert record["facts"]["left_out"] == "pictures and videos"


def test_a_template_is_asked_for(tmp_path: Path) -> None:
    folder = checkpoint("asked", tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(BuildError, match=r"has no chat_template\.jinja, but a modality_config"):
        models_of(describe(folder, "asked"), Checkpoint(folder), Target())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = CHATS["asked"]["chat_template.jinja"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    parameters: Any = models_of(describe(folder, "asked"), Checkpoint(folder), Target())[1].config.parameters
    assert json.loads(parameters["template"].string_value)["instruction"].startswith("Given a web search")
