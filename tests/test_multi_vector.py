"""Vectors of tokens: tiny ColBERTs, and a model that pools, through builder, a real Triton and gateway."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import TINY, Precision, Stack, cosines
from engines import Array, OnnxRuntime, OpenVino, feeds, requests, states_fed, steps
from tokenizers import Tokenizer
from tritonclient.utils import InferenceServerException

from build import make
from build.config import read_config

COLBERT = "bert-colbert"
COLBERTS = [COLBERT, "jina-colbert", "pylate-colbert", "stanford-colbert"]
"""Of each layout."""
M3 = "bge-m3-colbert"
TEXTS: list[str] = json.loads((TINY / "texts.json").read_text())
PAIRS: list[list[str]] = json.loads((TINY / "pairs.json").read_text())
QUERIES, PASSAGES = [query for query, _ in PAIRS], [passage for _, passage in PAIRS]
SIDES = {None: "", "query": "query_", "document": "document_"}
"""Prompt name -> what the reference's arrays are called."""
RUNS = [
    (OpenVino, "openvino"),
    pytest.param(
        OnnxRuntime,
        "onnxruntime",
        marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="ONNX Runtime 1.23, the last for 3.10"),
    ),
]


def expected(start: str, name: str = "vectors", model: str = COLBERT) -> list[Array]:
    """What sentence-transformers gave for each text."""
    arrays = np.load(TINY / model / "expected.npz")
    counts = arrays[f"{start}{'vector' if name == 'vectors' else 'token'}_counts"]
    return np.split(arrays[f"{start}{name}"], np.cumsum(counts)[:-1])


def build(name: str, folder: Path, *options: str) -> None:
    assert make.main([str(TINY / name), "--repository", str(folder), *options]) == 0


def kept(answer: dict[str, Array]) -> list[Array]:
    """The rows that count; behind them are zeros."""
    found = []
    for vectors, (count,) in zip(answer["token_embeddings"], answer["vector_count"], strict=True):
        assert not vectors[count:].any()
        found.append(vectors[:count])
    return found


@pytest.mark.parametrize(("engine", "runtime"), RUNS)
@pytest.mark.parametrize("start", SIDES.values())
@pytest.mark.parametrize("name", COLBERTS)
def test_graphs_give_what_the_reference_gives(
    name: str, start: str, runtime: str, engine: type[OnnxRuntime] | type[OpenVino], tmp_path: Path
) -> None:
    """And a text has the same bits alone and in any batch; what fills a query up is seen by none."""
    build(name, tmp_path, "--runtime", runtime)
    config = json.loads((TINY / name / "config.json").read_text())
    words = Tokenizer.from_file(str(TINY / name / "tokenizer.json"))
    encoder, head = map(engine, steps(tmp_path, name))
    ids = [row.tolist() for row in expected(start, "token_ids", name)]
    if start == "query_":
        mask, end = (words.token_to_id(f"[{word}]") for word in ("MASK", "SEP"))
        ids = [
            [i + config["vocab_size"] * (i == mask and end in row[:place]) for place, i in enumerate(row)]
            for row in ids
        ]

    def answer(batch: list[Array]) -> list[Array]:
        found: list[Array] = []
        for feed in feeds(runtime, batch):
            states = encoder(**feed)["last_hidden_state"]
            found += kept(head(last_hidden_state=states_fed(runtime, states), **feed))
        return found

    for texts, batch in requests(ids):
        together = answer(batch)
        for i, vectors in zip(texts, together, strict=True):
            (alone,) = answer([np.array([ids[i]], np.int32)])
            np.testing.assert_array_equal(alone, vectors)
            if start == "query_":  # whose vectors all count
                np.testing.assert_allclose(vectors, expected(start, model=name)[i], atol=1e-5)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Precision]:
    """All in one server, in fp32 and then in bf16."""
    folder = tmp_path_factory.mktemp(f"vectors-{request.param}")
    for name in COLBERTS:
        build(name, folder / "repository")
    build(M3, folder / "repository", "--task", "rerank")
    build("bert-cls", folder / "repository", "--task", "embed_all", "--name", "plain")
    build("bert-cls", folder / "repository")
    own = [f"{name}{end}" for name in (*COLBERTS, M3) for end in ("", "-rerank")]
    names = [*own, "plain", "bert-cls"]
    stack = Stack(
        folder / "work",
        ["--repository", str(folder / "repository"), "--models", *names],
        {"ENCODER_PRECISION": request.param},
    ).start()
    yield Precision(stack, {"fp32": 0.99999, "bf16": 0.998}[request.param])
    assert stack.stop() == 0


def embed_all(stack: Stack, texts: list[str], model: str, prompt: str | None = None) -> list[Array]:
    answer = stack.post("embed", "/embed_all", {"inputs": texts, "model": model, "prompt_name": prompt})
    assert answer.status == 200, answer.body
    return [np.array(vectors, np.float32) for vectors in answer.json()]


@pytest.mark.parametrize("prompt", SIDES)
@pytest.mark.parametrize("name", COLBERTS)
def test_vectors_equal_the_reference(served: Precision, name: str, prompt: str | None) -> None:
    """Queries are filled up to 32 tokens, documents cut to 48, and their punctuation is left out."""
    named = {} if prompt is None else {"prompt_name": [prompt] * len(TEXTS)}
    answer = served.stack.infer(name, text=TEXTS, **named)
    direct, reference = kept(answer), expected(SIDES[prompt], model=name)
    assert list(map(len, direct)) == list(map(len, reference))
    assert cosines(np.concatenate(direct), np.concatenate(reference)).min() >= served.minimum_cosine
    reference_ids = expected(SIDES[prompt], "token_ids", name)
    assert answer["token_count"][:, 0].tolist() == list(map(len, reference_ids))
    for one, other in zip(embed_all(served.stack, TEXTS, name, prompt), direct, strict=True):
        np.testing.assert_array_equal(one, other)
    ids = served.stack.infer(f"{name}-tokenizer", text=TEXTS, **named)["input_ids"]
    size = json.loads((TINY / name / "config.json").read_text())["vocab_size"]
    for row, own in zip(ids, reference_ids, strict=True):
        np.testing.assert_array_equal(row[row >= 0] % size, own)


@pytest.mark.parametrize("prompt", SIDES)
def test_vectors_of_bge_m3(served: Precision, prompt: str | None) -> None:
    """Without that of the first token, and alike for both sides."""
    named = {} if prompt is None else {"prompt_name": [prompt] * len(TEXTS)}
    direct, reference = kept(served.stack.infer(M3, text=TEXTS, **named)), expected("", model=M3)
    assert list(map(len, direct)) == list(map(len, reference))
    assert cosines(np.concatenate(direct), np.concatenate(reference)).min() >= served.minimum_cosine


def test_hidden_states_of_a_model_that_pools(served: Precision) -> None:
    """All that the reference pools: of CLS pooling and a norm, the first is the embedding."""
    vectors = embed_all(served.stack, TEXTS, "plain")
    arrays = np.load(TINY / "bert-cls" / "expected.npz")
    assert list(map(len, vectors)) == arrays["token_counts"].tolist()
    first = np.stack([one[0] for one in vectors])
    assert cosines(first, arrays["embeddings"]).min() >= served.minimum_cosine


@pytest.mark.parametrize("prompt", SIDES)
@pytest.mark.parametrize("name", [*COLBERTS, M3])
def test_a_text_has_the_same_bits_in_any_company(served: Precision, name: str, prompt: str | None) -> None:
    together = embed_all(served.stack, TEXTS, name, prompt)
    with ThreadPoolExecutor(16) as clients:
        alone = list(clients.map(lambda text: embed_all(served.stack, [text], name, prompt)[0], TEXTS))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", [*COLBERTS, M3])
def test_scores_equal_the_references_maxsim(served: Precision, name: str) -> None:
    answer = served.stack.infer(f"{name}-rerank", query=QUERIES, passage=PASSAGES)
    reference = np.load(TINY / name / "expected.npz")["pair_maxsim"]
    queries = {"text": QUERIES, "prompt_name": ["query"] * len(QUERIES)}
    count = served.stack.infer(name, **queries)["vector_count"][:, 0]
    error = {0.99999: 1e-5, 0.998: 1e-2}[served.minimum_cosine]  # of one product
    assert (abs(answer["logit"][:, 0] - reference) <= error * count).all()
    np.testing.assert_allclose(answer["score"][:, 0], (1 + reference / count) / 2, atol=error)


def test_a_pair_has_the_same_bits_in_any_company(served: Precision) -> None:
    def logit(i: int) -> npt.NDArray[Any]:
        return served.stack.infer(f"{COLBERT}-rerank", query=[QUERIES[i]], passage=[PASSAGES[i]])["logit"][0]

    together = served.stack.infer(f"{COLBERT}-rerank", query=QUERIES, passage=PASSAGES)["logit"]
    with ThreadPoolExecutor(16) as clients:
        np.testing.assert_array_equal(list(clients.map(logit, range(len(PAIRS)))), together)


def test_rerank_through_the_gateway(served: Precision) -> None:
    body = {"query": QUERIES[0], "documents": PASSAGES}
    answer = served.stack.post("rerank", "/rerank", body).json()
    same = served.stack.infer(f"{COLBERT}-rerank", query=[QUERIES[0]] * len(PASSAGES), passage=PASSAGES)
    assert (np.float32(answer["scores"]) == same["score"][:, 0]).all()
    assert answer["model"] == f"{COLBERT}-rerank"
    blank = served.stack.post("rerank", "/rerank", {"query": " ", "documents": PASSAGES})
    assert blank.status == 400


def test_what_is_cut_and_what_is_refused(served: Precision) -> None:
    long = {"inputs": ["a", "word " * 500], "model": COLBERT}
    assert served.stack.post("embed", "/embed_all", long).status == 200
    refused = served.stack.post("embed", "/embed_all", {**long, "truncate": False})
    assert refused.status == 413
    assert "text 1 is longer than" in refused.json()["error"]
    empty = served.stack.post("embed", "/embed_all", {"inputs": ["a", ""]})
    assert empty.status == 400
    assert "inputs[1]" in empty.json()["error"]


@pytest.mark.parametrize(
    "sent", [["prompt_name"], ["text", "passage"], ["query", "passage"], ["query", "prompt_name"]]
)
def test_one_text_at_a_time(served: Precision, sent: list[str]) -> None:
    """Of two, none is passed over."""
    with pytest.raises(InferenceServerException, match="send one tensor of text, query or passage"):
        served.stack.infer(f"{COLBERT}-tokenizer", **{name: ["query"] for name in sent})


def test_tokens_of_a_side(served: Precision) -> None:
    """As many are described as a document may have."""
    text = {"text": ["word " * 60], "prompt_name": ["document"]}
    answer = served.stack.infer(f"{COLBERT}-tokenizer", **text)
    assert len(json.loads(answer["tokens"].item())) == answer["token_count"] == 48


def test_passages_of_which_nothing_counts(tmp_path: Path) -> None:
    """sentence-transformers scores them below all others."""
    folder = copied(tmp_path)
    mask = folder / "2_MultiVectorMask" / "config.json"
    said = json.loads(mask.read_text())
    mask.write_text(json.dumps(said | {"skiplist_words": [*said["skiplist_words"], "[CLS]", "[SEP]", "[D]"]}))
    build(str(folder), tmp_path / "repository", "--name", "bare")
    options = ["--repository", str(tmp_path / "repository"), "--models", "bare", "bare-rerank"]
    stack = Stack(tmp_path / "work", options).start()
    try:
        answer = stack.infer("bare-rerank", query=["one", "one"], passage=["...", "one"])
    finally:
        assert stack.stop() == 0
    assert answer["logit"][0] == np.float32(-1e9)
    assert answer["score"][0] == 0
    assert answer["score"][1] > 0.5


def test_a_model_of_another_task(served: Precision) -> None:
    pooled = served.stack.post("embed", "/embed_all", {"inputs": "a", "model": "bert-cls"})
    assert pooled.status == 404
    others = ", ".join([*COLBERTS, M3, "plain"])
    assert pooled.json()["error"] == f"no model 'bert-cls' for embed_all; this server has: {others}"
    vectors = served.stack.post("embed", "/embed", {"texts": ["a"], "model": COLBERT})
    assert vectors.status == 404
    assert vectors.json()["error"] == f"no model '{COLBERT}' for embed; this server has: bert-cls"


def test_modules_that_neither_pool_nor_say_what_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--task", "embed_all", "--repository", str(tmp_path)]
    assert make.main([str(TINY / "bert-splade"), *options]) == 1
    assert "lists Transformer, SpladePooling; vectors of tokens are written for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("2_MultiVectorMask/config.json", {"keep_only_token_ids": [7]}, "keep_only_token_ids = [7]"),
        ("2_MultiVectorMask/config.json", {"skiplist_tasks": ["none"]}, "there are query and document"),
        ("1_Dense/config.json", {"module_input_name": "sentence_embedding"}, "module_input_name"),
        ("sentence_bert_config.json", {"document_length": 65}, "of 65 tokens, over its window of 64"),
        (
            "sentence_bert_config.json",
            {"query_expansion": {"strategy": "fixed", "length": 32, "token": "[NONE]"}},
            "fills queries up with '[NONE]', which is no token",
        ),
        (
            "sentence_bert_config.json",
            {"query_expansion": {"strategy": "fixed", "length": 32, "more": 1}},
            "query_expansion.more = 1, which is not read",
        ),
        ("3_Normalize/config.json", {"module_input_name": None}, 'module_input_name = "sentence_embedding"'),
        ("config_sentence_transformers.json", {"similarity_fn_name": "meanmaxsim"}, "meanmaxsim"),
        (
            "2_MultiVectorMask/config.json",
            {"skiplist_words": ["[MASK]"], "skiplist_tasks": ["query", "document"]},
            "fills queries up with '[MASK]', whose vectors",
        ),
    ],
)
def test_what_a_build_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, changes: dict[str, Any], sentence: str
) -> None:
    folder = copied(tmp_path)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    assert make.main([str(folder), "--repository", str(tmp_path / "repository")]) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "file", "changes", "sentence"),
    [
        ("pylate-colbert", "query_prefix", "[QUERY]", "query_prefix = '[QUERY]', which is no token"),
        ("pylate-colbert", "document_prefix", None, "has no document_prefix"),
        ("pylate-colbert", "query_length", None, "has no query_length"),
        ("pylate-colbert", "document_length", 65, "documents of 65 tokens, over its window of 64"),
        ("pylate-colbert", "query_length", 40, "up to 40 tokens that see no further than 32 places"),
        ("pylate-colbert", "model_kind", "own", "model_kind"),
        ("pylate-colbert", "similarity_fn_name", "XTR", "XTR"),
        ("stanford-colbert", "similarity", "l2", 'similarity = "l2"'),
        ("stanford-colbert", "interaction", "flipr", 'interaction = "flipr"'),
        ("stanford-colbert", "doc_token_id", "[unused9]", "doc_token_id = '[unused9]', which is no token"),
        ("stanford-colbert", "query_maxlen", None, "has no query_maxlen"),
        ("stanford-colbert", "dim", 32, "of shape [24, 48], but the configuration asks for [32, 48]"),
        ("stanford-colbert", "attends", True, "attends = true, which is not read"),
    ],
)
def test_what_of_older_layouts_a_build_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, file: str, changes: object, sentence: str
) -> None:
    folder = copied(tmp_path, name)
    said = folder / ("artifact.metadata" if name == "stanford-colbert" else "config_sentence_transformers.json")
    said.write_text(json.dumps(json.loads(said.read_text()) | {file: changes}))
    assert make.main([str(folder), "--repository", str(tmp_path / "repository")]) == 1
    assert sentence in capsys.readouterr().err


def test_a_query_that_is_not_filled_up(tmp_path: Path) -> None:
    """Of PyLate's models without expansion a query is read as it is, behind its marker."""
    folder = copied(tmp_path, "pylate-colbert")
    said = folder / "config_sentence_transformers.json"
    said.write_text(json.dumps(json.loads(said.read_text()) | {"do_query_expansion": False}))
    build(str(folder), tmp_path / "repository", "--name", "bare")
    config = read_config(tmp_path / "repository", "bare-tokenizer")
    marker = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("[Q] ")
    sides = json.loads(config.parameters["sides"].string_value)
    assert sides["query"] == {"max_tokens": 32, "marker": marker}


def test_a_colbert_without_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(tmp_path, "stanford-colbert")
    (folder / "artifact.metadata").unlink()
    assert make.main([str(folder), "--repository", str(tmp_path / "repository")]) == 1
    assert "the checkpoint has no artifact.metadata" in capsys.readouterr().err


def test_a_layer_in_a_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused, and passed over where it is named."""
    folder = copied(tmp_path, M3)
    (folder / "colbert_linear.safetensors").rename(folder / "colbert_linear.pt")
    options = [str(folder), "--task", "embed_all", "--repository", str(tmp_path / "repository")]
    assert make.main(options) == 1
    assert "save what it holds as colbert_linear.safetensors" in capsys.readouterr().err
    assert make.main([*options, "--ignore", "colbert_linear.pt"]) == 0


def test_vectors_of_any_length_make_no_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:-1]))
    repository = ["--repository", str(tmp_path / "repository")]
    assert make.main([str(folder), *repository]) == 1
    assert "need not have length 1" in capsys.readouterr().err
    assert make.main([str(folder), "--task", "embed_all", *repository]) == 0


def copied(folder: Path, name: str = COLBERT) -> Path:
    """The files of a ColBERT in a folder of their own."""
    copy = folder / "copy"
    for path in (TINY / name).rglob("*.*"):
        if path.is_file() and not path.name.startswith("expected"):
            (copy / path.relative_to(TINY / name)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(TINY / name)).write_bytes(path.read_bytes())
    return copy
