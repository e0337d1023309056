"""vLLM's score: pairs of texts; its embeddings are OpenAI's and its rerank Jina's."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict

from tools.shim.body import Lenient, Query
from tools.shim.dialects import openai
from tools.shim.dialects.cohere import INSTRUCTION
from tools.shim.dialects.lengths import check_tokens
from tools.shim.dialects.openai import TEXT_ALONE
from tools.shim.errors import bad_request
from tools.shim.gateway import Gateway
from tools.shim.routes import Get, Post, Reply


@dataclass(frozen=True)
class ScoreCall(Lenient):
    """One text against one or many, or as many against as many, pair by pair; newer names are on the right.

    `text_1` or `queries` or `data_1`; `text_2` or `documents` or `data_2` or `items`.
    """

    text_1: Query | list[Query] | None = None
    text_2: str | list[str] | None = None
    queries: Query | list[Query] | None = None
    documents: str | list[str] | None = None
    data_1: Query | list[Query] | None = None
    data_2: str | list[str] | None = None
    items: str | list[str] | None = None
    model: str | None = None
    instruction: Query | None = None
    chat_template_kwargs: Annotated[None, INSTRUCTION] = None
    max_tokens_per_query: int | None = None
    max_tokens_per_doc: int | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Annotated[Literal["right"], "texts are cut at their end only"] | None = None
    use_activation: bool | None = None
    activation: bool | None = None
    softmax: bool | None = None
    user: str | None = None
    request_id: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    mm_processor_kwargs: Annotated[None, TEXT_ALONE] = None


class Score(TypedDict):
    """One pair, by its place in the call."""

    index: int
    object: Literal["score"]
    score: float


class Scores(TypedDict):
    """The scores in order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: openai.Usage


async def score(gateway: Gateway, call: ScoreCall) -> Reply:
    """Scores pairs."""
    left, queries = either(call, "text_1", "queries", "data_1")
    right, documents = either(call, "text_2", "documents", "data_2", "items")
    if len(queries) not in (1, len(documents)):
        raise bad_request(
            f"{left} has {len(queries)} texts and {right} has {len(documents)}: send one, or as many as in {right}"
        )
    query = queries[0] if len(queries) == 1 else queries
    result = await gateway.rerank(query, documents, call.model, instruction=call.instruction)
    check_tokens(result, call.truncate_prompt_tokens, "truncate_prompt_tokens")
    for field in ("max_tokens_per_query", "max_tokens_per_doc"):
        # 0, their default, bounds nothing.
        check_tokens(result, getattr(call, field) or None, field)
    is_raw = False in (call.use_activation, call.activation, call.softmax)
    values = result.logits if is_raw else result.scores
    data = [{"index": i, "object": "score", "score": float(value)} for i, value in enumerate(values)]
    usage = {"prompt_tokens": result.tokens, "total_tokens": result.tokens}
    content = {
        "id": f"score-{uuid.uuid4()}",
        "object": "list",
        "created": 0,
        "model": result.model.name,
        "data": data,
        "usage": usage,
    }
    return Reply(content, result)


def either(call: ScoreCall, *names: str) -> tuple[str, list[str]]:
    """Which of the fields `names` was sent, and its texts; raises GatewayError 400 where none or several were."""
    sent = {name: texts for name in names if (texts := getattr(call, name)) is not None}
    if not sent:
        raise bad_request(f"the field {names[0]!r} is missing")
    if len(sent) > 1:
        raise bad_request(f"send one of {' and '.join(sent)}, not several")
    ((name, texts),) = sent.items()
    return name, [texts] if isinstance(texts, str) else texts


ROUTES: list[Post | Get] = [
    Post(path, ScoreCall, score, Scores, error=openai.error) for path in ("/v1/score", "/score")
]
