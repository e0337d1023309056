"""Ollama's embeddings, and what its clients ask before: `/api/tags`, `/api/version` and `/api/show`.

A name without a tag is that of the tag `latest`, as Ollama has it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from tools.shim.body import Lenient, Positive, Text, Vector
from tools.shim.dialects.lengths import check_tokens
from tools.shim.errors import GatewayError
from tools.shim.gateway import Gateway, Result
from tools.shim.routes import Get, Post, Reply
from tools.shim.upstream import ServedModel

LATEST = ":latest"

VERSION = "0.12.0"
"""Of Ollama's API, which clients ask for."""

NEVER = "1970-01-01T00:00:00Z"


@dataclass(frozen=True)
class EmbedCall(Lenient):
    """Texts to embed. Models stay loaded whatever `keep_alive` says; of the `options`, `num_ctx` bounds a text."""

    model: str
    input: Text | list[Text]
    truncate: bool = True
    dimensions: Positive | None = None
    keep_alive: str | int | float | None = None
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class EmbeddingsCall(Lenient):
    """One text to embed."""

    model: str
    prompt: Text
    keep_alive: str | int | float | None = None
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class ShowCall(Lenient):
    """A model to describe; older clients call it `name`."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


class Embeddings(TypedDict):
    """One embedding for each text, in order; durations in nanoseconds."""

    model: str
    embeddings: list[Vector]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class Embedding(TypedDict):
    """The text's embedding."""

    embedding: Vector


class Tags(TypedDict):
    """What is served."""

    models: list[dict[str, Any]]


class Version(TypedDict):
    """The version of the API."""

    version: str


class Shown(TypedDict):
    """A model."""

    details: dict[str, Any]
    model_info: dict[str, Any]
    capabilities: list[str]


async def embed(gateway: Gateway, call: EmbedCall) -> Reply:
    """Embeds texts."""
    started = time.perf_counter_ns()
    texts = [call.input] if isinstance(call.input, str) else call.input
    result = await gateway.embed(texts, untagged(call.model), dimensions=call.dimensions, truncate=call.truncate)
    check_context(result, call.options)
    content = {
        "model": result.model.name,
        "embeddings": result.tensors["embeddings"],
        "total_duration": time.perf_counter_ns() - started,
        "load_duration": 0,
        "prompt_eval_count": result.tokens,
    }
    return Reply(content, result)


async def embeddings(gateway: Gateway, call: EmbeddingsCall) -> Reply:
    """Embeds one text."""
    result = await gateway.embed([call.prompt], untagged(call.model))
    check_context(result, call.options)
    return Reply({"embedding": np.asarray(result.tensors["embeddings"][0])}, result)


async def tags(gateway: Gateway) -> Reply:
    """Lists what is served."""
    return Reply({"models": [listed(model) for model in await gateway.upstream.models()]})


async def version(_: Gateway) -> Reply:
    """Tells the version of the API."""
    return Reply({"version": VERSION})


async def show(gateway: Gateway, call: ShowCall) -> Reply:
    """Describes a model."""
    model = await gateway.upstream.named(untagged(call.model or call.name or ""))
    facts = {"general.architecture": model.task, f"{model.task}.context_length": model.max_tokens}
    if model.dimensions:
        facts[f"{model.task}.embedding_length"] = model.dimensions
    capabilities = ["embedding"] if model.task == "embed" else []
    return Reply({"details": details(model), "model_info": facts, "capabilities": capabilities})


def listed(model: ServedModel) -> dict[str, Any]:
    """A model as the list has it."""
    name = model.name + LATEST
    digest = model.facts.get("revision") or ""
    return {
        "name": name,
        "model": name,
        "modified_at": NEVER,
        "size": 0,
        "digest": digest,
        "details": details(model),
    }


def details(model: ServedModel) -> dict[str, Any]:
    """What there is to say of a model's weights."""
    return {
        "parent_model": "",
        "format": "onnx",
        "family": model.task,
        "families": [model.task],
        "parameter_size": "",
        "quantization_level": (model.facts.get("precision") or "").upper(),
    }


def untagged(name: str) -> str:
    """A model's name without the tag that every model has."""
    return name.removesuffix(LATEST)


def check_context(result: Result, options: dict[str, Any] | None) -> None:
    """Raises GatewayError 400 where `num_ctx` would have cut more than the model's window does."""
    limit = (options or {}).get("num_ctx")
    if type(limit) is int:
        check_tokens(result, limit, "options.num_ctx")


def error(error: GatewayError) -> tuple[int, object]:
    """Ollama's error: a sentence."""
    return error.status, {"error": error.message}


ROUTES: list[Post | Get] = [
    Post("/api/embed", EmbedCall, embed, Embeddings, error=error),
    Post("/api/embeddings", EmbeddingsCall, embeddings, Embedding, error=error),
    Post("/api/show", ShowCall, show, Shown, error=error),
    Get("/api/tags", tags, Tags, error=error),
    Get("/api/version", version, Version, error=error),
]
