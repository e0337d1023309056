"""What OpenAI's chat completions and completions give."""

from __future__ import annotations

from typing import Any, Literal, TypedDict


class Usage(TypedDict):
    """Tokens of the prompt, template included, and of the answer, with the one that ended it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CalledFunction(TypedDict):
    """Which function, and the JSON object that it is given."""

    name: str
    arguments: str


class Called(TypedDict):
    """One call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class WrittenText(TypedDict):
    """The text that the model wrote, null where it only called."""

    role: Literal["assistant"]
    content: str | None
    refusal: None


class Message(WrittenText, total=False):
    """What the model wrote."""

    tool_calls: list[Called]


class TokenLogProb(TypedDict):
    """A token of the answer, and the logarithm of its probability."""

    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[dict[str, Any]]


class LogProbs(TypedDict):
    """One for each token that writes something."""

    content: list[TokenLogProb]
    refusal: None


class Choice(TypedDict):
    """The answer."""

    index: Literal[0]
    message: Message
    logprobs: LogProbs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


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
