"""The gateway's own dialect: `/embed` with `texts`, `/rerank` with `documents`, `/models` and `/health`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from tools.shim import gpu
from tools.shim.body import Query, Text, Vector
from tools.shim.dialects import cohere, openai
from tools.shim.errors import not_ready
from tools.shim.gateway import Gateway
from tools.shim.routes import Get, Post, Reply


@dataclass(frozen=True)
class EmbedCall:
    """Texts to embed as they are; without a model, by the first that embeds."""

    texts: list[Text]
    model: str | None = None


class Embeddings(TypedDict):
    """One embedding for each text, in order."""

    embeddings: list[Vector]
    model: str


@dataclass(frozen=True)
class RerankCall:
    """Documents to order by how well they answer the query; without a model, by the first that reranks."""

    query: Query
    documents: list[str]
    model: str | None = None


class Ranked(TypedDict):
    """One document, by its place in the call."""

    index: int
    relevance_score: float


class Scores(TypedDict):
    """One score for each document, in order; the documents by descending score, by index and as others have it."""

    scores: Vector
    order: list[int]
    results: list[Ranked]
    model: str


class Models(openai.Models):
    """What is served, as our own callers and as OpenAI's read it; the first model of a task is its default."""

    models: list[dict[str, Any]]


class Answering(TypedDict):
    """Which models answer."""

    status: Literal["ready", "partial"]
    models: list[str]


class Health(Answering, total=False):
    """Also who does not and why, with `partial`, and the GPUs that the gateway sees, with `verbose`."""

    failing: dict[str, str]
    gpus: list[gpu.Gpu]


async def embed(gateway: Gateway, call: EmbedCall) -> Reply:
    """Embeds texts."""
    result = await gateway.embed(call.texts, call.model)
    return Reply({"embeddings": result.tensors["embeddings"], "model": result.model.name}, result)


async def rerank(gateway: Gateway, call: RerankCall) -> Reply:
    """Scores documents."""
    result = await gateway.rerank(call.query, call.documents, call.model)
    results = [{"index": int(i), "relevance_score": result.scores[i]} for i in result.order]
    content = {"scores": result.scores, "order": result.order, "results": results, "model": result.model.name}
    return Reply(content, result)


async def models(gateway: Gateway) -> Reply:
    """Lists what is served."""
    facts = ("name", "task", "max_batch_size", "dimensions", "max_tokens")
    served = await gateway.upstream.models()
    own = [{fact: getattr(model, fact) for fact in facts} for model in served]
    return Reply({"models": own, "object": "list", "data": [openai.describe(model) for model in served]})


async def health(gateway: Gateway, verbose: bool = False, partial: bool = False) -> Reply:
    """200 when every served model answers, or with `partial` when one does, else 503 with who does not and why."""
    problems = await gateway.upstream.problems()
    failing = {name: problem for name, problem in problems.items() if problem}
    if failing and not (partial and len(failing) < len(problems)):
        raise not_ready("; ".join(f"{name}: {problem}" for name, problem in failing.items()))
    content: dict[str, Any] = {
        "status": "partial" if failing else "ready",
        "models": [name for name in problems if name not in failing],
    }
    if partial:
        content["failing"] = failing
    if verbose:
        content["gpus"] = await asyncio.to_thread(gpu.snapshot)
    return Reply(content)


ROUTES: list[Post | Get] = [
    Post("/embed", EmbedCall, embed, Embeddings, key="texts"),
    Post(
        "/rerank",
        RerankCall,
        rerank,
        Scores,
        fits=lambda content: not cohere.is_wide(content) and "documents" in content,
    ),
    Get("/models", models, Models),
    Get("/health", health, Health, open=True, flags=("verbose", "partial")),
]
