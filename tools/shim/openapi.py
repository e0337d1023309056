"""The OpenAPI document, written from the routes: `python -m tools.shim.openapi` renews the committed copy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import orjson

from tools.shim.body import schema
from tools.shim.dialects import ROUTES
from tools.shim.routes import KEEP_ALIVE_HEADER, TIMEOUT_HEADER, Action, Get, Post

REQUEST_ID = {"description": "The caller's own, or a new one.", "schema": {"type": "string"}}
HEADERS = {
    "X-Token-Count": {"description": "Tokens of all texts.", "schema": {"type": "string"}},
    "X-Ignored-Fields": {
        "description": "Fields that changed nothing, because the dialect does not know them.",
        "schema": {"type": "string"},
    },
    "X-Truncated": {"description": "How many texts were cut to fit.", "schema": {"type": "string"}},
    "X-Load-Seconds": {
        "description": "Of waiting for the model to be loaded, where it was not.",
        "schema": {"type": "string"},
    },
    "Server-Timing": {"description": "Milliseconds of each stage.", "schema": {"type": "string"}},
}

TIMEOUT = {
    "name": TIMEOUT_HEADER,
    "in": "header",
    "description": "Seconds after which the caller wants no answer, at most the server's own --timeout.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}

KEEP_ALIVE = {
    "name": KEEP_ALIVE_HEADER,
    "in": "header",
    "description": "Seconds that the model stays loaded after the call, where models are loaded by calls.",
    "schema": {"type": "number", "minimum": 0},
}

PAGES = {"/": "Shows what is served, to people.", "/docs": "Shows every route, to people."}

FILE = Path(__file__).with_suffix(".json")


def document() -> dict[str, Any]:
    """Every path with its bodies and answers; errors have a status and words of the dialect."""
    paths: dict[str, Any] = {}
    for route in ROUTES:
        method = "get" if isinstance(route, Get) else "post"
        paths.setdefault(route.path, {}).setdefault(method, []).append(route)
    described = {
        path: {method: operation(routes) for method, routes in methods.items()} for path, methods in paths.items()
    }
    for path, summary in PAGES.items():
        described.setdefault(path, {})["get"] = page(summary)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Triton Embeddings",
            "version": "1",
            "description": "Embeddings and reranking in the dialects of clients that exist.",
        },
        "paths": described,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def operation(routes: list[Post | Get | Action]) -> dict[str, Any]:
    """What the routes of one path and method take and give."""
    content: dict[str, Any] = {
        "summary": " / ".join(dict.fromkeys(str(route.answer.__doc__) for route in routes)),
        "responses": {
            "200": {
                "description": "What was asked for.",
                "headers": {"X-Request-Id": REQUEST_ID},
                "content": {"application/json": {"schema": one_of([schema(route.gives) for route in routes])}},
            },
            "default": {"description": "A status and a sentence that says what to change."},
        },
    }
    bodies = [schema(route.body) for route in routes if isinstance(route, Post)]
    flags = [flag for route in routes if isinstance(route, Get) for flag in route.flags]
    if flags:
        content["parameters"] = [{"name": flag, "in": "query", "schema": {"enum": ["0", "1"]}} for flag in flags]
    if names := re.findall("{(.*?)}", routes[0].path):
        content["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in names
        ]
    if bodies:
        content["parameters"] = [TIMEOUT, KEEP_ALIVE]
        content["responses"]["200"]["headers"] |= HEADERS
        if any(isinstance(route, Post) and route.streams for route in routes):
            content["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
        content["requestBody"] = {"required": True, "content": {"application/json": {"schema": one_of(bodies)}}}
    return content


def page(summary: str) -> dict[str, Any]:
    """What a page for people is."""
    content = {"text/html": {"schema": {"type": "string"}}}
    return {"summary": summary, "security": [], "responses": {"200": {"description": "HTML", "content": content}}}


def one_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    """One schema, or several of which one holds."""
    return schemas[0] if len(schemas) == 1 else {"oneOf": schemas}


def render() -> bytes:
    """The document as the file has it."""
    return orjson.dumps(document(), option=orjson.OPT_INDENT_2) + b"\n"


if __name__ == "__main__":
    FILE.write_bytes(render())
