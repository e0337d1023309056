"""The words that a checkpoint's chat template puts around a query and a passage.

A template is a program in Jinja, as transformers runs it: here at build, in Jinja's own sandbox, on texts that are
made up. What it writes has to be one format of the two texts and of an instruction, letter for letter, or the
build stops: what is served is that format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from build.errors import BuildError
from build.sources.checkpoint import CHAT_TEMPLATE, CHAT_TEMPLATES, Checkpoint
from build.sources.files import is_listed, own_file
from build.sources.settings import Settings
from build.sources.tokenization import NAMED
from build.steps.chat_template import sandbox

LARGEST = 1 << 20
"""Bytes of a template."""
MARKS = {"instruction": "\ue000instruct\ue001", "query": "\ue000ask\ue001", "passage": "\ue000read\ue001"}
"""What stands for a text until it is known where it goes."""
PROBES = ("a", " \n two  words\n\n", "{query} {{ passage }} {% raw %}", "<b>\"1\" & '2'</b>\\n", "e\u0301\t")
"""Texts that a template might change: it is asked for each of them in each place."""
FILLERS = ("0", "1 2 3 4")
"""Texts whose tokens end unlike, sentence-transformers' own: what follows both is what stands behind a text."""
TOKENIZED = frozenset({"padding", "truncation", "max_length", "return_tensors", "restore_suffix"})
"""Arguments that are not the template's."""


def read_chat_template(checkpoint: Checkpoint, message: Settings) -> dict[str, Any]:
    """The template as the tokenizer's step reads it, of the checkpoint's words for a `message`.

    `body` is the format of a row, `instructed` the one of a row with an instruction, `tail` the ids that a row
    which is cut ends with. Raises BuildError where there is no such format.
    """
    template = _Template(checkpoint, message)
    default = checkpoint.prompts.get("", "")
    tail = template.tail(default, checkpoint.tokenizer)
    instructed = template.body(None) if template.is_instructed else None
    if instructed is not None and template.tail(MARKS["instruction"], checkpoint.tokenizer) != tail:
        raise BuildError(f"{template.place} ends otherwise with an instruction than without, which is not written")
    if instructed is not None and default:
        return {"body": instructed, "instruction": default, "tail": tail}
    return {"body": template.body(default), "tail": tail} | ({"instructed": instructed} if instructed else {})


class _Template:
    """A checkpoint's template, and what is given to it besides two texts."""

    def __init__(self, checkpoint: Checkpoint, message: Settings) -> None:
        arguments = _arguments(checkpoint)
        self.place, source = _source(checkpoint, arguments.pop("chat_template", None))
        message.require("format", "flat", "structured")
        self._is_flat = message.word("format") == "flat"
        self._given: dict[str, Any] = {**checkpoint.named_tokens(NAMED), "tools": None, "documents": None}
        self._given |= {"add_generation_prompt": False, **arguments}
        try:
            self._template = sandbox().from_string(source)
        except TemplateError as error:
            raise BuildError(f"{self.place} is no template of Jinja that is read here: {error}") from None

    def body(self, instruction: str | None) -> str:
        """The format of a row, with an `instruction` in it if there is one; None leaves its place open."""
        marked = self._written(MARKS["instruction"] if instruction is None else instruction, *_texts(MARKS))
        found = marked.replace("{", "{{").replace("}", "}}")
        for name, mark in MARKS.items():
            found = found.replace(mark, f"{{{name}}}")
        if "{query}" not in found or "{passage}" not in found:
            raise BuildError(f"{self.place} leaves query or passage out: it is not one of a reranker")
        for name in MARKS if instruction is None else ("query", "passage"):
            for probe in PROBES:
                texts = dict.fromkeys(MARKS, "b") | {name: probe}
                said = texts["instruction"] if instruction is None else instruction
                if self._written(said, *_texts(texts)) != found.format(**texts):
                    raise BuildError(
                        f"{self.place} changes a {name} such as {probe!r}; one that puts it in as it is is written"
                    )
        return found

    @property
    def is_instructed(self) -> bool:
        """Whether an instruction is put in; one that is refused is not."""
        try:
            return MARKS["instruction"] in self._written(MARKS["instruction"], *_texts(MARKS))
        except BuildError:
            return False

    def tail(self, instruction: str, tokenizer: Tokenizer) -> list[int]:
        """The ids behind a row's last text."""
        first, second = (
            tokenizer.encode(self._written(instruction, filler, filler), add_special_tokens=False).ids
            for filler in FILLERS
        )
        count = 0
        while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
            count += 1
        # Two that are alike as far as they go say nothing, and the reference then puts nothing back.
        return first[len(first) - count :] if count < min(len(first), len(second)) else []

    def _written(self, instruction: str, query: str, passage: str) -> str:
        said = [("system", instruction)] if instruction else []
        said += [("query", query), ("document", passage)]
        messages = [
            {"role": role, "content": text if self._is_flat else [{"type": "text", "text": text}]}
            for role, text in said
        ]
        try:
            return str(self._template.render(messages=messages, **self._given))
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise BuildError(f"{self.place} cannot be written for a query and a passage: {error}") from None


def _texts(texts: Mapping[str, str]) -> tuple[str, str]:
    return texts["query"], texts["passage"]


def _source(checkpoint: Checkpoint, name: Any) -> tuple[str, str]:
    """Where the template of this name is, and the template; None is the one without, of a file before a key."""
    path = checkpoint.transformer / CHAT_TEMPLATE
    if name is not None:
        path = checkpoint.transformer / CHAT_TEMPLATES / f"{name}.jinja"
        if path.parent.name != CHAT_TEMPLATES or not is_listed(path):
            raise BuildError(f"{checkpoint.transformer} is asked in the words of {name!r}, but has no {path.name}")
    if is_listed(path):
        content = own_file(path, checkpoint.folder).read_bytes()
        if len(content) > LARGEST:
            raise BuildError(f"{path} has {len(content) >> 20} MB: no template is larger than {LARGEST >> 20} MB")
        try:
            return str(path), content.decode()
        except UnicodeDecodeError as error:
            raise BuildError(f"{path} is not valid UTF-8: {error.reason}") from None
    config = checkpoint.tokenizer_config
    if "chat_template" not in config:
        raise BuildError(
            f"{checkpoint.transformer} has no {CHAT_TEMPLATE}, but a modality_config by which pairs are read in "
            "the words of one"
        )
    return f"chat_template in {config.path}", config.word("chat_template")


def _arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    """What sentence-transformers is told to give to the template."""
    processing = checkpoint.window.inner("processing_kwargs") if checkpoint.window is not None else None
    chat = processing.inner("chat_template") if processing is not None else None
    if chat is None:
        return {}
    given = {name: chat.find(name) for name in chat}
    for name, value in given.items():
        if name in TOKENIZED or isinstance(value, list | dict):
            raise BuildError(f"{chat.path} has processing_kwargs.chat_template.{name}, which is not written")
    return given
