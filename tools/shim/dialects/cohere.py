"""Cohere's and Jina's rerank."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any, TypedDict

from tools.shim.body import Positive, Text
from tools.shim.errors import GatewayError, bad_request
from tools.shim.gateway import Gateway, Result
from tools.shim.routes import Get, Post, Reply


@dataclass(frozen=True)
class Document:
    """A document with nothing but its text."""

    text: Text


@dataclass(frozen=True)
class RerankCall:
    """Documents to order by how well they answer the query."""

    query: Text
    documents: list[Text | Document]
    model: str | None = None
    top_n: Positive | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Positive | None = None


class Ranked(TypedDict, total=False):
    """One document, by its place in the call."""

    index: int
    relevance_score: float
    document: dict[str, str]


class Ranking(TypedDict):
    """The best documents first; tokens as Cohere (`meta`) and as Jina (`usage`) report them."""

    id: str
    model: str
    results: list[Ranked]
    meta: dict[str, Any]
    usage: dict[str, int]


async def rerank(gateway: Gateway, call: RerankCall) -> Reply:
    """Orders documents."""
    texts = [document if isinstance(document, str) else document.text for document in call.documents]
    result = await gateway.rerank(call.query, texts, call.model)
    check_length(call, result)
    results: list[dict[str, Any]] = [
        {"index": int(i), "relevance_score": float(result.scores[i])} for i in result.order[: call.top_n]
    ]
    if call.return_documents:
        for ranked in results:
            ranked["document"] = {"text": texts[ranked["index"]]}
    content = {
        "id": str(uuid.uuid4()),
        "model": result.model.name,
        "results": results,
        "meta": {"api_version": {"version": "2"}, "tokens": {"input_tokens": result.tokens}},
        "usage": {"total_tokens": result.tokens},
    }
    return Reply(content, result)


def check_length(call: RerankCall, result: Result) -> None:
    """Raises GatewayError 400 where `max_tokens_per_doc` would have cut more than the model's window does."""
    longest = int(result.tensors["token_count"].max())
    if call.max_tokens_per_doc is not None and longest > call.max_tokens_per_doc:
        raise bad_request(
            f"a document and the query are {longest} tokens, over max_tokens_per_doc: documents are cut to the "
            f"{result.model.max_tokens} tokens of {result.model.name} only, so shorten it or leave the field out"
        )


def error(error: GatewayError) -> tuple[int, object]:
    """Cohere's `message`, beside Jina's `detail`."""
    return error.status, {"message": error.message, "detail": error.message}


ROUTES: list[Post | Get] = [
    Post(path, RerankCall, rerank, Ranking, error=error) for path in ("/v1/rerank", "/v2/rerank")
]
