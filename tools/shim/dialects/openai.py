"""OpenAI's embeddings and list of models, with the `input_type` and `truncate` that NVIDIA NIM adds to them."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from tools.shim.body import Positive, Text, Vector
from tools.shim.errors import GatewayError, bad_request
from tools.shim.gateway import Gateway
from tools.shim.routes import Get, Post, Reply
from tools.shim.upstream import ServedModel

PROMPTS = {"passage": "document", "search_query": "query", "search_document": "document"}
"""`input_type` -> prompt name, where they differ."""

TEXT_ONLY = (
    "input holds token ids, whose meaning differs from model to model: send text "
    "(langchain's OpenAIEmbeddings does so with check_embedding_ctx_length=False)"
)


@dataclass(frozen=True)
class EmbeddingsCall:
    """Text to embed; `input_type` names the prompt to put before it."""

    input: Text | list[Text]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    input_type: str | None = None
    truncate: Literal["NONE", "END"] | None = None
    user: str | None = None

    @staticmethod
    def check(content: dict[str, Any]) -> None:
        """Refuses token ids in their own words."""
        first = content.get("input")
        while isinstance(first, list) and first:
            first = first[0]
        if isinstance(first, int):
            raise bad_request(TEXT_ONLY)


class Embedding(TypedDict):
    """Numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: Vector | str


class Usage(TypedDict):
    """Tokens of all texts, prompts and special tokens included."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    """One embedding for each text, in order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Model(TypedDict):
    """A served model: OpenAI's fields, and what decides how it can be used."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    task: Literal["embed", "rerank"]
    dimensions: int | None
    minimum_dimensions: int | None
    max_tokens: int
    pooling: str | None
    prompts: list[str]
    precision: str | None
    source: str | None
    revision: str | None


class Models(TypedDict):
    """What is served."""

    object: Literal["list"]
    data: list[Model]


async def embeddings(gateway: Gateway, call: EmbeddingsCall) -> Reply:
    """Embeds texts."""
    texts = [call.input] if isinstance(call.input, str) else call.input
    prompt = PROMPTS.get(call.input_type, call.input_type) if call.input_type else None
    cut = call.truncate != "NONE"
    result = await gateway.embed(texts, call.model, prompt=prompt, dimensions=call.dimensions, truncate=cut)
    encode = as_base64 if call.encoding_format == "base64" else np.asarray
    data = [
        {"object": "embedding", "index": i, "embedding": encode(row)}
        for i, row in enumerate(result.tensors["embeddings"])
    ]
    usage = {"prompt_tokens": result.tokens, "total_tokens": result.tokens}
    return Reply({"object": "list", "data": data, "model": result.model.name, "usage": usage}, result)


async def models(gateway: Gateway) -> Reply:
    """Lists what is served."""
    return Reply({"object": "list", "data": [describe(model) for model in await gateway.upstream.models()]})


def describe(model: ServedModel) -> Model:
    """A model as the list has it."""
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "triton",
        "task": model.task,
        "dimensions": model.dimensions,
        "minimum_dimensions": model.minimum_dimensions,
        "max_tokens": model.max_tokens,
        "pooling": model.facts.get("pooling"),
        "prompts": sorted(model.prompts),
        "precision": model.facts.get("precision"),
        "source": model.facts.get("source"),
        "revision": model.facts.get("revision"),
    }


def as_base64(row: npt.NDArray[np.float32]) -> str:
    """Little-endian float32, as OpenAI's clients decode them."""
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


def error(error: GatewayError) -> tuple[int, object]:
    """OpenAI's error object; `code` is the gateway's own word."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return error.status, {"error": {"message": error.message, "type": kind, "param": None, "code": error.type}}


ROUTES: list[Post | Get] = [
    *(
        Post(path, EmbeddingsCall, embeddings, Embeddings, error=error)
        for path in ("/v1/embeddings", "/embeddings")
    ),
    Get("/v1/models", models, Models, error=error),
]
