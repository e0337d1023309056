"""What of a JSON Schema the grammar compiler in openvino-genai, xgrammar 0.1, would pass over or misread."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

MOST_DEPTH = 64
"""Of schemas in each other."""

IGNORED = {
    *("oneOf", "allOf", "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies"),
    *("multipleOf", "uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems"),
}
"""Keywords that it passes over, or takes for less than they say."""

SAYS_NOTHING = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"),
    *("$id", "$schema", "$defs", "definitions"),
}
"""Keywords that restrict nothing by themselves."""

ALONE = ("$ref", "anyOf")
"""Keywords beside which it reads no others."""

LISTS = ("anyOf", "prefixItems")
NAMED = ("properties", "patternProperties", "$defs", "definitions")
SINGLE = ("items", "additionalProperties", "propertyNames", "unevaluatedProperties")
"""Keywords that hold schemas: many, many by name, and one."""

MISREAD = re.compile("[\u0080-\u00ff][0-9A-Fa-f]")
"""It writes the first letter as a number in base 16, and reads the second one as a digit more."""


def refusal(kind: str, guide: str) -> str:
    """Why answers could not be held to the schemas of a guide, or ""."""
    try:
        said = json.loads(guide)
        schemas = [said] if kind == "json_schema" else _of_tags(said)
        return next((why for schema in schemas for why in _problems(schema)), "")
    except ValueError:
        return "it is not valid JSON"
    except RecursionError:
        return f"it has objects in each other deeper than {MOST_DEPTH}"


def _of_tags(said: Any) -> Iterator[Any]:
    """The schemas in a structural tag."""
    if isinstance(said, list):
        for one in said:
            yield from _of_tags(one)
    elif isinstance(said, dict):
        for name, one in said.items():
            yield from [one] if name == "json_schema" else _of_tags(one)


def _problems(schema: Any, place: str = "", depth: int = 0) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    if depth > MOST_DEPTH:
        yield f"it has schemas in each other deeper than {MOST_DEPTH}"
        return
    where = place or "the schema"
    said = schema.keys() - SAYS_NOTHING
    for name in sorted(said & IGNORED):
        yield f"{where} has {name}, which is not enforced: leave it out"
    for name in ALONE:
        for other in sorted(said - {name}) if name in said else ():
            yield f"{where} has {other} beside {name}: move it into what {name} names"
    for other in sorted(said & {"minLength", "maxLength", "format"}) if "pattern" in said else ():
        yield f"{where} has {other} beside pattern: say it in the pattern"
    if "$ref" in said and not str(schema["$ref"]).startswith("#"):
        yield f"{where} has a $ref to elsewhere: put what it names into $defs"
    literal = [schema[name] for name in ("const", "enum", "pattern") if name in schema]
    for text in (*(json.dumps(one, ensure_ascii=False) for one in literal), *(schema.get("properties") or ())):
        if found := MISREAD.search(text):
            yield f"{where} has {found[0]!r}, which the compiler of grammars misreads: write it without the accent"
    for name, inner in _inner(schema):
        yield from _problems(inner, f"{place}.{name}".removeprefix("."), depth + 1)


def _inner(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Schemas that stand in another one, by where."""
    for name in SINGLE:
        if name in schema:
            yield name, schema[name]
    for name in NAMED:
        if isinstance(found := schema.get(name), dict):
            yield from ((f"{name}.{key}", one) for key, one in found.items())
    for name in LISTS:
        if isinstance(found := schema.get(name), list):
            yield from ((f"{name}[{i}]", one) for i, one in enumerate(found))
