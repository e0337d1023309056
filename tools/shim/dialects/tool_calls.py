"""Calls of tools in a model's text: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

The templates of Hermes, Qwen2.5 and Qwen3 teach this form. What is no such call stays text.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """One call."""

    name: str
    arguments: str
    """A JSON object."""

    def content(self) -> dict[str, Any]:
        """As OpenAI's messages have it, under an id of its own."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


class ToolCalls:
    """Takes the calls out of a text that comes in pieces; white space around them is no text."""

    def __init__(self, most: int | None = None) -> None:
        """Of more than `most` calls the others are left out."""
        self.most, self.count = most, 0
        """Calls so far."""
        self._text = ""
        """Text that has come and is not given yet."""
        self._is_behind = False
        """Whether nothing but white space has come behind a call."""
        self._seen = 0
        """Place in the text up to which no call ends."""

    def take(self, piece: str) -> list[str | ToolCall]:
        """What a piece makes whole: texts and calls, in their order."""
        self._text += piece
        found: list[str | ToolCall] = []
        while part := self._next():
            found.append(part)
        return self._within(found)

    def end(self) -> list[str | ToolCall]:
        """What is left: a call without its last mark, or text."""
        rest, body = self._text, self._text.lstrip()
        self._text = ""
        call = read_call(body.removeprefix(BEGIN)) if body.startswith(BEGIN) else None
        if self._is_behind:
            rest = body
        return self._within([call or rest] if call or rest else [])

    def _within(self, parts: list[str | ToolCall]) -> list[str | ToolCall]:
        """Counts calls, and leaves out those that are too many."""
        found: list[str | ToolCall] = []
        for part in parts:
            if isinstance(part, str) or self.most is None or self.count < self.most:
                self.count += isinstance(part, ToolCall)
                found.append(part)
        return found

    def _next(self) -> str | ToolCall | None:
        """The next text or call that is whole, or None."""
        if self._is_behind:
            self._text = self._text.lstrip()
            self._is_behind = not self._text
        body = self._text.lstrip()
        if not body.startswith(BEGIN):
            return self._plain()
        start = len(self._text) - len(body) + len(BEGIN)
        while (end := self._text.find(END, max(start, self._seen))) >= 0:
            self._seen = end + len(END)
            body = self._text[start:end]
            call = read_call(body)
            if call is None and ends_in_string(body):
                continue
            text, self._text, self._seen = self._text[: self._seen], self._text[self._seen :], 0
            self._is_behind = call is not None
            return call or text
        return None

    def _plain(self) -> str | None:
        """Text up to a call, or to what may become one."""
        end = self._text.find(BEGIN)
        if end < 0:
            begun = (n for n in range(len(BEGIN) - 1, 0, -1) if self._text.endswith(BEGIN[:n]))
            end = len(self._text) - next(begun, 0)
        piece = self._text[:end].rstrip()
        self._text = self._text[len(piece) :]
        return piece or None


def read_call(body: str) -> ToolCall | None:
    """The call that stands between two marks; None for anything else."""
    try:
        said = json.loads(body, strict=False)
        if not isinstance(said["name"], str) or not isinstance(said["arguments"], dict):
            return None
        arguments = json.dumps(said["arguments"], ensure_ascii=False, allow_nan=False)
        (said["name"] + arguments).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return ToolCall(said["name"], arguments)


def ends_in_string(body: str) -> bool:
    """Whether it breaks off in a string of JSON, which may hold the mark of an end."""
    try:
        json.loads(body, strict=False)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except RecursionError:
        pass
    return False
