"""The comparison of a served family with its reference; committed vectors take the reference's place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, TINY, Reference, Stack, free_ports, rows
from tiny import build_tiny

from build import verify
from build.errors import BuildError
from build.verification.comparison import Row, compare_embeddings, compare_scores, summarise, table
from build.verification.references import loading
from build.verification.references.loading import Expected, Pair
from build.verification.served import Served
from build.verify import tolerance_of

PAIRS: list[Pair] = [(query, passage) for query, passage in json.loads((TINY / "pairs.json").read_text())]


def row(agreement: float, same_ids: bool | None = True, prompt: str = "plain", served: float = 1.0) -> Row:
    return Row(prompt, f"text of {agreement}", 3, False, agreement, served, 1.0, same_ids)


def address(stack: Stack) -> str:
    return f"127.0.0.1:{stack.ports['grpc']}"


@pytest.fixture(scope="module")
def rerankers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Tiny cross-encoders of both kinds, in fp32."""
    folder = tmp_path_factory.mktemp("verify")
    names = ["bert-cross-encoder", "qwen3-reranker"]
    build_tiny(names, "--repository", str(folder / "repository"))
    options = ["--repository", str(folder / "repository"), "--models", *names]
    running = Stack(folder / "work", options, {"ENCODER_PRECISION": "fp32"})
    running.work_folder.mkdir()
    yield running.start()
    assert running.stop() == 0


def test_cosines_by_hand() -> None:
    a = np.array([[3, 4], [1, 0], [1, 0], [0, 0], [np.nan, 1]], np.float32)
    b = np.array([[4, 3], [-2, 0], [0, 5], [1, 0], [1, 1]], np.float32)
    assert loading.cosines(a, b) == pytest.approx([0.96, -1, 0, -1, -1])


def test_a_summary_by_hand() -> None:
    found = [row(0.9), row(1.0), row(0.5, prompt="query"), row(0.7, same_ids=None, prompt="query")]
    report = summarise(found, tolerance=0.5)
    assert report["agreement"] == {
        "plain": pytest.approx({"count": 2, "min": 0.9, "mean": 0.95, "p1": 0.901, "p5": 0.905, "p50": 0.95}),
        "query": pytest.approx({"count": 2, "min": 0.5, "mean": 0.6, "p1": 0.502, "p5": 0.51, "p50": 0.6}),
    }
    assert [case["agreement"] for case in report["worst"]] == [0.5, 0.7, 0.9, 1.0]
    assert report["worst"][0]["text"] == "text of 0.5"
    assert report["token_ids"] == {"compared": 3, "different": 0, "examples": []}
    assert (report["texts"], report["tokens"], report["truncated"]) == (4, 12, 0)
    assert report["passed"]


@pytest.mark.parametrize(
    ("found", "passed"),
    [
        ([row(0.999)], True),
        ([row(0.9989), row(1.0)], False),
        ([row(1.0), row(1.0, same_ids=False)], False),
        ([row(1.0, same_ids=None)], True),
        ([row(-1.0, served=float("nan"))], False),
    ],
)
def test_what_passes(found: list[Row], passed: bool) -> None:
    report = summarise(found, tolerance=0.999)
    assert report["passed"] is passed
    json.dumps(report, allow_nan=False)


def test_only_the_ten_worst_are_listed() -> None:
    report = summarise([row(0.9 + i / 1000, same_ids=False) for i in range(30)], tolerance=0.5)
    assert [case["agreement"] for case in report["worst"]] == [0.9 + i / 1000 for i in range(10)]
    assert report["token_ids"]["different"] == 30
    assert len(report["token_ids"]["examples"]) == 10


def test_the_table() -> None:
    summary = summarise([row(0.9), row(1.0, same_ids=False)], tolerance=0.95)
    lines = table({"family": "f", "reference": "r", "server": "triton 2", "task": "embed", **summary})
    assert lines[0] == "f on triton 2 against r"
    assert lines[2].split() == ["plain", "2", "0.90000000", "0.95000000", "0.90100000", "0.95000000"]
    assert lines[3] == "token ids  1 of 2 equal; 6 tokens, 0 texts cut"
    assert lines[4] == "worst      1.0e-01 off, 3 tokens: 'text of 0.9'"
    assert lines[5] == "FAILED     tolerance 0.95"


def test_the_tolerance_of_a_family(tmp_path: Path) -> None:
    assert tolerance_of("f", tmp_path, None) == 0.999
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "build.json").write_text("{}")
    assert tolerance_of("f", tmp_path, None) == 0.999
    record = {"inputs": {"precision": "fp32"}, "tolerance": {"fp32": 0.99, "bf16": 0.9}}
    (tmp_path / "f" / "build.json").write_text(json.dumps(record))
    assert tolerance_of("f", tmp_path, None) == 0.99
    assert tolerance_of("f", tmp_path, "bf16") == 0.9


def test_default_texts_are_varied() -> None:
    texts = verify.default_texts()
    assert len(texts) > 70
    assert min(len(text.split()) for text in texts) == 1
    assert max(len(text.split()) for text in texts) >= 600


def test_without_the_reference_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["minilm", "--reference", "none"]) == 1
    assert capsys.readouterr().err == (
        "error: sentence_transformers is not installed: run this with the Python of an environment made of "
        "verify.lock; nothing else here needs it\n"
    )


def test_a_reference_that_cannot_be_loaded() -> None:
    def loader(checkpoint: str) -> None:
        raise OSError(f"{checkpoint} is\nno model")

    with pytest.raises(BuildError, match="the reference x cannot be loaded: x is no model"):
        loading.load(loader, "x")


def test_no_server() -> None:
    (port,) = free_ports(1)
    with pytest.raises(BuildError, match=rf"no server answers at .*:{port}: start one"):
        Served(f"127.0.0.1:{port}", "minilm")


def test_no_such_family(stack: Stack) -> None:
    with pytest.raises(BuildError, match=r"the server at .* says: .*'none' is not found"):
        Served(address(stack), "none")


def test_the_served_family_agrees(stack: Stack, reference: Reference) -> None:
    def embed(texts: Sequence[str], _: str) -> Expected:
        assert list(texts) == reference.texts
        # The family's own prompts are empty.
        return Expected(reference.embeddings, reference.token_ids)

    served = Served(address(stack), "minilm")
    assert served.kind == "embed"
    assert served.server == "triton 2.51.0"
    report = summarise(compare_embeddings(served, embed, reference.texts), tolerance=0.999)
    assert report["passed"]
    assert list(report["agreement"]) == ["plain", "query", "document"]
    assert report["texts"] == 3 * len(reference.texts)
    assert report["tokens"] == 3 * sum(map(len, reference.token_ids))
    assert report["truncated"] == 3 * sum(reference.truncated)
    assert report["token_ids"]["compared"] == report["texts"]
    assert all(case["served"] == pytest.approx(1, abs=1e-3) for case in report["worst"])


def test_vectors_of_another_length_are_found_out(stack: Stack, reference: Reference) -> None:
    """Their cosines are all 1."""

    def embed(texts: Sequence[str], prompt: str) -> Expected:
        ids = served.token_ids(text=texts, **({"prompt_name": [prompt] * len(texts)} if prompt else {}))
        return Expected(48 * stack.embed(list(texts)), ids)

    served = Served(address(stack), "minilm")
    report = summarise(compare_embeddings(served, embed, reference.texts[:8]), tolerance=0.999)
    assert not report["passed"]
    assert report["worst"][0]["agreement"] == pytest.approx(1 / 48, rel=1e-3)


def test_a_family_that_differs_is_found_out(stack: Stack, reference: Reference) -> None:
    texts, ids = reference.texts[:20], reference.token_ids[:20]
    vectors = reference.embeddings[:20].copy()
    vectors[7] = vectors[8]

    def embed(_: Sequence[str], prompt: str) -> Expected:
        return Expected(vectors, ids if prompt else [*ids[:3], [101, 102], *ids[4:]])

    report = summarise(compare_embeddings(Served(address(stack), "minilm"), embed, texts), tolerance=0.999)
    assert not report["passed"]
    assert {case["text"] for case in report["worst"][:3]} == {texts[7]}
    assert report["token_ids"]["examples"] == [{"prompt": "plain", "text": texts[3]}]


def expected_scores(name: str) -> Expected:
    arrays: Any = np.load(TINY / name / "expected.npz")
    ids, types = (
        rows(arrays[key], arrays["token_counts"]) if key in arrays else None
        for key in ("token_ids", "token_type_ids")
    )
    return Expected(arrays["scores"], ids, types)


@pytest.mark.parametrize("name", ["bert-cross-encoder", "qwen3-reranker"])
def test_served_scores_agree(rerankers: Stack, name: str) -> None:
    served = Served(address(rerankers), name)
    assert served.kind == "rerank"
    report = summarise(compare_scores(served, lambda _: expected_scores(name), PAIRS), tolerance=0.9999)
    assert report["passed"]
    assert report["token_ids"]["compared"] == len(PAIRS)
    assert list(report["agreement"]) == ["pairs"]


def test_scores_of_a_bi_encoder_come_without_ids(stack: Stack) -> None:
    served = Served(address(stack), "minilm-rerank")
    scores = served.answer(query=["a", "b"], passage=["c", "d"])["score"][:, 0]
    (first, second) = compare_scores(
        served, lambda _: Expected(scores - np.float32(0.25)), [("a", "c"), ("b", "d")]
    )
    assert first.same_ids is None
    assert (first.agreement, second.agreement) == pytest.approx((0.75, 0.75))


def test_texts_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("one\n\ntwo\n")
    assert verify._texts(tmp_path / "texts.txt") == ["one", "two"]
    (tmp_path / "texts.txt").write_text("\n")
    with pytest.raises(BuildError, match="holds no texts"):
        verify._texts(tmp_path / "texts.txt")
    with pytest.raises(BuildError, match=r"cannot read the texts in .*none.txt: No such file"):
        verify._texts(tmp_path / "none.txt")


def test_verifying_needs_no_builder() -> None:
    """So that an environment made for the reference can run it, and one without it can import it."""
    code = "import sys, build.verify; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert not {"onnx", "openvino", "safetensors", "tokenizers", "torch", "transformers"} & set(loaded)
