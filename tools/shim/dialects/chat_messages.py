"""Messages of OpenAI's API as the templates of models know them."""

from __future__ import annotations

import json
from typing import Any

from tools.shim.errors import bad_request

TEXT_ALONE = "this server's models write text only"


def reserved(options: dict[str, Any]) -> dict[str, Any]:
    """What a template takes besides; raises GatewayError 400 for what the call has a field of its own for."""
    if taken := {"messages", "tools", "documents", "add_generation_prompt"}.intersection(options):
        raise bad_request(f"chat_template_kwargs has {', '.join(sorted(taken))}, which cannot be set there")
    return options


def message(said: dict[str, Any], i: int) -> dict[str, Any]:
    """A message as templates know it: text is one string, and a tool's arguments are an object."""
    place = f"messages[{i}]"
    if not isinstance(said.get("role"), str):
        raise bad_request(f"{place}.role must be a string, such as 'user'")
    found = {key: value for key, value in said.items() if value is not None}
    content = said.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise bad_request(f"{place}.content has a part that is no text: {TEXT_ALONE}")
        found["content"] = "".join(str(part) for part in parts)
    elif content is None:
        if not found.get("tool_calls"):
            raise bad_request(f"{place}.content is missing: it is what the message says")
        found["content"] = ""
    elif not isinstance(content, str):
        raise bad_request(f"{place}.content must be a string or a list of parts of text")
    if "tool_calls" in found:
        found["tool_calls"] = called(found["tool_calls"], place)
    return found


def called(calls: Any, place: str) -> list[dict[str, Any]]:
    """Calls of tools, their arguments read."""
    try:
        return [
            {**call, "function": {**call["function"], "arguments": read_arguments(call["function"]["arguments"])}}
            for call in calls
        ]
    except (TypeError, KeyError, ValueError):
        raise bad_request(f"{place}.tool_calls must have functions with a name and arguments in JSON") from None


def read_arguments(arguments: Any) -> Any:
    """What a tool is given, which clients send as JSON in a string."""
    return json.loads(arguments) if isinstance(arguments, str) else arguments
