"""Answers in a form: JSON by a schema, calls of tools; penalties and probabilities. Alone and beside others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import numpy as np
import pytest
from conftest import REFERENCE, Answer, Stack

from build import make
from tools.bench.server import free_ports
from tools.shim.dialects.tool_calls import ToolCall, ToolCalls

FOLDER = REFERENCE / "generation"
EXPECTED: dict[str, list[dict[str, Any]]] = json.loads((FOLDER / "expected.json").read_text("utf-8"))
SAMPLING: dict[str, Any] = json.loads((FOLDER / "sampling.json").read_text("utf-8"))
TINY = tuple(SAMPLING)
MOST = 24
NARROW = "tiny-llama-bf16"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    repository = tmp_path_factory.mktemp("repository")
    folders = [str(FOLDER / name) for name in TINY]
    assert make.main(["--task", "generate", *folders, "--repository", str(repository)]) == 0
    narrow = ["--task", "generate", folders[0], "--precision", "bf16", "--name", NARROW]
    assert make.main([*narrow, "--repository", str(repository)]) == 0
    (port,) = free_ports(1)
    options = ["--repository", str(repository), "--preload", *TINY, NARROW, "--chat-port", str(port)]
    running = Stack(tmp_path_factory.mktemp("work"), options)
    running.ports["chat"] = port
    running.start()
    yield running
    assert running.stop() == 0


def ask(server: Stack, model: str, text: str = "Say it", **fields: Any) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 600, **fields}
    return server.post("chat", "/v1/chat/completions", body)


def choice(answer: Answer) -> Any:
    assert answer.status == 200, answer.body
    return answer.json()["choices"][0]


def deltas(answer: Answer) -> list[Any]:
    """The choices of a stream."""
    assert answer.status == 200, answer.body
    lines = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines]


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def structure(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS = {
    "bounds": structure(age={"type": "integer", "minimum": -3, "maximum": 40}, sure={"type": "boolean"}),
    "choices": structure(colour={"enum": ["hé!", "ß 中d", 'blue "sky"', None]}, kind={"const": "a\nb"}),
    "strings": structure(
        word={"type": "string", "maxLength": 9}, code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}
    ),
    "lists": structure(
        row={"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
        pair={"anyOf": [{"type": "null"}, structure(x={"enum": [1, 2]})]},
    ),
    "references": {
        **structure(next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]}),
        "$defs": {"leaf": structure(day={"type": "string", "format": "date"})},
    },
}


@pytest.mark.parametrize("model", TINY)
def test_answers_follow_their_schemas_alone_and_in_company(server: Stack, model: str) -> None:
    """Random weights say anything, and yet nothing that the schema forbids; a penalty ends their spaces."""

    def answer(name: str, **fields: Any) -> Any:
        found = choice(
            ask(server, model, name, response_format=form(SCHEMAS[name]), frequency_penalty=2, **fields)
        )
        assert found["finish_reason"] == "stop", (name, found)
        jsonschema.validate(
            json.loads(found["message"]["content"]), SCHEMAS[name], format_checker=jsonschema.FormatChecker()
        )
        return found["message"]["content"]

    alone = [answer(name) for name in SCHEMAS]
    with ThreadPoolExecutor(12) as callers:
        free = callers.map(lambda one: ask(server, model, "x", max_tokens=100, seed=one, temperature=1), range(5))
        together = list(callers.map(answer, SCHEMAS))
        sampled = list(callers.map(lambda name: answer(name, temperature=1.0, seed=4), SCHEMAS))
        assert all(one.status == 200 for one in free)
    assert together == alone
    assert sampled != alone
    for name, text in zip(SCHEMAS, alone, strict=True):
        fields = {"response_format": form(SCHEMAS[name]), "frequency_penalty": 2, "stream": True}
        stream = deltas(ask(server, model, name, **fields))
        assert "".join(one["delta"].get("content", "") for one in stream) == text


@pytest.mark.parametrize("model", TINY)
def test_json_objects(server: Stack, model: str) -> None:
    found = choice(ask(server, model, response_format={"type": "json_object"}, temperature=1, seed=2, stop=["}"]))
    assert found["message"]["content"].lstrip().startswith("{")
    plain = {"type": "text"}
    free = [choice(ask(server, model, max_tokens=9, **one)) for one in ({"response_format": plain}, {})]
    assert free[0] == free[1]


NESTED: dict[str, Any] = {"type": "integer"}
for _ in range(70):
    NESTED = {"type": "array", "items": NESTED}

IMPOSSIBLE = {
    "Unsupported type": {"type": "nonsense"},
    "parenthesis is not closed": structure(a={"type": "string", "pattern": "(("}),
    "takes too long to compile": structure(a={"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"}),
    "Cannot find field nowhere": structure(a={"$ref": "#/nowhere"}),
    "properties.a has uniqueItems": structure(a={"type": "array", "uniqueItems": True, "items": {}}),
    "items has a $ref to elsewhere": {"type": "array", "items": {"$ref": "https://example.com"}},
    "the schema has type beside anyOf": {"type": "object", "anyOf": [structure(a={})]},
    "maxLength beside pattern": structure(a={"type": "string", "pattern": "^a+$", "maxLength": 2}),
    "has 'éd', which the compiler": structure(a={"enum": ["réd"]}),
    "'äd'": structure(mäd={"type": "null"}),
    "deeper than 64": NESTED,
}


@pytest.mark.parametrize("sentence", IMPOSSIBLE)
def test_schemas_that_nothing_can_follow(server: Stack, sentence: str) -> None:
    """They end their own call, and nobody else's."""
    with ThreadPoolExecutor(1) as callers:
        other = callers.submit(ask, server, "tiny-llama", max_tokens=600)
        answer = ask(server, "tiny-llama", response_format=form(IMPOSSIBLE[sentence]))
        assert other.result().status == 200
    assert answer.status == 400, answer.body
    assert sentence in answer.json()["error"]["message"]


WEATHER = structure(city={"enum": ["Paris", "Oslo"]}, days={"type": "integer", "minimum": 1, "maximum": 9})
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time", "parameters": structure(zone={"enum": ["UTC"]})}},
]
NAMED = {"type": "function", "function": {"name": "time"}}


def called(server: Stack, model: str, **fields: Any) -> list[tuple[str, Any]]:
    """Names and arguments of the calls in an answer, which a stream has, too."""
    found = choice(ask(server, model, tools=TOOLS, **fields))
    assert found["finish_reason"] == "tool_calls", found
    assert found["message"]["content"] is None
    calls = [(one["function"]["name"], one["function"]["arguments"]) for one in found["message"]["tool_calls"]]
    assert {one["type"] for one in found["message"]["tool_calls"]} == {"function"}
    stream = deltas(ask(server, model, tools=TOOLS, stream=True, **fields))
    told = [call for one in stream for call in one["delta"].get("tool_calls", [])]
    assert [(one["function"]["name"], one["function"]["arguments"]) for one in told] == calls
    assert [one["index"] for one in told] == list(range(len(calls)))
    assert len({one["id"] for one in told}) == len(calls)
    assert not any(one["delta"].get("content") for one in stream)
    assert stream[-1]["finish_reason"] == "tool_calls"
    return [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("model", TINY)
def test_tools_are_called_where_they_must_be(server: Stack, model: str) -> None:
    """By models that know of no tools: the form alone does it."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    with ThreadPoolExecutor(4) as callers:
        must = [callers.submit(called, server, model, tool_choice="required", text=text) for text in "abc"]
        one = [{"tool_choice": "required", "parallel_tool_calls": False}, {"tool_choice": NAMED}]
        only = [callers.submit(called, server, model, **fields) for fields in one]
    for found in (*must, *only):
        assert found.result()
        for name, arguments in found.result():
            jsonschema.validate(arguments, schemas[name])
    assert len(only[0].result()) == 1
    assert only[1].result() == [("time", {"zone": "UTC"})]


def test_a_free_model_may_write_what_it_likes(server: Stack) -> None:
    one = next(
        one for one in EXPECTED["tiny-qwen3"] if "tools" in one["chat"] and len(one["chat"]["messages"]) == 1
    )
    asked = {"messages": one["chat"]["messages"], "model": "tiny-qwen3", "max_tokens": MOST}
    for fields in ({"tools": one["chat"]["tools"]}, {"tools": one["chat"]["tools"], "tool_choice": "auto"}):
        found = choice(server.post("chat", "/v1/chat/completions", {**asked, **fields}))
        assert (found["message"]["content"], found["finish_reason"]) == (one["text"], "length")
        assert "tool_calls" not in found["message"]
    none = choice(ask(server, "tiny-qwen3", tools=TOOLS, tool_choice="none", max_tokens=9))
    assert none == choice(ask(server, "tiny-qwen3", max_tokens=9))


REFUSED: dict[str, dict[str, Any]] = {
    "tools[0] must have the type 'function'": {"tools": [{}]},
    "tools[0].function.name must be": {"tools": [{"type": "function", "function": {}}]},
    "parameters must be a JSON Schema": {
        "tools": [{"type": "function", "function": {"name": "a", "parameters": 1}}]
    },
    "tool_choice names no function": {
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "x"}},
    },
    "tool_choice names no function of": {"tool_choice": "required"},
    "tool_choice must be one of 'auto', 'none', 'required'": {"tools": TOOLS, "tool_choice": "x"},
    "are not for one call": {"tools": TOOLS, "response_format": {"type": "json_object"}},
    "response_format.json_schema is missing": {"response_format": {"type": "json_schema"}},
    "response_format.type must be one of": {"response_format": {"type": "xml"}},
    "no other one's": {"logprobs": True, "top_logprobs": 3},
    "unknown field 'repetition_penalty'": {"repetition_penalty": 1.1},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_refused(server: Stack, sentence: str) -> None:
    answer = ask(server, "tiny-llama", **REFUSED[sentence])
    assert answer.status == 400, answer.body
    assert sentence in answer.json()["error"]["message"]


@pytest.mark.parametrize("depth", [980, 1000, 1012])
def test_what_is_nested_too_deep(server: Stack, depth: int) -> None:
    deep = '{"a":' * depth + "1" + "}" * depth
    form_of = '"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": ' + deep + "}}"
    body = '{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, ' + form_of + "}"
    answer = server.post("chat", "/v1/chat/completions", body.encode())
    assert answer.status in (200, 400), answer.body
    assert answer.status == 200 or "in each other" in answer.json()["error"]["message"]


CALL = ToolCall("f", '{"x": "</tool_call> é"}')
TEXTS: dict[str, list[str | ToolCall]] = {
    "no call < here <tool": ["no call < here <tool"],
    'a \n<tool_call>\n{"name": "f", "arguments": {"x": "</tool_call> é"}}\n</tool_call>\n': ["a", CALL],
    '<tool_call>{"name":"g","arguments":{}}</tool_call>\n<tool_call>{"name":"g","arguments":{}}</tool_call> b ': [
        ToolCall("g", "{}"),
        ToolCall("g", "{}"),
        "b ",
    ],
    'x <tool_call>{"name":"g","arguments":{}}': ["x", ToolCall("g", "{}")],
    ' <tool_call>{"name": "g"}</tool_call> y': [' <tool_call>{"name": "g"}</tool_call> y'],
    '<tool_call>{"name":"g","arguments":{"a": NaN}}</tool_call>': [
        '<tool_call>{"name":"g","arguments":{"a": NaN}}</tool_call>'
    ],
    '<tool_call>{"name":"g","arguments":"{}"}</tool_call><tool_call>{"name":"g","arguments":{}}</tool_call>': [
        '<tool_call>{"name":"g","arguments":"{}"}</tool_call>',
        ToolCall("g", "{}"),
    ],
    '<tool_call>{"name":"g","arguments":{"a": "': ['<tool_call>{"name":"g","arguments":{"a": "'],
    "<tool_call>" + "[" * 9000 + "</tool_call>": ["<tool_call>" + "[" * 9000 + "</tool_call>"],
}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_calls_in_a_text(size: int) -> None:
    for text, expected in TEXTS.items():
        calls, found = ToolCalls(), list[str | ToolCall]()
        for start in range(0, len(text), size):
            found += calls.take(text[start : start + size])
        found += calls.end()
        joined: list[str | ToolCall] = []
        for part in found:
            if joined and isinstance(part, str) and isinstance(joined[-1], str):
                joined[-1] += part
            else:
                joined.append(part)
        assert joined == expected
        only = ToolCalls(1)
        first = [part for part in (*only.take(text), *only.end()) if isinstance(part, ToolCall)]
        assert first == [part for part in expected if isinstance(part, ToolCall)][:1]
        assert calls.count == sum(isinstance(part, ToolCall) for part in expected)


@pytest.mark.parametrize("model", TINY)
def test_probabilities_are_the_references(server: Stack, model: str) -> None:
    """Those of the model, whatever is asked of the answer besides."""

    def told(number: str, **fields: Any) -> Any:
        body = {**EXPECTED[model][int(number)]["chat"], "model": model, "max_tokens": MOST, "logprobs": True}
        return server.post("chat", "/v1/chat/completions", body | fields)

    special = [
        token["id"]
        for token in json.loads((FOLDER / model / "tokenizer.json").read_text())["added_tokens"]
        if token["special"]
    ]
    for number, values in SAMPLING[model]["log_probs"].items():
        ids = EXPECTED[model][int(number)]["answer_ids"]
        expected = [value for token, value in zip(ids, values, strict=True) if token not in special]
        text = EXPECTED[model][int(number)]["text"]
        with ThreadPoolExecutor(4) as callers:
            answers = list(callers.map(told, [number] * 4))
        for answer in answers:
            content = choice(answer)["logprobs"]["content"]
            np.testing.assert_allclose([one["logprob"] for one in content], expected, rtol=0, atol=1e-4)
            assert b"".join(bytes(one["bytes"]) for one in content).decode("utf-8", "replace") == text
        stream = deltas(told(number, stream=True))
        in_stream = [one for part in stream for one in (part["logprobs"] or {"content": []})["content"]]
        assert [one["bytes"] for one in in_stream] == [one["bytes"] for one in content]
        np.testing.assert_allclose([one["logprob"] for one in in_stream], expected, rtol=0, atol=1e-4)
        greedy = choice(told(number, temperature=1.5, top_p=0.0001))
        np.testing.assert_allclose(
            [one["logprob"] for one in greedy["logprobs"]["content"]], expected, rtol=0, atol=1e-4
        )


def test_bf16_is_near_the_reference(server: Stack) -> None:
    """Each first token is the reference's, with a probability within 0.1 of its logarithm; so are most of all."""
    model, shares = TINY[0], []
    for number, values in SAMPLING[model]["log_probs"].items():
        one = EXPECTED[model][int(number)]
        body = {**one["chat"], "model": NARROW, "max_tokens": MOST, "logprobs": True}
        found = choice(server.post("chat", "/v1/chat/completions", body))
        told = found["logprobs"]["content"]
        assert found["message"]["content"][:1] == one["text"][:1]
        assert abs(told[0]["logprob"] - values[0]) < 0.1
        text = found["message"]["content"]
        same = next((i for i, (a, b) in enumerate(zip(text, one["text"], strict=False)) if a != b), len(text))
        shares.append(same / len(one["text"]))
    assert np.mean(shares) > 0.3


@pytest.mark.parametrize("model", TINY)
def test_penalties_are_openais(server: Stack, model: str) -> None:
    """Alone, and beside others with other penalties."""

    def answer(one: dict[str, Any]) -> str:
        fields = {name: one[name] for name in ("frequency_penalty", "presence_penalty")}
        body = {**EXPECTED[model][one["chat"]]["chat"], "model": model, "max_tokens": len(one["answer_ids"])}
        return str(choice(server.post("chat", "/v1/chat/completions", body | fields))["message"]["content"])

    expected = SAMPLING[model]["penalised"]
    with ThreadPoolExecutor(len(expected)) as callers:
        assert list(callers.map(answer, expected)) == [one["text"] for one in expected]
    for one in expected[::5]:
        assert answer(one) == one["text"]
