"""Ollama's embeddings, and what its clients ask before: `/api/tags`, `/api/ps`, `/api/version` and `/api/show`.

A name without a tag is that of the tag `latest`, as Ollama has it.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np

from tools.shim.body import Lenient, Positive, Text, Vector
from tools.shim.dialects.lengths import check_tokens
from tools.shim.errors import GatewayError, bad_request, quoted
from tools.shim.gateway import Gateway, Result
from tools.shim.routes import Get, Post, Reply
from tools.shim.served_model import ServedModel

LATEST = ":latest"

VERSION = "0.12.0"
"""Version of Ollama's API, which clients ask for."""

UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h)")

NEVER = "1970-01-01T00:00:00Z"


@dataclass(frozen=True)
class EmbedCall(Lenient):
    """Texts to embed; `keep_alive` is how long their model stays; `num_ctx` of the `options` bounds a text."""

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
    own = keeping(gateway, call.keep_alive)
    result = await own.embed(texts, untagged(call.model), dimensions=call.dimensions, truncate=call.truncate)
    check_context(result, call.options)
    content = {
        "model": result.model.name,
        "embeddings": result.tensors["embeddings"],
        "total_duration": time.perf_counter_ns() - started,
        "load_duration": int(result.loaded * 1e9),
        "prompt_eval_count": result.tokens,
    }
    return Reply(content, result)


async def embeddings(gateway: Gateway, call: EmbeddingsCall) -> Reply:
    """Embeds one text."""
    result = await keeping(gateway, call.keep_alive).embed([call.prompt], untagged(call.model))
    check_context(result, call.options)
    return Reply({"embedding": np.asarray(result.tensors["embeddings"][0])}, result)


async def tags(gateway: Gateway) -> Reply:
    """Lists what is served."""
    return Reply({"models": [listed(model) for model in await gateway.upstream.models()]})


async def running(gateway: Gateway) -> Reply:
    """Lists what is in memory."""
    served, residency = await gateway.upstream.models(), gateway.upstream.residency
    there = [model for model in served if residency is None or residency.is_loaded(model.name)]
    sizes = {model.name: residency.describe(model.name)["bytes"] if residency else 0 for model in there}
    return Reply({"models": [{**listed(model), "size": sizes[model.name]} for model in there]})


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


def keeping(gateway: Gateway, keep_alive: str | float | None) -> Gateway:
    """The gateway for a call whose model stays loaded so long: seconds, or a duration as Go writes it.

    Below 0 is for good. Raises GatewayError 400 for what is neither.
    """
    if keep_alive is None:
        return gateway
    text = str(keep_alive)
    parts = DURATION.findall(text)
    if re.fullmatch(r"-?\d+(\.\d+)?", text):
        seconds = float(text)
    elif parts and "".join(number + unit for number, unit in parts) == text.removeprefix("-"):
        seconds = sum(float(number) * UNITS[unit] for number, unit in parts) * (-1 if text[0] == "-" else 1)
    else:
        raise bad_request(f"keep_alive is seconds or a duration such as 5m, not {quoted(text)}")
    return replace(gateway, keep_alive=seconds if seconds >= 0 else math.inf)


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
    Get("/api/ps", running, Tags, error=error),
    Get("/api/version", version, Version, error=error),
]
