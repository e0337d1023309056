"""Bodies as types: reads JSON into a dataclass or says what to change, and writes JSON Schema from the same type.

A body is a frozen dataclass; its annotations may be the types below, str, bool, int, float, Literal, lists,
unions, dict, Any and other such dataclasses. A field without a default is required; one that has a default, or is
not known, may be null, which is as if it were not there. A field that takes one value only, or none, says why in
its annotation. A static method `check` may refuse the raw object with better words. An answer is a TypedDict.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

import orjson

from tools.shim.errors import MAX_ECHO, bad_request, cut, quoted, too_large

MAX_ITEMS = 2048
"""Items of a list in a body: texts, messages, tools."""

NOT_EMPTY = "holds a character"
VISIBLE = "holds more than white space"
POSITIVE = "is at least 1"
MAY_BE_EMPTY = "may have no items"
SURROGATE = re.compile("[\ud800-\udfff]")
VECTOR = "float32 [D], as numpy has it"

Text = Annotated[str, NOT_EMPTY]
"""A text to embed."""

Query = Annotated[str, VISIBLE]
"""What documents are ordered by. They themselves may be any string."""

Positive = Annotated[int, POSITIVE]
Vector = Annotated[Any, VECTOR]

Body = TypeVar("Body")


@dataclass(frozen=True, kw_only=True)
class Lenient:
    """A body of a dialect whose own servers pass over fields that they do not know."""

    ignored: tuple[str, ...] = ()
    """Their names."""


Reader = Callable[[Any, str], Any]

JSON_TYPES: dict[Any, str] = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
UNIONS = (types.UnionType, Union)


def json_object(body: bytes | bytearray) -> dict[str, Any]:
    """The JSON object that `body` is; raises GatewayError 400 when it is something else."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        place = _lone_surrogate(body) if "surrogate" in str(error) else ""
        raise bad_request(f"{place or 'the body'} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise bad_request(f"the body must be a JSON object, not {_json_type(content)}")
    return content


def _lone_surrogate(body: bytes | bytearray) -> str:
    """Where half of a surrogate pair stands alone, as in `texts[1]`; "" where that cannot be told."""
    try:
        places: list[tuple[str, Any]] = [("", json.loads(body))]
    except (ValueError, RecursionError):
        return ""
    while places:
        where, value = places.pop()
        if isinstance(value, dict):
            places += [(f"{where}.{name}".removeprefix("."), one) for name, one in value.items()]
        elif isinstance(value, list):
            places += [(f"{where}[{i}]", one) for i, one in enumerate(value)]
        elif isinstance(value, str) and SURROGATE.search(value):
            return cut(where, MAX_ECHO)
    return ""


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
    if mark == NOT_EMPTY:
        return {"type": "string", "minLength": 1}
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
    if is_typeddict(base):
        hints = get_type_hints(base, include_extras=True)
        properties = {name: schema(hint) for name, hint in hints.items()}
        return {"type": "object", "properties": properties, "required": sorted(base.__required_keys__)}
    required = _required(base)
    properties = {
        name: schema(hint) if name in required else _nullable(schema(hint)) for name, hint in _hints(base).items()
    }
    content = {"type": "object", "properties": properties, "required": list(required)}
    return content if issubclass(base, Lenient) else content | {"additionalProperties": {"type": "null"}}


def _nullable(content: dict[str, Any]) -> dict[str, Any]:
    """The schema `content`, or null."""
    if "anyOf" in content:
        null = {"type": "null"}
        return {"anyOf": [one for one in content["anyOf"] if one != null] + [null]}
    if "enum" in content:
        return {"enum": [*content["enum"], None]}
    kind = content.get("type")
    return content if kind in (None, "null") else content | {"type": [kind, "null"]}


@cache
def _reader(kind: Any) -> Reader:
    """What reads a value of `kind`, given where it stands in the body."""
    base, mark = _unmarked(kind)
    origin, arguments = get_origin(base), get_args(base)
    if origin in UNIONS:
        return _union_reader(arguments)
    if origin is Literal:
        return _literal_reader(arguments, mark)
    if origin is list:
        return _list_reader(arguments[0], mark == MAY_BE_EMPTY)
    if base is Any:
        return lambda value, _: value
    if origin is dict:
        return _dict_reader
    if base is type(None) and mark:
        return _refusal(mark)
    if base not in JSON_TYPES:
        return _object_reader(base)

    def scalar(value: Any, where: str) -> Any:
        if type(value) is not base:
            raise bad_request(f"{where} must be {_words(base)}, not {_json_type(value)}")
        if mark == NOT_EMPTY and not value:
            raise bad_request(f"{where} is empty: every text needs at least one character")
        if mark == VISIBLE and (not value or value.isspace()):
            raise bad_request(f"{where} is empty: it needs at least one visible character")
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


def _literal_reader(choices: tuple[Any, ...], reason: str) -> Reader:
    def literal(value: Any, where: str) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            why = f": {reason}" if reason else ""
            raise bad_request(f"{where} must be {_one_of(choices)}{why}")
        return value

    return literal


def _one_of(choices: tuple[Any, ...]) -> str:
    words = [str(choice).lower() if isinstance(choice, bool) else repr(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


def _refusal(reason: str) -> Reader:
    def refuse(_: Any, where: str) -> Any:
        raise bad_request(f"{where} cannot be used here: {reason}")

    return refuse


def _dict_reader(value: Any, where: str) -> Any:
    if type(value) is not dict:
        raise bad_request(f"{where} must be an object, not {_json_type(value)}")
    return value


def _list_reader(item: Any, may_be_empty: bool) -> Reader:
    reader = _reader(item)

    def items(value: Any, where: str) -> Any:
        if type(value) is not list:
            raise bad_request(f"{where} must be {_words(list[item])}, not {_json_type(value)}")
        if not value and not may_be_empty:
            raise bad_request(f"{where} is empty: send at least one item")
        if len(value) > MAX_ITEMS:
            raise too_large(f"{where} has {len(value)} items: send at most {MAX_ITEMS} in a call")
        return [reader(one, f"{where}[{i}]") for i, one in enumerate(value)]

    return items


def _object_reader(kind: Any) -> Reader:
    readers = {name: _reader(hint) for name, hint in _hints(kind).items()}
    required = _required(kind)
    is_lenient = issubclass(kind, Lenient)
    check: Callable[[dict[str, Any]], None] = getattr(kind, "check", lambda _: None)

    def fields_of(value: Any, where: str) -> Any:
        if type(value) is not dict:
            raise bad_request(f"{where} must be an object, not {_json_type(value)}")
        check(value)
        path = f"{where}." if where else ""
        sent = {name: one for name, one in value.items() if one is not None or name in required}
        unknown = sorted(sent.keys() - readers.keys())
        if unknown and not is_lenient:
            known = ", ".join(readers)
            raise bad_request(f"unknown field {quoted(path + unknown[0])}: this route takes {known}")
        body = {name: readers[name](one, path + name) for name, one in sent.items() if name in readers}
        for name in required:
            if name not in body:
                raise bad_request(f"the field {path + name!r} is missing")
        inner = [f"{name}.{one}" for name, part in body.items() for one in getattr(part, "ignored", ())]
        return kind(**body, ignored=(*unknown, *inner)) if is_lenient else kind(**body)

    return fields_of


def _hints(kind: Any) -> dict[str, Any]:
    """The fields of a body and their types."""
    hints = get_type_hints(kind, include_extras=True)
    return {one.name: hints[one.name] for one in fields(kind) if one.name != "ignored"}


def _required(kind: Any) -> tuple[str, ...]:
    return tuple(one.name for one in fields(kind) if one.default is MISSING)


def _unmarked(kind: Any) -> tuple[Any, str]:
    return (kind.__origin__, kind.__metadata__[0]) if get_origin(kind) is Annotated else (kind, "")


def _python_type(kind: Any) -> Any:
    """The type of the values that JSON gives for `kind`."""
    base, _ = _unmarked(kind)
    if get_origin(base) is Literal:
        return type(get_args(base)[0])
    return base if base in JSON_TYPES else get_origin(base) or dict


def _words(kind: Any) -> str:
    base, _ = _unmarked(kind)
    if get_origin(base) is list:
        item, _ = _unmarked(get_args(base)[0])
        is_text = item is str or str in [_unmarked(one)[0] for one in get_args(item)]
        return "a list of strings" if is_text else "a list"
    if get_origin(base) is Literal:
        return _one_of(get_args(base))
    words = {str: "a string", bool: "a boolean", int: "an integer", float: "a number", type(None): "null"}
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
