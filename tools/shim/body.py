"""Bodies as types: reads JSON into a dataclass or says what to change, and writes JSON Schema from the same type.

A body is a frozen dataclass; its annotations may be the types below, str, bool, int, Literal, lists, unions and
other such dataclasses. A field without a default is required; a static method `check` may refuse the raw object
with better words. An answer is a TypedDict.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

import orjson

from tools.shim.errors import bad_request, quoted, too_large

MAX_TEXTS = 2048
"""Texts in one call."""

VISIBLE = "holds more than white space"
POSITIVE = "is at least 1"
VECTOR = "float32 [D], as numpy has it"

Text = Annotated[str, VISIBLE]
"""A text of the caller."""

Positive = Annotated[int, POSITIVE]
Vector = Annotated[Any, VECTOR]

Body = TypeVar("Body")
Reader = Callable[[Any, str], Any]

JSON_TYPES: dict[Any, str] = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
UNIONS = (types.UnionType, Union)


def json_object(body: bytes | bytearray) -> dict[str, Any]:
    """The JSON object that `body` is; raises GatewayError 400 when it is something else."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise bad_request(f"the body must be a JSON object, not {_json_type(content)}")
    return content


def read(kind: type[Body], content: dict[str, Any]) -> Body:
    """`content` as a `kind`; raises GatewayError 400 or 413 with what to change."""
    reader: Reader = _reader(kind)  # type: ignore[arg-type]  # every class is hashable
    body: Body = reader(content, "")
    return body


def schema(kind: Any) -> dict[str, Any]:
    """JSON Schema of a body or an answer."""
    base, mark = _unmarked(kind)
    if mark == VECTOR:
        return {"type": "array", "items": {"type": "number"}}
    if mark == VISIBLE:
        return {"type": "string", "pattern": r"\S"}
    if mark == POSITIVE:
        return {"type": "integer", "minimum": 1}
    if base in JSON_TYPES:
        return {"type": JSON_TYPES[base]}
    origin, arguments = get_origin(base), get_args(base)
    if origin in UNIONS:
        return {"anyOf": [schema(choice) for choice in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": schema(arguments[0])}
    if origin is dict or base is Any:
        return {"type": "object"} if origin is dict else {}
    hints = get_type_hints(base, include_extras=True)
    content = {"type": "object", "properties": {name: schema(hint) for name, hint in hints.items()}}
    if is_typeddict(base):
        return content | {"required": sorted(base.__required_keys__)}
    return content | {"required": list(_required(base)), "additionalProperties": False}


@cache
def _reader(kind: Any) -> Reader:
    """What reads a value of `kind`, given where it stands in the body."""
    base, mark = _unmarked(kind)
    origin, arguments = get_origin(base), get_args(base)
    if origin in UNIONS:
        return _union_reader(arguments)
    if origin is Literal:
        return _literal_reader(arguments)
    if origin is list:
        return _list_reader(arguments[0])
    if base not in JSON_TYPES:
        return _object_reader(base)

    def scalar(value: Any, where: str) -> Any:
        if type(value) is not base:
            raise bad_request(f"{where} must be {_words(base)}, not {_json_type(value)}")
        if mark == VISIBLE and (not value or value.isspace()):
            raise bad_request(f"{where} is empty: every text needs at least one visible character")
        if mark == POSITIVE and value < 1:
            raise bad_request(f"{where} must be at least 1, not {value}")
        return value

    return scalar


def _union_reader(choices: tuple[Any, ...]) -> Reader:
    readers = [(_python_type(choice), _reader(choice)) for choice in choices]

    def union(value: Any, where: str) -> Any:
        for python_type, reader in readers:
            if type(value) is python_type:
                return reader(value, where)
        raise bad_request(f"{where} must be {' or '.join(map(_words, choices))}, not {_json_type(value)}")

    return union


def _literal_reader(choices: tuple[Any, ...]) -> Reader:
    def literal(value: Any, where: str) -> Any:
        if value not in choices:
            raise bad_request(f"{where} must be one of {', '.join(map(repr, choices))}")
        return value

    return literal


def _list_reader(item: Any) -> Reader:
    reader = _reader(item)

    def items(value: Any, where: str) -> Any:
        if type(value) is not list:
            raise bad_request(f"{where} must be {_words(list[item])}, not {_json_type(value)}")
        if not value:
            raise bad_request(f"{where} is empty: send at least one text")
        if len(value) > MAX_TEXTS:
            raise too_large(f"{where} holds {len(value)} texts: send at most {MAX_TEXTS} a call")
        return [reader(one, f"{where}[{i}]") for i, one in enumerate(value)]

    return items


def _object_reader(kind: Any) -> Reader:
    hints = get_type_hints(kind, include_extras=True)
    readers = {name: _reader(hint) for name, hint in hints.items()}
    required = _required(kind)
    check: Callable[[dict[str, Any]], None] = getattr(kind, "check", lambda _: None)

    def fields_of(value: Any, where: str) -> Any:
        if type(value) is not dict:
            raise bad_request(f"{where} must be an object, not {_json_type(value)}")
        check(value)
        path = f"{where}." if where else ""
        for name in required:
            if name not in value:
                raise bad_request(f"the field {path + name!r} is missing")
        if unknown := value.keys() - readers.keys():
            known = ", ".join(readers)
            raise bad_request(f"unknown field {quoted(path + min(unknown))}: this route takes {known}")
        return kind(**{name: readers[name](one, path + name) for name, one in value.items()})

    return fields_of


def _required(kind: Any) -> tuple[str, ...]:
    return tuple(one.name for one in fields(kind) if one.default is MISSING)


def _unmarked(kind: Any) -> tuple[Any, str]:
    return (kind.__origin__, kind.__metadata__[0]) if get_origin(kind) is Annotated else (kind, "")


def _python_type(kind: Any) -> Any:
    """The type of the values that JSON gives for `kind`."""
    base, _ = _unmarked(kind)
    if get_origin(base) is Literal:
        return str
    return base if base in JSON_TYPES else get_origin(base) or dict


def _words(kind: Any) -> str:
    base, _ = _unmarked(kind)
    if get_origin(base) is list:
        item, _ = _unmarked(get_args(base)[0])
        return "a list of strings" if item is str else "a list"
    if get_origin(base) is Literal:
        return f"one of {', '.join(map(repr, get_args(base)))}"
    words = {str: "a string", bool: "a boolean", int: "an integer", type(None): "null"}
    return words.get(base, "an object")


def _json_type(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case dict():
            return "an object"
    return "a string"
