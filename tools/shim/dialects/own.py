"""The gateway's own dialect: `/embed` with `texts`, `/rerank` with `documents`, `/models` and `/health`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

from tools.shim import gpu
from tools.shim.body import Positive, Query, Text, Vector
from tools.shim.dialects import cohere, openai
from tools.shim.errors import bad_request, not_ready
from tools.shim.gateway import Gateway
from tools.shim.residency.loader import Residency
from tools.shim.routes import Action, Get, Post, Reply
from tools.shim.served_model import ServedModel


@dataclass(frozen=True)
class EmbedCall:
    """Texts to embed as they are; without a model, by the first that embeds."""

    texts: list[Text]
    model: str | None = None
    dimensions: Positive | None = None
    truncate: bool | None = None
    """If false, a text over the window is refused, not cut."""


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
    truncate: bool | None = None
    """If false, a document that with its query is over the window is refused, not cut."""


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
    cut = call.truncate is not False
    result = await gateway.embed(call.texts, call.model, dimensions=call.dimensions, truncate=cut)
    return Reply({"embeddings": result.tensors["embeddings"], "model": result.model.name}, result)


async def rerank(gateway: Gateway, call: RerankCall) -> Reply:
    """Scores documents."""
    cut = call.truncate is not False
    result = await gateway.rerank(call.query, call.documents, call.model, truncate=cut)
    results = [{"index": int(i), "relevance_score": result.scores[i]} for i in result.order]
    content = {"scores": result.scores, "order": result.order, "results": results, "model": result.model.name}
    return Reply(content, result)


def is_own(content: dict[str, Any]) -> bool:
    """Whether a body with documents is in this dialect: Cohere's, Jina's and vLLM's are told by what it lacks."""
    documents = content.get("documents", ())
    has_objects = isinstance(documents, list) and any(isinstance(one, dict) for one in documents)
    return "documents" in content and not (has_objects or WIDER & content.keys())


WIDER = (
    {one.name for one in fields(cohere.WideRerankCall)} - {one.name for one in fields(RerankCall)} - {"ignored"}
)
"""Fields of a body for `/rerank` that this dialect does not have."""


async def models(gateway: Gateway) -> Reply:
    """Lists what is served, and what of it is in memory."""
    served = await gateway.upstream.models()
    own = [described(gateway, model) for model in served]
    data = [openai.describe(model, gateway.upstream.residency) for model in served]
    return Reply({"models": own, "object": "list", "data": data})


def described(gateway: Gateway, model: ServedModel) -> dict[str, Any]:
    """A model, as our own callers read it."""
    facts = ("name", "task", "max_batch_size", "dimensions", "max_tokens")
    residency = gateway.upstream.residency
    state = dict(residency.describe(model.name)) if residency else {}
    return {fact: getattr(model, fact) for fact in facts} | state


async def load(gateway: Gateway, name: str) -> Reply:
    """Loads a model, with those that share its steps."""
    model, residency = await residing(gateway, name)
    await residency.load(model.name, gateway.seconds)
    return Reply(described(gateway, model))


async def unload(gateway: Gateway, name: str) -> Reply:
    """Unloads a model as soon as no call to it is under way; its next call loads it again."""
    model, residency = await residing(gateway, name)
    await residency.unload(model.name, gateway.seconds)
    return Reply(described(gateway, model))


async def pin(gateway: Gateway, name: str) -> Reply:
    """Loads a model, which then makes room for no other."""
    model, residency = await residing(gateway, name)
    residency.pin(model.name, True)
    await residency.load(model.name, gateway.seconds)
    return Reply(described(gateway, model))


async def unpin(gateway: Gateway, name: str) -> Reply:
    """Lets a model make room for others again."""
    model, residency = await residing(gateway, name)
    residency.pin(model.name, False)
    return Reply(described(gateway, model))


async def residing(gateway: Gateway, name: str) -> tuple[ServedModel, Residency]:
    """A model, and what loads it; raises GatewayError 404 for an unknown one, and 400 where nothing does."""
    model = await gateway.upstream.named(name)
    if gateway.upstream.residency is None:
        raise bad_request(
            "this server's models are loaded when it starts, and stay: start it again to load others"
        )
    return model, gateway.upstream.residency


async def health(gateway: Gateway, verbose: bool = False, partial: bool = False) -> Reply:
    """200 when every served model answers, or with `partial` when one does, else 503 with who does not and why.

    It is 503 too while the gateway goes on before it stops.
    """
    if gateway.upstream.is_stopping:
        raise not_ready("this server is stopping")
    problems = await gateway.upstream.problems()
    failing = {name: problem for name, problem in problems.items() if problem}
    if failing and not (partial and len(failing) < len(problems)):
        whose: dict[str, list[str]] = {}
        for name, problem in failing.items():
            whose.setdefault(problem, []).append(name)
        said = "; ".join(f"{', '.join(names)}: {problem}" for problem, names in whose.items())
        raise not_ready(said, details={"failing": failing})
    content: dict[str, Any] = {
        "status": "partial" if failing else "ready",
        "models": [name for name in problems if name not in failing],
    }
    if partial:
        content["failing"] = failing
    if verbose:
        content["gpus"] = await asyncio.to_thread(gpu.snapshot)
    return Reply(content)


ROUTES: list[Post | Get | Action] = [
    Post("/embed", EmbedCall, embed, Embeddings, key="texts"),
    Post("/rerank", RerankCall, rerank, Scores, fits=is_own),
    Get("/models", models, Models),
    Action("/models/{name}/load", load, dict[str, Any]),
    Action("/models/{name}/unload", unload, dict[str, Any]),
    Action("/models/{name}/pin", pin, dict[str, Any]),
    Action("/models/{name}/unpin", unpin, dict[str, Any]),
    Get("/health", health, Health, open=True, flags=("verbose", "partial")),
]
