"""The gateway's own dialect: what a body of `/embed` and `/rerank` must look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from tools.shim.errors import bad_request, too_large

MAX_TEXTS = 2048
"""Texts in one call."""


@dataclass(frozen=True)
class EmbedCall:
    """`POST /embed {"texts": [...], "model": null}`."""

    texts: list[str]
    model: str | None


@dataclass(frozen=True)
class RerankCall:
    """`POST /rerank {"query": "...", "documents": [...], "model": null}`."""

    query: str
    documents: list[str]
    model: str | None


def parse_embed(body: bytes) -> EmbedCall:
    """Reads the body of `/embed`; raises GatewayError 400 or 413 with what to change."""
    fields = _object(body, required=("texts",))
    return EmbedCall(_texts(fields, "texts"), _model(fields))


def parse_rerank(body: bytes) -> RerankCall:
    """Reads the body of `/rerank`; raises GatewayError 400 or 413 with what to change."""
    fields = _object(body, required=("query", "documents"))
    query = _text(fields["query"], "query")
    return RerankCall(query, _texts(fields, "documents"), _model(fields))


def _object(body: bytes, required: tuple[str, ...]) -> dict[str, Any]:
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise bad_request(f"the body must be a JSON object with {' and '.join(required)}")
    for name in required:
        if name not in fields:
            raise bad_request(f"the field {name!r} is missing")
    if unknown := fields.keys() - {*required, "model"}:
        known = ", ".join((*required, "model"))
        raise bad_request(f"unknown field {min(unknown)!r}: this route takes {known}")
    return fields


def _texts(fields: dict[str, Any], name: str) -> list[str]:
    texts = fields[name]
    if not isinstance(texts, list):
        raise bad_request(f"{name} must be a list of strings")
    if not texts:
        raise bad_request(f"{name} is empty: send at least one text")
    if len(texts) > MAX_TEXTS:
        raise too_large(f"{name} holds {len(texts)} texts: send at most {MAX_TEXTS} a call")
    return [_text(text, f"{name}[{i}]") for i, text in enumerate(texts)]


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise bad_request(f"{where} must be a string, not {_json_type(value)}")
    if not value or value.isspace():
        raise bad_request(f"{where} is empty: every text needs at least one visible character")
    return value


def _model(fields: dict[str, Any]) -> str | None:
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise bad_request(f"model must be a string or null, not {_json_type(model)}")
    return model


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
