"""Cohere's rerank and embed, and Jina's and vLLM's rerank, which are Cohere's with more fields."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

from tools.shim.body import Lenient, Positive, Query, Text, Vector
from tools.shim.dialects.encodings import Encoding, encoded
from tools.shim.dialects.lengths import check_tokens
from tools.shim.dialects.openai import PROMPTS, TEXT_ALONE
from tools.shim.errors import GatewayError, bad_request
from tools.shim.gateway import Gateway
from tools.shim.routes import Get, Post, Reply

BY_TEXT = "documents are ordered by their text"
INSTRUCTION = "models take no more for their template than an instruction: send that"


@dataclass(frozen=True)
class Document(Lenient):
    """A document, by its text."""

    text: str


@dataclass(frozen=True)
class RerankCall:
    """Documents to order by how well they answer the query."""

    query: Query
    documents: list[str | Document]
    model: str | None = None
    top_n: Positive | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Positive | None = None
    max_chunks_per_doc: Positive | None = None
    rank_fields: list[Annotated[Literal["text"], BY_TEXT]] | None = None
    priority: int | None = None


@dataclass(frozen=True)
class WideRerankCall(RerankCall, Lenient):
    """The same with Jina's fields, up to `return_embeddings`, and vLLM's."""

    truncation: bool | None = None
    max_doc_length: Positive | None = None
    max_query_length: Positive | None = None
    max_chunk_per_doc: Positive | None = None
    return_embeddings: Annotated[Literal[False], "/v1/embeddings gives embeddings"] | None = None
    instruction: Query | None = None
    chat_template_kwargs: Annotated[None, INSTRUCTION] = None
    max_tokens_per_query: Positive | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Annotated[Literal["right"], "texts are cut at their end only"] | None = None
    use_activation: bool | None = None
    activation: bool | None = None
    softmax: bool | None = None
    user: str | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    mm_processor_kwargs: Annotated[None, TEXT_ALONE] = None


@dataclass(frozen=True)
class Part:
    """A part of an input."""

    text: Text
    type: Annotated[Literal["text"], TEXT_ALONE] = "text"
    image_url: Annotated[None, TEXT_ALONE] = None


@dataclass(frozen=True)
class Input:
    """A text as its one part."""

    content: list[Part]


@dataclass(frozen=True)
class EmbedCall:
    """Texts to embed, plain or as inputs of one text each; `input_type` names the prompt to put before them."""

    texts: list[Text] | None = None
    inputs: list[Input] | None = None
    model: str | None = None
    input_type: str | None = None
    embedding_types: list[Encoding] | None = None
    truncate: Annotated[Literal["NONE", "END"], "texts are cut at their end only"] | None = None
    max_tokens: Positive | None = None
    output_dimension: Positive | None = None
    priority: int | None = None
    images: Annotated[None, TEXT_ALONE] = None


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


class Embeddings(TypedDict):
    """One embedding for each text, in order: a list, or one of each type that was asked for."""

    id: str
    response_type: Literal["embeddings_floats", "embeddings_by_type"]
    texts: list[str]
    embeddings: list[Vector] | dict[str, Any]
    meta: dict[str, Any]


LIMITS = (
    "max_tokens_per_doc",
    "max_tokens_per_query",
    "max_doc_length",
    "max_query_length",
    "truncate_prompt_tokens",
)


async def rerank(gateway: Gateway, call: RerankCall) -> Reply:
    """Orders documents."""
    texts = [document if isinstance(document, str) else document.text for document in call.documents]
    wide = call if isinstance(call, WideRerankCall) else None
    cut = wide is None or wide.truncation is not False
    instruction = wide.instruction if wide else None
    result = await gateway.rerank(call.query, texts, call.model, instruction=instruction, truncate=cut)
    for field in LIMITS:
        check_tokens(result, getattr(call, field, None), field)
    is_raw = wide is not None and False in (wide.use_activation, wide.activation, wide.softmax)
    scores = result.logits if is_raw else result.scores
    results: list[dict[str, Any]] = [
        {"index": int(i), "relevance_score": float(scores[i])} for i in result.order[: call.top_n]
    ]
    if call.return_documents:
        for ranked in results:
            ranked["document"] = {"text": texts[ranked["index"]]}
    content = {
        "id": str(uuid.uuid4()),
        "model": result.model.name,
        "results": results,
        "meta": meta("2", result.tokens) | {"billed_units": {"search_units": 1}},
        "usage": {"prompt_tokens": result.tokens, "total_tokens": result.tokens},
    }
    return Reply(content, result)


async def embed(gateway: Gateway, call: EmbedCall) -> Reply:
    """Embeds texts."""
    return await embed_as(gateway, call, "1")


async def embed_v2(gateway: Gateway, call: EmbedCall) -> Reply:
    """Embeds texts, by type."""
    return await embed_as(gateway, call, "2")


async def embed_as(gateway: Gateway, call: EmbedCall, version: str) -> Reply:
    """Embeds texts as a version of the API answers."""
    prompt = PROMPTS.get(call.input_type, call.input_type) if call.input_type else None
    texts = texts_of(call)
    result = await gateway.embed(
        texts, call.model, prompt=prompt, dimensions=call.output_dimension, truncate=call.truncate != "NONE"
    )
    check_tokens(result, call.max_tokens, "max_tokens")
    rows = result.tensors["embeddings"]
    types: list[Encoding] = call.embedding_types or (["float"] if version == "2" else [])
    content = {
        "id": str(uuid.uuid4()),
        "response_type": "embeddings_by_type" if types else "embeddings_floats",
        "texts": texts,
        "embeddings": {kind: encoded(rows, kind, result.model.name) for kind in types} if types else rows,
        "meta": meta(version, result.tokens) | {"billed_units": {"input_tokens": result.tokens}},
    }
    return Reply(content, result)


def texts_of(call: EmbedCall) -> list[str]:
    """What is to be embedded; raises GatewayError 400 unless it is sent in one way, one text an input."""
    if call.texts is None and call.inputs is None:
        raise bad_request("the field 'texts' is missing")
    if call.texts is not None and call.inputs is not None:
        raise bad_request("send texts or inputs, not both")
    for i, one in enumerate(call.inputs or ()):
        if len(one.content) > 1:
            raise bad_request(f"inputs[{i}].content holds {len(one.content)} texts: send one an input")
    return call.texts or [one.content[0].text for one in call.inputs or ()]


def meta(version: str, tokens: int) -> dict[str, Any]:
    """What every answer says besides."""
    return {"api_version": {"version": version}, "tokens": {"input_tokens": tokens}}


def error(error: GatewayError) -> tuple[int, object]:
    """Cohere's `message`, beside Jina's `detail`."""
    return error.status, {"message": error.message, "detail": error.message}


ROUTES: list[Post | Get] = [
    Post("/rerank", WideRerankCall, rerank, Ranking, key="documents", error=error),
    Post("/v1/rerank", WideRerankCall, rerank, Ranking, error=error),
    Post("/v2/rerank", RerankCall, rerank, Ranking, error=error),
    Post("/v1/embed", EmbedCall, embed, Embeddings, error=error),
    Post("/v2/embed", EmbedCall, embed_v2, Embeddings, error=error),
]
