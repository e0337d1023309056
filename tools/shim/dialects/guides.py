"""Calls of tools that a model must make, in OpenAI's words, as the guide that its text follows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tools.shim.errors import bad_request
from tools.shim.generation import Guide, as_json


def function_of(tool: dict[str, Any], place: str) -> dict[str, Any]:
    """The function that a tool is; raises GatewayError 400 for another one."""
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise bad_request(f"{place} must have the type 'function' and a function")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise bad_request(f"{place}.function.name must be a string of one character at least")
    if not isinstance(function.get("parameters") or {}, dict):
        raise bad_request(f"{place}.function.parameters must be a JSON Schema")
    return function


def calls_guide(functions: Sequence[dict[str, Any]], choice: str | dict[str, Any], is_one: bool) -> Guide | None:
    """What an answer looks like that must call functions; None where the model is free to.

    Raises GatewayError 400 for a `choice` of a function that is not there.
    """
    if choice == "auto":
        return None
    if isinstance(choice, dict):
        functions = [one for one in functions if choice == {"type": "function", "function": {"name": one["name"]}}]
        is_one = True
    if not functions:
        raise bad_request(
            "tool_choice names no function of tools: name one, as {'type': 'function', 'function': ...}"
        )
    tags = [tag(function) for function in functions]
    shape = {"type": "tags_with_separator", "tags": tags, "separator": "", "at_least_one": True}
    return "structural_tag", as_json({"type": "structural_tag", "format": shape | {"stop_after_first": is_one}})


def tag(function: dict[str, Any]) -> dict[str, Any]:
    """A call of a function, as the templates of Hermes and Qwen teach it."""
    schema = function.get("parameters") or {"type": "object"}
    return {
        "type": "tag",
        "begin": f'<tool_call>{{"name": {json.dumps(function["name"])}, "arguments": ',
        "content": {"type": "json_schema", "json_schema": schema},
        "end": "}</tool_call>",
    }
