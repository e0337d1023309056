"""Messages become a prompt by the checkpoint's own template, as transformers' `apply_chat_template` makes one.

A template is a program in Jinja that came with the weights, so it runs in Jinja's sandbox, which lets it reach
nothing but the messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


def sandbox() -> ImmutableSandboxedEnvironment:
    """Where templates run, with what transformers gives to each but the time, which no build may write down."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _as_json
    environment.globals["raise_exception"] = _refuse
    return environment


class TemplateFailureError(Exception):
    """A template does not take what it is given; the message says what it said."""


class ChatTemplate:
    """One template, with the special tokens that it may name."""

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        """Raises TemplateFailureError for a text that is no template."""
        environment = sandbox()
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise TemplateFailureError(f"the chat template cannot be read: {error}") from None

    def render(self, chat: Mapping[str, Any]) -> str:
        """The prompt for `messages`, `tools` and what else a chat has, ready for an answer.

        Raises TemplateFailureError where the template refuses it.
        """
        given = {"tools": None, "documents": None, "add_generation_prompt": True, **self._special_tokens, **chat}
        try:
            return str(self._template.render(given))
        except Exception as error:  # a template may fail in any way that Python can
            raise TemplateFailureError(
                f"the model's chat template does not take these messages: {error}"
            ) from None


def _as_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: letters as they are, nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)
