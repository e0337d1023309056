"""Bad input gets its status and a sentence, and the next good request still works."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Stack, send

EMBED = "/embed"
RERANK = "/rerank"
BODY_LIMIT = 16 * 2**20

# name: (route, body, status, type, words of the sentence)
CASES: dict[str, tuple[str, object, int, str, str]] = {
    "not JSON": (EMBED, b'{"texts": [', 400, "bad_request", "not valid JSON"),
    "no body": (EMBED, b"", 400, "bad_request", "not valid JSON"),
    "bad UTF-8": (EMBED, b'{"texts": ["\xff\xfe"]}', 400, "bad_request", "not valid JSON"),
    "NaN": (EMBED, b'{"texts": NaN}', 400, "bad_request", "not valid JSON"),
    "lone surrogate": (EMBED, b'{"texts": ["\\ud800"]}', 400, "bad_request", "surrogate"),
    "deeply nested": (EMBED, b"[" * 100_000, 400, "bad_request", "not valid JSON"),
    "a list": (EMBED, ["a"], 400, "bad_request", "JSON object"),
    "no texts": (EMBED, {}, 400, "bad_request", "'texts' is missing"),
    "texts a string": (EMBED, {"texts": "a"}, 400, "bad_request", "texts must be a list"),
    "texts null": (EMBED, {"texts": None}, 400, "bad_request", "texts must be a list"),
    "a number among texts": (EMBED, {"texts": ["a", 1]}, 400, "bad_request", "texts[1] must be a string"),
    "a null among texts": (EMBED, {"texts": [None]}, 400, "bad_request", "texts[0] must be a string, not null"),
    "empty list": (EMBED, {"texts": []}, 400, "bad_request", "texts is empty"),
    "empty text": (EMBED, {"texts": ["a", ""]}, 400, "bad_request", "texts[1] is empty"),
    "whitespace only": (EMBED, {"texts": [" \t\n\u00a0"]}, 400, "bad_request", "texts[0] is empty"),
    "NUL only": (EMBED, {"texts": ["a", "\0"]}, 400, "bad_request", "a text is empty"),
    "zero-width only": (EMBED, {"texts": ["\u200b\u200d"]}, 400, "bad_request", "a text is empty"),
    "unknown field": (EMBED, {"texts": ["a"], "normalise": True}, 400, "bad_request", "'normalise'"),
    "model a number": (EMBED, {"texts": ["a"], "model": 1}, 400, "bad_request", "model must be"),
    "unknown model": (EMBED, {"texts": ["a"], "model": "none"}, 404, "unknown_model", "has: minilm"),
    "reranker asked to embed": (EMBED, {"texts": ["a"], "model": "minilm-rerank"}, 404, "unknown_model", "minilm"),
    "10,000 texts": (EMBED, {"texts": ["a"] * 10_000}, 413, "too_large", "at most 2048"),
    "body over the limit": (EMBED, {"texts": ["a" * BODY_LIMIT]}, 413, "too_large", "fewer texts"),
    "unknown route": ("/embeddings-of", {"texts": ["a"]}, 404, "not_found", "no such route"),
    "no query": (RERANK, {"documents": ["a"]}, 400, "bad_request", "'query' is missing"),
    "empty query": (RERANK, {"query": " ", "documents": ["a"]}, 400, "bad_request", "query is empty"),
    "query a list": (RERANK, {"query": ["a"], "documents": ["a"]}, 400, "bad_request", "query must be a string"),
    "no documents": (RERANK, {"query": "a", "documents": []}, 400, "bad_request", "documents is empty"),
    "empty document": (
        RERANK,
        {"query": "a", "documents": ["b", ""]},
        400,
        "bad_request",
        "documents[1] is empty",
    ),
    "unknown reranker": (
        RERANK,
        {"query": "a", "documents": ["b"], "model": "minilm"},
        404,
        "unknown_model",
        "has: minilm-rerank",
    ),
}


@pytest.fixture(autouse=True)
def good_request_afterwards(stack: Stack) -> Iterator[None]:
    """Whatever a test has sent, the next good request is answered."""
    yield
    assert stack.embed(["all is well"]).shape == (1, 384)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_with_a_sentence(stack: Stack, name: str) -> None:
    route, body, status, kind, words = CASES[name]
    answer = stack.post("embed", route, body)
    content = answer.json()
    assert (answer.status, content["type"]) == (status, kind)
    assert words in content["error"]
    assert "Traceback" not in content["error"]


def test_wrong_method(stack: Stack) -> None:
    answer = stack.get("embed", EMBED)
    assert answer.status == 405
    assert "takes POST" in answer.json()["error"]


def test_a_text_of_1_mb_is_cut_to_the_window(stack: Stack) -> None:
    long, words = stack.embed(["seven " * 170_000, "seven " * 254])
    assert (long == words).all()


def test_nul_inside_a_text_is_left_out_as_the_tokenizer_does(stack: Stack) -> None:
    with_nul, without = stack.embed(["he\0llo", "hello"])
    assert (with_nul == without).all()


def test_any_content_type_is_read_as_json(stack: Stack) -> None:
    request = urllib.request.Request(
        stack.url("embed", EMBED), json.dumps({"texts": ["a"]}).encode(), {"Content-Type": "text/plain"}
    )
    assert send(request).status == 200


def test_a_malformed_http_request_is_refused(stack: Stack) -> None:
    with socket.create_connection(("127.0.0.1", stack.ports["embed"]), timeout=30) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        assert b" 400 " in connection.recv(4096).splitlines()[0]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"text": ""}, "empty"),
        ({"text": "\0"}, "empty"),
        ({"text": "a", "prompt_name": "none"}, "prompt_name 'none' is unknown"),
    ],
)
def test_v2_infer_refuses_what_cannot_be_embedded(stack: Stack, inputs: dict[str, str], words: str) -> None:
    tensors = [
        {"name": name, "datatype": "BYTES", "shape": [1, 1], "data": [value]} for name, value in inputs.items()
    ]
    answer = stack.post("http", "/v2/models/minilm/infer", {"inputs": tensors})
    assert answer.status == 400
    assert words in answer.json()["error"]


def test_a_bad_text_does_not_fail_its_neighbours(stack: Stack) -> None:
    """Requests that Triton merges into one batch fail one by one."""
    bad, good = (
        {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": [text]}]}
        for text in ("\0", "a")
    )
    with ThreadPoolExecutor(16) as clients:
        answers = list(
            clients.map(lambda body: stack.post("http", "/v2/models/minilm/infer", body), [bad, good] * 40)
        )
    assert [answer.status for answer in answers] == [400, 200] * 40
