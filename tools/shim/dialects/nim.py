"""NVIDIA NIM's ranking; its embeddings are OpenAI's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict

from tools.shim.body import Query
from tools.shim.dialects.openai import TEXT_ALONE, Usage
from tools.shim.errors import GatewayError
from tools.shim.gateway import Gateway
from tools.shim.routes import Get, Post, Reply


@dataclass(frozen=True)
class Question:
    """A query."""

    text: Query
    image: Annotated[None, TEXT_ALONE] = None


@dataclass(frozen=True)
class Passage:
    """A passage."""

    text: str
    image: Annotated[None, TEXT_ALONE] = None


@dataclass(frozen=True)
class RankingCall:
    """Passages to order by how well they answer the query; as in NIM, long ones are refused unless cut at END."""

    query: Question
    passages: list[Passage]
    model: str | None = None
    truncate: Literal["NONE", "END"] | None = None


class Ranked(TypedDict):
    """One passage, by its place in the call."""

    index: int
    logit: float


class Rankings(TypedDict):
    """The best passages first."""

    rankings: list[Ranked]
    usage: Usage


async def ranking(gateway: Gateway, call: RankingCall) -> Reply:
    """Orders passages."""
    passages = [passage.text for passage in call.passages]
    result = await gateway.rerank(call.query.text, passages, call.model, truncate=call.truncate == "END")
    rankings = [{"index": int(i), "logit": float(result.logits[i])} for i in result.order]
    usage = {"prompt_tokens": result.tokens, "total_tokens": result.tokens}
    return Reply({"rankings": rankings, "usage": usage}, result)


def error(error: GatewayError) -> tuple[int, object]:
    """NIM's error object."""
    return error.status, {"object": "error", "message": error.message, "detail": {}, "type": error.type}


ROUTES: list[Post | Get] = [Post("/v1/ranking", RankingCall, ranking, Rankings, error=error)]
