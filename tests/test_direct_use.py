"""Triton's own protocol, without the gateway: v2 infer over HTTP and gRPC."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import Stack
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException


def bytes_tensor(name: str, texts: list[str]) -> InferInput:
    values = np.array([[text.encode()] for text in texts], np.object_)
    return InferInput(name, values.shape, "BYTES").set_data_from_numpy(values)


def test_embed_over_http(stack: Stack) -> None:
    texts = ["one text", "and another one, which is longer", "x"]
    body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [3, 1], "data": texts}]}
    answer = stack.post("http", "/v2/models/minilm/infer", body).json()
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert outputs["embeddings"]["shape"] == [3, 384]
    embeddings = np.array(outputs["embeddings"]["data"], np.float32).reshape(3, 384)
    assert (embeddings == stack.embed(texts)).all()
    assert outputs["token_count"]["data"] == [4, 9, 3]
    assert outputs["truncated"]["data"] == [False, False, False]


def test_embed_over_grpc(stack: Stack) -> None:
    with InferenceServerClient(f"127.0.0.1:{stack.ports['grpc']}") as client:
        texts = ["one text", "seven " * 300]
        result = client.infer("minilm", [bytes_tensor("text", texts)])
    assert (result.as_numpy("embeddings") == stack.embed(texts)).all()
    assert result.as_numpy("token_count").tolist() == [[4], [256]]
    assert result.as_numpy("truncated").tolist() == [[False], [True]]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([7] * 100_000, "a row of 100000 tokens is over this model's 256"),
        ([101, 30_522, 102], "input_ids holds 101 to 30522; ids are below 30522"),
        ([101, -2, 102], "input_ids holds -2 to 102"),
        ([-1, -1], "a row without a token has no result"),
    ],
)
def test_an_encoder_takes_what_its_tokenizer_makes(stack: Stack, ids: list[int], words: str) -> None:
    """A row over the window would keep all others waiting; those beside it in a batch are answered."""

    def embeddings(*rows: list[int]) -> np.ndarray:
        tensor = InferInput("input_ids", [len(rows), len(rows[0])], "INT32")
        tensor.set_data_from_numpy(np.array(rows, np.int32))
        with InferenceServerClient(f"127.0.0.1:{stack.ports['grpc']}") as client:
            return client.infer("minilm-encoder", [tensor]).as_numpy("embeddings")

    good = [101, 7592, 102]
    expected = embeddings(good)
    with ThreadPoolExecutor(16) as clients:
        asked = [clients.submit(embeddings, row) for row in [ids, good] * 8]
    for bad, neighbour in zip(asked[::2], asked[1::2], strict=True):
        with pytest.raises(InferenceServerException, match=words) as refusal:
            bad.result()
        assert refusal.value.status() == "StatusCode.INVALID_ARGUMENT"
        assert (neighbour.result() == expected).all()


def test_rerank_over_grpc(stack: Stack) -> None:
    query, passages = "Where is Paris?", ["Paris is in France.", "Cheese is made of milk.", "seven " * 300]
    tensors = [bytes_tensor("query", [query] * 3), bytes_tensor("passage", passages)]
    with InferenceServerClient(f"127.0.0.1:{stack.ports['grpc']}") as client:
        result = client.infer("minilm-rerank", tensors)
    score, logit = result.as_numpy("score")[:, 0], result.as_numpy("logit")[:, 0]
    assert (score == np.array(stack.rerank(query, passages)["scores"], np.float32)).all()
    np.testing.assert_allclose(score, (1 + logit) / 2, atol=1e-6)
    assert result.as_numpy("token_count")[:, 0].tolist() == [6 + 7, 6 + 8, 6 + 256]
    assert result.as_numpy("truncated")[:, 0].tolist() == [False, False, True]


@pytest.mark.parametrize("prompt_name", ["query", "document"])
def test_prompt_names_every_model_has(stack: Stack, prompt_name: str) -> None:
    """all-MiniLM-L6-v2 puts nothing before either."""
    tensors = [bytes_tensor("text", ["one text"]), bytes_tensor("prompt_name", [prompt_name])]
    with InferenceServerClient(f"127.0.0.1:{stack.ports['grpc']}") as client:
        result = client.infer("minilm", tensors)
    assert (result.as_numpy("embeddings") == stack.embed(["one text"])).all()


def test_metadata_states_the_contract(stack: Stack) -> None:
    embed = stack.get("http", "/v2/models/minilm").json()
    rerank = stack.get("http", "/v2/models/minilm-rerank").json()
    shapes = {t["name"]: (t["datatype"], t["shape"]) for t in embed["outputs"] + rerank["outputs"]}
    assert shapes == {
        "embeddings": ("FP32", [-1, 384]),
        "score": ("FP32", [-1, 1]),
        "logit": ("FP32", [-1, 1]),
        "token_count": ("INT32", [-1, 1]),
        "truncated": ("BOOL", [-1, 1]),
    }
    assert [t["name"] for t in embed["inputs"]] == ["text", "prompt_name"]
    assert [t["name"] for t in rerank["inputs"]] == ["query", "passage"]
