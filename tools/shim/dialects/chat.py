"""OpenAI's chat completions and completions, over a model that writes."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

import orjson

from tools.shim.body import Positive, Text
from tools.shim.dialects import openai
from tools.shim.errors import bad_request
from tools.shim.gateway import Gateway
from tools.shim.generation import Generation, Wish, generate, strings
from tools.shim.routes import Post, Reply

Number = float | int

MAX_STOPS = 16

NO_LOGPROBS = "probabilities of tokens are not given"
ONE = "a call gets one answer: send it again for another"
NO_BIAS = "tokens of this server are no other's: leave logit_bias out"
TEXT_ALONE = "this server's models write text only"
NO_CHOICE = "the model itself decides whether it calls a tool: 'auto', or leave tool_choice out"
PLAIN = "answers are free text: say in the prompt what form they are to have"


@dataclass(frozen=True)
class StreamOptions:
    """What a stream tells besides."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: Annotated[Literal[False], "usage comes once, at the end"] | None = None


@dataclass(frozen=True)
class ResponseFormat:
    """The form of an answer."""

    type: Annotated[Literal["text"], PLAIN]


@dataclass(frozen=True)
class ChatCall:
    """Messages to answer; those fields that nothing here depends on are taken and change nothing."""

    messages: list[dict[str, Any]]
    model: str | None = None
    frequency_penalty: Number | None = None
    logit_bias: Annotated[None, NO_BIAS] = None
    logprobs: Annotated[Literal[False], NO_LOGPROBS] | None = None
    top_logprobs: Annotated[Literal[0], NO_LOGPROBS] | None = None
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
    stop: str | list[str] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Number | None = None
    tool_choice: Annotated[Literal["auto", "none"], NO_CHOICE] | None = None
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
    stop: str | list[str] | None = None
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


class Usage(TypedDict):
    """Tokens of the prompt, template included, and of the answer, with the one that ended it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Message(TypedDict):
    """What the model wrote."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(TypedDict):
    """The answer."""

    index: Literal[0]
    message: Message
    logprobs: None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(TypedDict):
    """A whole answer; a stream has `chat.completion.chunk` objects as server-sent events instead."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class TextChoice(TypedDict):
    """What follows the prompt."""

    index: Literal[0]
    text: str
    logprobs: None
    finish_reason: Literal["stop", "length"]


class Completion(TypedDict):
    """A whole answer; a stream has such objects as server-sent events, a piece of the text each."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


async def chat(gateway: Gateway, call: ChatCall) -> Reply:
    """Answers messages."""
    asked = {"messages": [message(one, i) for i, one in enumerate(call.messages)]}
    if call.tools and call.tool_choice != "none":
        asked["tools"] = call.tools
    asked |= reserved(call.chat_template_kwargs or {})
    if not call.messages:
        raise bad_request("messages is empty: send one at least")
    tokens = call.max_completion_tokens or call.max_tokens
    inputs = {"chat": strings([json.dumps(asked, ensure_ascii=False)])}
    generation = await generate(gateway, call.model, inputs, wish(call, tokens))
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": generation.model.name}
    if call.stream:
        return Reply(None, generation=generation, events=chat_events(generation, head, call.stream_options))
    text = await generation.whole()
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": generation.reason,
    }
    content = {**head, "object": "chat.completion", "choices": [choice], "usage": usage(generation)}
    return Reply(content, generation=generation)


async def completion(gateway: Gateway, call: CompletionCall) -> Reply:
    """Goes on with a prompt."""
    prompts = [call.prompt] if isinstance(call.prompt, str) else call.prompt
    if len(prompts) != 1:
        raise bad_request(f"prompt has {len(prompts)} texts: send each in a call of its own")
    inputs = {"text_input": strings(prompts)}
    generation = await generate(gateway, call.model, inputs, wish(call, call.max_tokens))
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
    head["model"] = generation.model.name
    if call.stream:
        return Reply(None, generation=generation, events=text_events(generation, head, call.stream_options))
    text = await generation.whole()
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": generation.reason}
    return Reply({**head, "choices": [choice], "usage": usage(generation)}, generation=generation)


def wish(call: ChatCall | CompletionCall, max_tokens: int | None) -> Wish:
    """What a call says of sampling and of the end; raises GatewayError 400 for a value out of its range."""
    ranges = {"temperature": (0, 2), "top_p": (0, 1), "frequency_penalty": (-2, 2), "presence_penalty": (-2, 2)}
    for name, (least, most) in ranges.items():
        value = getattr(call, name)
        if value is not None and not least <= value <= most:
            raise bad_request(f"{name} must be from {least} to {most}, not {value}")
    if call.seed is not None and not 0 <= call.seed < 2**63:
        raise bad_request(f"seed must be from 0 to {2**63 - 1}, not {call.seed}")
    if max_tokens is not None and max_tokens >= 2**31:
        raise bad_request(f"max_tokens must be below {2**31}, not {max_tokens}")
    stops = [call.stop] if isinstance(call.stop, str) else call.stop or []
    if len(stops) > MAX_STOPS or not all(stops):
        raise bad_request(f"stop must be up to {MAX_STOPS} strings of one character at least")
    return Wish(
        max_tokens,
        call.temperature,
        call.top_p,
        call.seed,
        call.frequency_penalty,
        call.presence_penalty,
        stops,
    )


def reserved(options: dict[str, Any]) -> dict[str, Any]:
    """What a template takes besides; raises GatewayError 400 for what the call has a field of its own for."""
    if taken := {"messages", "tools", "documents", "add_generation_prompt"}.intersection(options):
        raise bad_request(f"chat_template_kwargs has {', '.join(sorted(taken))}, which cannot be set there")
    return options


def message(said: dict[str, Any], i: int) -> dict[str, Any]:
    """A message as templates know it: text is one string, and a tool's arguments are an object."""
    place = f"messages[{i}]"
    if not isinstance(said.get("role"), str):
        raise bad_request(f"{place}.role must be a string, such as 'user'")
    found = {key: value for key, value in said.items() if value is not None}
    content = said.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise bad_request(f"{place}.content has a part that is no text: {TEXT_ALONE}")
        found["content"] = "".join(str(part) for part in parts)
    elif content is None:
        found["content"] = ""
    elif not isinstance(content, str):
        raise bad_request(f"{place}.content must be a string or a list of parts of text")
    if "tool_calls" in found:
        found["tool_calls"] = called(found["tool_calls"], place)
    return found


def called(calls: Any, place: str) -> list[dict[str, Any]]:
    """Calls of tools, their arguments read."""
    try:
        return [
            {**call, "function": {**call["function"], "arguments": read_arguments(call["function"]["arguments"])}}
            for call in calls
        ]
    except (TypeError, KeyError, ValueError):
        raise bad_request(f"{place}.tool_calls must have functions with a name and arguments in JSON") from None


def read_arguments(arguments: Any) -> Any:
    """What a tool is given, which clients send as JSON in a string."""
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def usage(generation: Generation) -> Usage:
    """What an answer took."""
    return {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.tokens,
        "total_tokens": generation.prompt_tokens + generation.tokens,
    }


async def chat_events(
    generation: Generation, head: dict[str, Any], options: StreamOptions | None
) -> AsyncGenerator[bytes, None]:
    """An answer as server-sent events."""
    chunk = {**head, "object": "chat.completion.chunk"}
    delta: dict[str, Any] = {"role": "assistant", "content": ""}
    async with aclosing(generation.pieces()) as pieces:
        async for piece in pieces:
            if piece or "role" in delta:
                yield event(chunk, {"delta": {**delta, "content": piece}, "finish_reason": None})
                delta = {}
    yield event(chunk, {"delta": {}, "finish_reason": generation.reason})
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
