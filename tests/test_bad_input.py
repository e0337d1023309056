"""Bad input gets its status and a sentence, and the next good request still works."""

from __future__ import annotations

import json
import math
import socket
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import Answer, Stack, send
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EMBED = "/embed"
RERANK = "/rerank"
BODY_LIMIT = 16 * 2**20

# name: (route, body, status, type, words of the sentence)
CASES: dict[str, tuple[str, object, int, str, str]] = {
    "not JSON": (EMBED, b'{"texts": [', 400, "bad_request", "not valid JSON"),
    "no body": (EMBED, b"", 400, "bad_request", "not valid JSON"),
    "bad UTF-8": (EMBED, b'{"texts": ["\xff\xfe"]}', 400, "bad_request", "not valid JSON"),
    "NaN": (EMBED, b'{"texts": NaN}', 400, "bad_request", "not valid JSON"),
    "lone surrogate": (EMBED, b'{"texts": ["a", "b\\ud800"]}', 400, "bad_request", "texts[1] is not valid JSON"),
    "lone surrogate in a name": (EMBED, b'{"texts": ["a"], "\\udc00": 1}', 400, "bad_request", "surrogate"),
    "deeply nested": (EMBED, b"[" * 50_000, 400, "bad_request", "not valid JSON"),
    "nested deeper": (EMBED, b"[" * 100_000, 413, "too_large", "at most 2048"),
    "deep inside": (EMBED, b'{"texts": ' + b"[" * 900 + b"]" * 900 + b"}", 400, "bad_request", "not a list"),
    "Infinity": (EMBED, b'{"texts": [Infinity]}', 400, "bad_request", "not valid JSON"),
    "a number past all bounds": (EMBED, b'{"texts": [1e999]}', 400, "bad_request", "not valid JSON"),
    "UTF-16": (EMBED, '{"texts": ["a"]}'.encode("utf-16"), 400, "bad_request", "not valid JSON"),
    "a byte order mark": (EMBED, '{"texts": ["a"]}'.encode("utf-8-sig"), 400, "bad_request", "not valid JSON"),
    "a list": (EMBED, ["a"], 400, "bad_request", "JSON object"),
    "no texts": (EMBED, {}, 400, "bad_request", "'texts' is missing"),
    "texts a string": (EMBED, {"texts": "a"}, 400, "bad_request", "texts must be a list"),
    "texts null": (EMBED, {"texts": None}, 400, "bad_request", "texts must be a list"),
    "a number among texts": (EMBED, {"texts": ["a", 1]}, 400, "bad_request", "texts[1] must be a string"),
    "a null among texts": (EMBED, {"texts": [None]}, 400, "bad_request", "texts[0] must be a string, not null"),
    "empty list": (EMBED, {"texts": []}, 400, "bad_request", "texts is empty"),
    "empty text": (EMBED, {"texts": ["a", ""]}, 400, "bad_request", "texts[1] is empty"),
    "unknown field": (EMBED, {"texts": ["a"], "normalise": True}, 400, "bad_request", "'normalise'"),
    "fewer dimensions": (
        EMBED,
        {"texts": ["a"], "dimensions": 8},
        400,
        "bad_request",
        "built under another --name",
    ),
    "too many dimensions": (
        EMBED,
        {"texts": ["a"], "dimensions": 500},
        400,
        "bad_request",
        "gives 384 dimensions: a",
    ),
    "truncate a word": (
        EMBED,
        {"texts": ["a"], "truncate": "END"},
        400,
        "bad_request",
        "truncate must be a boolean",
    ),
    "model a number": (EMBED, {"texts": ["a"], "model": 1}, 400, "bad_request", "model must be"),
    "unknown model": (EMBED, {"texts": ["a"], "model": "none"}, 404, "unknown_model", "has: minilm"),
    "reranker asked to embed": (EMBED, {"texts": ["a"], "model": "minilm-rerank"}, 404, "unknown_model", "minilm"),
    "10,000 texts": (EMBED, {"texts": ["a"] * 10_000}, 413, "too_large", "at most 2048"),
    "1,000,000 texts": (EMBED, {"texts": ["a"] * 1_000_000}, 413, "too_large", "at most 2048"),
    "100 MB": (EMBED, b'{"texts": ["' + b"a" * 100_000_000, 413, "too_large", "fewer or shorter texts"),
    "body over the limit": (EMBED, {"texts": ["a" * BODY_LIMIT]}, 413, "too_large", "fewer or shorter texts"),
    "unknown route": ("/embeddings-of", {"texts": ["a"]}, 404, "not_found", "no such route: GET /docs lists"),
    "no query": (RERANK, {"documents": ["a"]}, 400, "bad_request", "'query' is missing"),
    "empty query": (RERANK, {"query": " ", "documents": ["a"]}, 400, "bad_request", "query is empty"),
    "query a list": (RERANK, {"query": ["a"], "documents": ["a"]}, 400, "bad_request", "query must be a string"),
    "no documents": (RERANK, {"query": "a", "documents": []}, 400, "bad_request", "documents is empty"),
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
    assert "\n" not in content["error"]


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


def with_header(stack: Stack, name: str, value: str, body: bytes = b'{"texts": ["a"]}') -> Answer:
    return send(urllib.request.Request(stack.url("embed", EMBED), body, {name: value}))


def test_the_last_of_two_equal_keys_counts(stack: Stack) -> None:
    answer = stack.post("embed", EMBED, b'{"texts": ["the first"], "texts": ["the last"]}')
    assert (np.array(answer.json()["embeddings"], np.float32) == stack.embed(["the last"])).all()


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "nonsense"])
def test_compressed_bodies_are_refused(stack: Stack, encoding: str) -> None:
    """Two megabytes may unpack to two gigabytes."""
    bomb = zlib.compress(b'{"texts": ["' + bytes(100_000_000), 1)
    answer = with_header(stack, "Content-Encoding", encoding, bomb)
    assert (answer.status, answer.json()["type"]) == (415, "compressed")
    assert with_header(stack, "Content-Encoding", "identity").status == 200


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon", "1s", ""])
def test_a_deadline_that_is_none(stack: Stack, seconds: str) -> None:
    answer = with_header(stack, "X-Request-Timeout", seconds)
    assert (answer.status, answer.json()["type"]) == (400, "bad_request")
    assert "X-Request-Timeout must be a number of seconds above 0" in answer.json()["error"]


def test_a_deadline_that_is_kept(stack: Stack) -> None:
    assert with_header(stack, "X-Request-Timeout", "20.5").status == 200
    answer = with_header(stack, "X-Request-Timeout", "1e-6")
    # By when the body may be there, or not.
    assert (answer.status, answer.json()["type"]) in ((504, "timeout"), (408, "slow_body"))


MALFORMED = [
    b"nonsense\r\n\r\n",
    b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
    b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /embed HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    b"POST /embed HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
]


@pytest.mark.parametrize("sent", MALFORMED)
def test_a_malformed_http_request_is_refused(stack: Stack, sent: bytes) -> None:
    """And leaves no line on the terminal."""
    before = stack.said()
    with socket.create_connection(("127.0.0.1", stack.ports["embed"]), timeout=30) as connection:
        connection.sendall(sent)
        assert b" 400 " in connection.recv(4096).splitlines()[0]
    assert stack.said() == before


POISON: dict[str, str] = {
    "special tokens": "[CLS] [SEP] [PAD] [MASK]",
    "an overflow of fp16": "importance of trees",
    "another": "import numpy as np",
    "right to left": "\u202e\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "zero width": "\u200b\u200c\u200d\ufeff" * 100,
    "10,000 combining marks": "e" + "\u0301" * 10_000,
    "combining marks alone": "\u0301" * 10_000,
    "control characters": "".join(map(chr, range(1, 32))),
    "private use": "\ue000\uf8ff\U0010fffd",
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 100,
    "one word of 100,000 letters": "w" * 100_000,
    "an unknown script": "\U00012000\U00012001" * 50,
    "white space between": "a" + " \t\n\u3000" * 10_000 + "b",
    "JSON": '{"texts": ["a"]}',
    "a template": "{query} {0} %s ${HOME} <|im_end|></s>",
}


@pytest.mark.parametrize("name", POISON)
def test_poison(stack: Stack, name: str) -> None:
    """It has a vector, and its neighbours in the batch are what they are alone."""
    text = POISON[name]
    neighbours = ["a neighbour", "and another one, somewhat longer"]
    with ThreadPoolExecutor(3) as clients:
        alone = clients.submit(stack.post, "embed", EMBED, {"texts": [text]})
        apart = np.concatenate(list(clients.map(lambda one: stack.embed([one]), neighbours)))
    assert (apart == stack.embed(neighbours)).all()
    (vector,) = np.array(alone.result().json()["embeddings"], np.float32)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-3)
    assert (stack.embed([text, *neighbours])[0] == vector).all()


# name: (a text of 15 MB as JSON, a short one with the same tokens)
MEGABYTES: dict[str, tuple[str, str]] = {
    "a word": ("w" * 15_000_000, "w" * 101),
    "a word of unlike letters": ("na\u00efve" * 1_500_000, "w" * 101),
    "white space": ("a" + " \t\n" * 3_000_000 + "b", "a b"),
    "combining marks": ("a" + "\u0301" * 2_500_000, "a"),
    "invisible characters": ("\0\u200d a" + "\0\x7f\u200d" * 900_000, "a"),
    "emoji": ("\U0001f600" * 1_300_000 + " b", "\U0001f600 b"),
}


@pytest.mark.parametrize("name", MEGABYTES)
def test_a_text_of_megabytes_has_the_vector_of_its_tokens(stack: Stack, name: str) -> None:
    long, short = MEGABYTES[name]
    assert (stack.embed([long]) == stack.embed([short])).all()


def test_a_letter_with_millions_of_marks_is_refused(stack: Stack) -> None:
    answer = stack.post("embed", EMBED, {"texts": ["a" + "\u0903" * 2_000_000]})
    assert (answer.status, answer.json()["type"]) == (400, "bad_request")
    assert "a text of 2000001 characters is too long" in answer.json()["error"]


def test_v2_infer_refuses_an_unknown_prompt(stack: Stack) -> None:
    tensors = [
        {"name": name, "datatype": "BYTES", "shape": [1, 1], "data": [value]}
        for name, value in {"text": "a", "prompt_name": "none"}.items()
    ]
    answer = stack.post("http", "/v2/models/minilm/infer", {"inputs": tensors})
    assert answer.status == 400
    assert "prompt_name 'none' is unknown" in answer.json()["error"]


def test_a_bad_text_does_not_fail_its_neighbours(stack: Stack) -> None:
    """Requests that Triton merges into one batch fail one by one."""
    bad, good = (
        {
            "inputs": [
                {"name": name, "datatype": "BYTES", "shape": [1, 1], "data": [value]}
                for name, value in {"text": "a", "prompt_name": prompt}.items()
            ]
        }
        for prompt in ("none", "query")
    )
    with ThreadPoolExecutor(16) as clients:
        answers = list(
            clients.map(lambda body: stack.post("http", "/v2/models/minilm/infer", body), [bad, good] * 40)
        )
    assert [answer.status for answer in answers] == [400, 200] * 40


DTYPES = ["BYTES", "FP32", "INT32", "INT64", "BOOL", "UINT8", "FP16", "nonsense", None]
SHAPES = st.lists(st.integers(-2, 70) | st.sampled_from([0, 1, 10_000]), max_size=4).filter(
    lambda shape: math.prod(shape) < 10**6
)
"""All but those that Triton cannot allocate, see test_faults.py."""
TENSORS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["text", "prompt_name", "query", "passage", "input_ids", "nonsense", "", None]),
        "datatype": st.sampled_from(DTYPES),
        "shape": SHAPES | st.none(),
        "data": st.recursive(
            st.text(max_size=20) | st.integers() | st.booleans() | st.none() | st.floats(),
            lambda inner: st.lists(inner, max_size=5),
            max_leaves=10,
        ),
    },
    optional={
        "parameters": st.dictionaries(st.sampled_from(["binary_data_size", "classification"]), st.integers())
    },
)
BODIES = st.fixed_dictionaries(
    {"inputs": st.lists(TENSORS, max_size=3) | st.none()},
    optional={
        "id": st.text(max_size=5) | st.integers(),
        "parameters": st.dictionaries(st.sampled_from(["priority", "timeout", "sequence_id", "x"]), st.integers()),
        "outputs": st.lists(
            st.fixed_dictionaries({"name": st.sampled_from(["embeddings", "nonsense", ""])}), max_size=2
        ),
    },
)


@given(BODIES, st.sampled_from(["minilm", "minilm-rerank", "minilm-tokenizer"]))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_v2_infer_answers_whatever_it_is_sent(stack: Stack, body: dict[str, Any], model: str) -> None:
    """The ensembles, and the step that reads callers' text; Triton stays ready."""
    answer = stack.post("http", f"/v2/models/{model}/infer", body)
    assert answer.status in (200, 400, 500)
    assert (answer.status == 200) == ("error" not in answer.json())
    assert stack.get("http", f"/v2/models/{model}/ready").status == 200


def test_a_huge_batch_is_refused(stack: Stack) -> None:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [100_000, 1], "data": ["a"] * 100_000}
    answer = stack.post("http", "/v2/models/minilm/infer", {"inputs": [tensor]})
    assert answer.status == 400
    assert "batch-size must be <= 64" in answer.json()["error"]
