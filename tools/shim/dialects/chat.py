"""OpenAI's chat completions and completions, over a model that writes."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import orjson

from tools.shim.body import MAY_BE_EMPTY, Positive, Text
from tools.shim.dialects import openai
from tools.shim.dialects.chat_answers import ChatCompletion, Completion, LogProbs, TokenLogProb, Usage
from tools.shim.dialects.chat_messages import TEXT_ALONE, message, reserved
from tools.shim.dialects.guides import calls_guide, function_of
from tools.shim.dialects.tool_calls import ToolCall, ToolCalls
from tools.shim.errors import bad_request
from tools.shim.gateway import Gateway
from tools.shim.generation import Generation, Guide, Sampling, as_json, generate, strings
from tools.shim.routes import Post, Reply

Number = float | int

MAX_STOPS = 16

NO_LOGPROBS = "probabilities of tokens are not given"
NO_OTHERS = "the probability of the token itself is told, and no other one's"
ONE = "a call gets one answer: send it again for another"
NO_BIAS = "tokens of this server are no other's: leave logit_bias out"


@dataclass(frozen=True)
class StreamOptions:
    """What a stream tells besides."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: Annotated[Literal[False], "usage comes once, at the end"] | None = None


@dataclass(frozen=True)
class JsonSchema:
    """What an answer in JSON follows, strict or not."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


@dataclass(frozen=True)
class ResponseFormat:
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


@dataclass(frozen=True)
class ChatCall:
    """Messages to answer; those fields that nothing here depends on are taken and change nothing."""

    messages: list[dict[str, Any]]
    model: str | None = None
    frequency_penalty: Number | None = None
    logit_bias: Annotated[None, NO_BIAS] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Literal[0], NO_OTHERS] | None = None
    max_completion_tokens: Positive | None = None
    max_tokens: Positive | None = None
    metadata: dict[str, Any] | None = None
    modalities: list[Annotated[Literal["text"], TEXT_ALONE]] | None = None
    n: Annotated[Literal[1], ONE] | None = None
    parallel_tool_calls: bool | None = None
    presence_penalty: Number | None = None
    prompt_cache_key: str | None = None
    response_format: ResponseFormat | None = None
    safety_identifier: str | None = None
    seed: int | None = None
    service_tier: str | None = None
    stop: str | Annotated[list[str], MAY_BE_EMPTY] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Number | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    top_p: Number | None = None
    user: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class CompletionCall:
    """A prompt to go on with, as it is: no template is put around it."""

    prompt: Text | list[Text]
    model: str | None = None
    best_of: Annotated[Literal[1], ONE] | None = None
    echo: Annotated[Literal[False], "an answer comes without its prompt"] | None = None
    frequency_penalty: Number | None = None
    logit_bias: Annotated[None, NO_BIAS] = None
    logprobs: Annotated[Literal[0], NO_LOGPROBS] | None = None
    max_tokens: Positive | None = None
    n: Annotated[Literal[1], ONE] | None = None
    presence_penalty: Number | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], MAY_BE_EMPTY] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    suffix: Annotated[Literal[""], "a model goes on behind its prompt only"] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    user: str | None = None

    @staticmethod
    def check(content: dict[str, Any]) -> None:
        """Refuses token ids in their own words."""
        openai.refuse_token_ids(content, "prompt")


async def chat(gateway: Gateway, call: ChatCall) -> Reply:
    """Answers messages."""
    asked = {"messages": [message(one, i) for i, one in enumerate(call.messages)]}
    tools = call.tools if call.tool_choice != "none" else None
    if tools:
        asked["tools"] = tools
    asked |= reserved(call.chat_template_kwargs or {})
    inputs = {"chat": strings([as_json(asked)])}
    limit = "max_completion_tokens" if call.max_completion_tokens else "max_tokens"
    sampling = replace(sampling_of(call, limit), guide=guide(call), log_probs=bool(call.logprobs))
    generation = await generate(gateway, call.model, inputs, sampling)
    calls = ToolCalls(1 if call.parallel_tool_calls is False else None) if tools else None
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": generation.model.name}
    if call.stream:
        return Reply(None, generation=generation, events=chat_events(generation, calls, head, call.stream_options))
    found = [part async for part in parts(generation, calls)]
    text = "".join(part for part in found if isinstance(part, str))
    called = [part.content() for part in found if isinstance(part, ToolCall)]
    said: dict[str, Any] = {"role": "assistant", "content": text or (None if called else ""), "refusal": None}
    choice = {
        "index": 0,
        "message": said | ({"tool_calls": called} if called else {}),
        "logprobs": log_probs(generation),
        "finish_reason": finish_reason(generation, calls),
    }
    content = {**head, "object": "chat.completion", "choices": [choice], "usage": usage(generation)}
    return Reply(content, generation=generation)


def guide(call: ChatCall) -> Guide | None:
    """What the answer follows; raises GatewayError 400 for what none can."""
    form = call.response_format
    has_form = form is not None and form.type != "text"
    choice = call.tool_choice or "auto"
    functions = [function_of(tool, f"tools[{i}]") for i, tool in enumerate(call.tools or [])]
    if form is not None and form.type == "json_schema" and form.json_schema is None:
        raise bad_request("response_format.json_schema is missing: it has a name and a schema")
    if has_form and functions and choice != "none":
        raise bad_request("response_format and tools are not for one call: leave one out, or tool_choice 'none'")
    if form is not None and has_form:
        schema = {"type": "object"} if form.json_schema is None else form.json_schema.schema
        return "json_schema", as_json(schema)
    if choice == "none":
        return None
    return calls_guide(functions, choice, call.parallel_tool_calls is False)


async def parts(generation: Generation, calls: ToolCalls | None) -> AsyncGenerator[str | ToolCall, None]:
    """An answer as it comes: texts, and calls if these may be in it."""
    async with aclosing(generation.pieces()) as pieces:
        async for piece in pieces:
            for part in calls.take(piece) if calls else [piece]:
                yield part
    for part in calls.end() if calls else []:
        yield part


def finish_reason(generation: Generation, calls: ToolCalls | None) -> str:
    """Why an answer has ended, for its caller."""
    return "tool_calls" if calls and calls.count and generation.reason == "stop" else generation.reason


def log_probs(generation: Generation) -> LogProbs | None:
    """Those that have come since the last call; None where there are none."""
    told, generation.log_probs = generation.log_probs, []
    content: list[TokenLogProb] = [
        {
            "token": one.token.decode("utf-8", "replace"),
            "bytes": list(one.token),
            "logprob": one.value,
            "top_logprobs": [],
        }
        for one in told
    ]
    return {"content": content, "refusal": None} if content else None


async def completion(gateway: Gateway, call: CompletionCall) -> Reply:
    """Goes on with a prompt."""
    prompts = [call.prompt] if isinstance(call.prompt, str) else call.prompt
    if len(prompts) != 1:
        raise bad_request(f"prompt has {len(prompts)} texts: send each in a call of its own")
    inputs = {"text_input": strings(prompts)}
    generation = await generate(gateway, call.model, inputs, sampling_of(call, "max_tokens"))
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
    head["model"] = generation.model.name
    if call.stream:
        return Reply(None, generation=generation, events=text_events(generation, head, call.stream_options))
    text = await generation.whole()
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": generation.reason}
    return Reply({**head, "choices": [choice], "usage": usage(generation)}, generation=generation)


def sampling_of(call: ChatCall | CompletionCall, limit: str) -> Sampling:
    """What a call says of sampling and of the end, of which the field `limit` has the number of tokens.

    Raises GatewayError 400 for a value out of its range.
    """
    max_tokens: int | None = getattr(call, limit)
    ranges = {"temperature": (0, 2), "top_p": (0, 1), "frequency_penalty": (-2, 2), "presence_penalty": (-2, 2)}
    for name, (least, most) in ranges.items():
        value = getattr(call, name)
        if value is not None and not least <= value <= most:
            raise bad_request(f"{name} must be from {least} to {most}, not {value}")
    if call.seed is not None and not 0 <= call.seed < 2**63:
        raise bad_request(f"seed must be from 0 to {2**63 - 1}, not {call.seed}")
    if max_tokens is not None and max_tokens >= 2**31:
        raise bad_request(f"{limit} must be below {2**31}, not {max_tokens}")
    stops = [call.stop] if isinstance(call.stop, str) else call.stop or []
    if len(stops) > MAX_STOPS or not all(stops):
        raise bad_request(f"stop must be up to {MAX_STOPS} strings of one character at least")
    return Sampling(
        max_tokens,
        call.temperature,
        call.top_p,
        call.seed,
        call.frequency_penalty,
        call.presence_penalty,
        stops,
    )


def usage(generation: Generation) -> Usage:
    """What an answer took."""
    return {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.tokens,
        "total_tokens": generation.prompt_tokens + generation.tokens,
    }


async def chat_events(
    generation: Generation, calls: ToolCalls | None, head: dict[str, Any], options: StreamOptions | None
) -> AsyncGenerator[bytes, None]:
    """An answer as server-sent events."""
    chunk = {**head, "object": "chat.completion.chunk"}
    delta: dict[str, Any] = {"role": "assistant", "content": ""}
    number = itertools.count()
    async with aclosing(parts(generation, calls)) as found:
        async for part in found:
            if isinstance(part, ToolCall):
                delta["tool_calls"] = [{"index": next(number), **part.content()}]
            elif part or "role" in delta:
                delta["content"] = part
            if delta:
                yield event(chunk, {"delta": delta, "logprobs": log_probs(generation), "finish_reason": None})
                delta = {}
    if delta:
        yield event(chunk, {"delta": delta, "finish_reason": None})
    reason = finish_reason(generation, calls)
    yield event(chunk, {"delta": {}, "logprobs": log_probs(generation), "finish_reason": reason})
    for last in endings(generation, chunk, options):
        yield last


async def text_events(
    generation: Generation, head: dict[str, Any], options: StreamOptions | None
) -> AsyncGenerator[bytes, None]:
    """The same of a completion."""
    async with aclosing(generation.pieces()) as pieces:
        async for piece in pieces:
            if piece:
                yield event(head, {"text": piece, "finish_reason": None})
    yield event(head, {"text": "", "finish_reason": generation.reason})
    for last in endings(generation, head, options):
        yield last


def event(head: dict[str, Any], choice: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return as_event({**head, "choices": [{"index": 0, "logprobs": None, **choice}]})


def endings(generation: Generation, head: dict[str, Any], options: StreamOptions | None) -> list[bytes]:
    """What a stream ends with."""
    wanted = options is not None and options.include_usage
    last = [as_event({**head, "choices": [], "usage": usage(generation)})] if wanted else []
    return [*last, b"data: [DONE]\n\n"]


def as_event(content: object) -> bytes:
    """One object as a server-sent event."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


ROUTES = [
    Post("/v1/chat/completions", ChatCall, chat, ChatCompletion, error=openai.error, streams=True),
    Post("/v1/completions", CompletionCall, completion, Completion, error=openai.error, streams=True),
]
