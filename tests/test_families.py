"""Every architecture and head: a tiny random checkpoint goes through the builder and a real Triton."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import REFERENCE, ROOT, TINY, Precision, Stack, cosines, rows
from tiny import EMBEDDERS, RERANKERS, build_tiny
from tokenizers import Tokenizer
from tritonclient.utils import InferenceServerException

from build import make

PAIRS: list[list[str]] = json.loads((TINY / "pairs.json").read_text())
QUERIES, PASSAGES = [query for query, _ in PAIRS], [passage for _, passage in PAIRS]
TEXTS: list[str] = json.loads((TINY / "texts.json").read_text())


def expected(name: str) -> Any:
    """What transformers and sentence-transformers gave."""
    return np.load(TINY / name / "expected.npz")


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default families and every tiny one."""
    folder = tmp_path_factory.mktemp("families") / "repository"
    shutil.copytree(ROOT / "model_repository", folder)
    build_tiny(EMBEDDERS + RERANKERS, "--repository", str(folder))
    options = ["--name", "qwen3-half", "--dimensions", "24", "--repository", str(folder)]
    assert make.main([str(TINY / "qwen3-embedding"), *options]) == 0
    prompted = shutil.copytree(TINY / "bert-cls", tmp_path_factory.mktemp("checkpoint") / "prompted")
    prompts = json.loads((prompted / "config_sentence_transformers.json").read_text())
    prompts["default_prompt_name"] = "query"
    (prompted / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    tokenizer = Tokenizer.from_file(str(prompted / "tokenizer.json"))
    rows = json.loads((prompted / "config.json").read_text())["vocab_size"]
    tokenizer.add_special_tokens([f"<{i}>" for i in range(tokenizer.get_vocab_size(), rows + 1)])
    tokenizer.save(str(prompted / "tokenizer.json"))
    assert make.main([str(prompted), "--repository", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session", params=["fp32", "bf16"])
def families(
    request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Precision]:
    """All families in one server, in fp32 and then in bf16."""
    options = [
        "--repository",
        str(repository),
        "--models",
        "minilm",
        *EMBEDDERS,
        "qwen3-half",
        "prompted",
        *RERANKERS,
    ]
    folder = tmp_path_factory.mktemp(f"families-{request.param}")
    stack = Stack(folder, options, {"ENCODER_PRECISION": request.param}).start()
    yield Precision(stack, {"fp32": 0.99999, "bf16": 0.999}[request.param])
    assert stack.stop() == 0


@pytest.mark.parametrize("name", EMBEDDERS)
def test_vectors_equal_the_reference(families: Precision, name: str) -> None:
    embeddings = families.stack.embed(TEXTS, name)
    assert cosines(embeddings, expected(name)["embeddings"]).min() >= families.minimum_cosine
    lengths = np.linalg.norm(expected(name)["embeddings"], axis=1)  # 1, and 0 of a text without tokens
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), lengths, atol=1e-5)


def test_a_prompt_by_default(families: Precision) -> None:
    """Where sentence-transformers puts one before a text that is sent without a word on it, so do we."""
    reference = expected("bert-cls")["query_embeddings"]
    for vectors in (
        families.stack.embed(TEXTS, "prompted"),
        families.stack.infer("prompted", text=TEXTS)["embeddings"],
    ):
        assert cosines(vectors, reference).min() >= families.minimum_cosine
    with pytest.raises(InferenceServerException, match=r"'none' is unknown: this model has document, query$"):
        families.stack.infer("prompted", text=["a"], prompt_name=["none"])


def test_a_token_that_the_encoder_has_no_vector_for(families: Precision) -> None:
    """The last that it has one for is taken."""
    last = json.loads((TINY / "bert-cls" / "config.json").read_text())["vocab_size"]
    answer = families.stack.infer("prompted-tokenizer", text=[f"a <{last - 1}>"], prompt_name=["document"])
    assert answer["input_ids"].max() == last - 1
    with pytest.raises(
        InferenceServerException, match=rf"text\[1\] has '<{last}>', a token that the model has no"
    ):
        families.stack.infer("prompted", text=["a", f"a <{last}>"])


@pytest.mark.parametrize("name", EMBEDDERS)
def test_queries_get_their_prompt(families: Precision, name: str) -> None:
    answer = families.stack.infer(name, text=TEXTS, prompt_name=["query"] * len(TEXTS))
    reference = expected(name)
    assert cosines(answer["embeddings"], reference["query_embeddings"]).min() >= families.minimum_cosine
    assert (answer["token_count"][:, 0] == reference["query_token_counts"]).all()
    assert (answer["truncated"][:, 0] == reference["query_truncated"]).all()


BLANK = json.loads((REFERENCE / "blank.json").read_text())
BLANK_EXPECTED = np.load(REFERENCE / "blank.npz")


@pytest.mark.parametrize("name", ["minilm", *EMBEDDERS])
def test_blank_texts_have_the_references_vectors(families: Precision, name: str) -> None:
    """Special tokens alone, or the tokens of white space: by the gateway and by v2 infer, beside other texts."""
    texts = BLANK["texts"]
    through_gateway = families.stack.embed([*texts, "a neighbour"], name)[:-1]
    direct = families.stack.infer(name, text=texts)["embeddings"]
    for vectors in (through_gateway, direct):
        assert cosines(vectors, BLANK_EXPECTED[name]).min() >= families.minimum_cosine


@pytest.mark.parametrize("name", RERANKERS)
def test_blank_documents_have_the_references_scores(families: Precision, name: str) -> None:
    documents, query = ["", *BLANK["texts"]], BLANK["query"]
    direct = families.stack.infer(name, query=[query] * len(documents), passage=documents)["score"][:, 0]
    body = {"query": query, "documents": documents, "model": name}
    through_gateway = families.stack.post("rerank", "/rerank", body).json()["scores"]
    expected_scores = 1 / (1 + np.exp(-BLANK_EXPECTED[name]))
    tolerance = {0.99999: 1e-4, 0.999: 5e-2}[families.minimum_cosine]
    for scores in (direct, through_gateway):
        np.testing.assert_allclose(scores, expected_scores, atol=tolerance)


@pytest.mark.parametrize("name", EMBEDDERS)
def test_input_type_picks_the_prompt(families: Precision, name: str) -> None:
    """The request parameter of NVIDIA NIM's clients."""
    for input_type, prompt in (("query", "query"), ("passage", "document")):
        typed = families.stack.infer(name, {"input_type": input_type}, text=TEXTS[:4])
        named = families.stack.infer(name, text=TEXTS[:4], prompt_name=[prompt] * 4)
        assert (typed["embeddings"] == named["embeddings"]).all()
        assert (typed["token_count"] == named["token_count"]).all()


def test_an_unknown_input_type_is_refused(families: Precision) -> None:
    with pytest.raises(InferenceServerException, match="'none' is unknown: it is one of query, passage"):
        families.stack.infer("bert-cls", {"input_type": "none"}, text=["a"])


@pytest.mark.parametrize("name", EMBEDDERS)
@pytest.mark.parametrize("prompt", ["", "query_"])
def test_token_ids_equal_the_reference(families: Precision, name: str, prompt: str) -> None:
    prompts = {"prompt_name": ["query"] * len(TEXTS)} if prompt else {}
    answer = families.stack.infer(f"{name}-tokenizer", text=TEXTS, **prompts)
    reference = expected(name)
    ids = rows(reference[f"{prompt}token_ids"], reference[f"{prompt}token_counts"])
    counts = answer["token_count"][:, 0]
    assert [row[:n].tolist() for row, n in zip(answer["input_ids"], counts, strict=True)] == ids
    assert (answer["truncated"][:, 0] == reference[f"{prompt}truncated"]).all()


def test_cut_before_the_norm(families: Precision) -> None:
    """Matryoshka: the first half of the dimensions, of unit length again."""
    half = families.stack.embed(TEXTS, "qwen3-half")
    assert half.shape == (len(TEXTS), 24)
    assert cosines(half, expected("qwen3-embedding")["half_embeddings"]).min() >= families.minimum_cosine
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-5)


def assert_same_bits(together: npt.NDArray[Any], compute: Callable[[list[int]], npt.NDArray[Any]]) -> None:
    """Rows `together` are what `compute` gives for each alone, in another order, and from 32 clients at once."""
    everything = list(range(len(together)))
    assert (np.concatenate([compute([i]) for i in everything]) == together).all()
    order = np.random.default_rng(0).permutation(everything).tolist()
    assert (compute(order) == together[order]).all()
    with ThreadPoolExecutor(32) as clients:
        assert (np.concatenate(list(clients.map(compute, ([i] for i in order)))) == together[order]).all()


@pytest.mark.parametrize("name", EMBEDDERS)
def test_a_text_has_the_same_bits_in_any_company(families: Precision, name: str) -> None:
    texts = [*TEXTS, *(f"{a} {b}" for a, b in itertools.pairwise(TEXTS))]
    assert_same_bits(
        families.stack.embed(texts, name), lambda chosen: families.stack.embed([texts[i] for i in chosen], name)
    )


@pytest.mark.parametrize("name", RERANKERS)
def test_a_pair_has_the_same_bits_in_any_company(families: Precision, name: str) -> None:
    def logits(chosen: list[int]) -> npt.NDArray[Any]:
        queries, passages = [QUERIES[i] for i in chosen], [PASSAGES[i] for i in chosen]
        return families.stack.infer(name, query=queries, passage=passages)["logit"]

    assert_same_bits(logits(list(range(len(PAIRS)))), logits)


def test_more_dimensions_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dimensions", "1024", "--repository", str(tmp_path)]
    assert make.main([str(TINY / "qwen3-embedding"), *options]) == 1
    assert "gives 1 to 48" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make.main([str(tmp_path)]) == 1
    assert "it has no config.json" in capsys.readouterr().err


def test_families_share_the_cores(families: Precision) -> None:
    log = next(families.stack.work_folder.glob("*.log")).read_text()
    threads = re.findall(r"-encoder: \w+, (\d+) of \d+ processors", log)
    served = ["minilm", *EMBEDDERS, "qwen3-half", "prompted", *RERANKERS]
    assert len(threads) == len(served)
    assert set(threads) == {str(max(1, len(os.sched_getaffinity(0)) // len(served)))}


def test_unknown_names_get_the_list(families: Precision) -> None:
    answer = families.stack.post("embed", "/embed", {"texts": ["a"], "model": "none"})
    assert answer.status == 404
    assert all(name in answer.json()["error"] for name in EMBEDDERS)


@pytest.mark.parametrize("name", RERANKERS)
def test_scores_equal_the_reference(families: Precision, name: str) -> None:
    answer = families.stack.infer(name, query=QUERIES, passage=PASSAGES)
    reference = expected(name)
    tolerance = {0.99999: 1e-4, 0.999: 5e-2}[families.minimum_cosine]
    np.testing.assert_allclose(answer["score"][:, 0], reference["scores"], atol=tolerance)
    if tolerance < 1e-3:
        np.testing.assert_allclose(answer["logit"][:, 0], reference["logits"], atol=1e-3)
    assert (answer["token_count"][:, 0] == reference["token_counts"]).all()
    assert (answer["truncated"][:, 0] == reference["truncated"]).all()


@pytest.mark.parametrize("name", RERANKERS)
def test_token_ids_of_pairs_equal_the_reference(families: Precision, name: str) -> None:
    """A second text's ids come raised by the size of the vocabulary where its token type matters."""
    answer = families.stack.infer(f"{name}-tokenizer", query=QUERIES, passage=PASSAGES)
    reference = expected(name)
    ids = reference["token_ids"]
    if "token_type_ids" in reference:
        vocabulary = json.loads((TINY / name / "config.json").read_text())["vocab_size"]
        ids = ids + vocabulary * reference["token_type_ids"]
    assert [row[row >= 0].tolist() for row in answer["input_ids"]] == rows(ids, reference["token_counts"])


@pytest.mark.parametrize("name", RERANKERS)
def test_rerank_through_the_gateway(families: Precision, name: str) -> None:
    body = {"query": QUERIES[0], "documents": PASSAGES, "model": name}
    answer = families.stack.post("rerank", "/rerank", body).json()
    alone = [
        families.stack.infer(name, query=[QUERIES[0]], passage=[passage])["score"].item() for passage in PASSAGES
    ]
    assert (np.float32(answer["scores"]) == np.float32(alone)).all()
    assert answer["order"] == sorted(range(len(PASSAGES)), key=lambda i: -answer["scores"][i])
    assert answer["model"] == name


@pytest.mark.parametrize("name", ["mxbai-reranker", "qwen3-vl-reranker"])
def test_an_instruction_of_ones_own(families: Precision, name: str) -> None:
    """It stands before the query where there is none by default, or in the place of the checkpoint's."""
    instruction = ["Find the answer?"] * len(QUERIES)
    answer = families.stack.infer(name, query=QUERIES, passage=PASSAGES, instruction=instruction)
    reference = 1 / (1 + np.exp(-expected(name)["instructed"]))
    tolerance = {0.99999: 1e-4, 0.999: 5e-2}[families.minimum_cosine]
    np.testing.assert_allclose(answer["score"][:, 0], reference, atol=tolerance)


def test_an_instruction_takes_the_place_of_the_default(families: Precision) -> None:
    task = "Given a web search query, retrieve relevant passages that answer the query"
    default, same, other = (
        families.stack.infer("qwen3-reranker", query=QUERIES[:3], passage=PASSAGES[:3], **instruction)["logit"]
        for instruction in ({}, {"instruction": [task] * 3}, {"instruction": ["Find recipes"] * 3})
    )
    assert (default == same).all()
    assert (default != other).all()
