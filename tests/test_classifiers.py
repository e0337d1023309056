"""Classifiers of several labels, and rerankers by their own scores, through a real Triton and the gateway."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import REFERENCE, TINY, Stack
from engines import Array, OnnxRuntime, OpenVino, feeds, requests, states_fed, steps, token_ids
from safetensors.numpy import load_file, save_file
from test_accounts import Change, edit
from test_families import assert_same_bits
from test_graphs import needs_opset_24
from test_heads import SCORES, reranker
from tokenizers import Tokenizer
from tritonclient.utils import InferenceServerException

from build import make
from build.errors import BuildError
from build.rendering.model_folder import write_model
from build.rendering.models import models_of
from build.sources.checkpoint import Checkpoint
from build.sources.obtain import describe
from build.target import Target
from tools.deploy.smoke import smoke
from tools.shim.dialects import tei
from tools.shim.gateway import Lanes
from tools.shim.served_model import ServedModel

CLASSES: dict[str, Any] = json.loads((REFERENCE / "classes.json").read_text())
EXPECTED = np.load(REFERENCE / "classes.npz")
LABELS = ["contradiction", "entailment", "neutral"]
PAIRS: list[list[str]] = json.loads((TINY / "pairs.json").read_text())[:12]
TEXTS: list[str] = json.loads((TINY / "texts.json").read_text())[:12]
INPUTS = {
    "texts": {"text": TEXTS},
    "pairs": dict(zip(("text", "text_pair"), map(list, zip(*PAIRS, strict=True)), strict=True)),
}
DECODERS = ["llama", "mistral", "qwen2", "qwen3"]
RERANKERS = {"logits": "Identity, beside modules", "asked": "one token over another"}
"""What is served -> which of test_heads.py."""


def classifier(name: str, folder: Path) -> Path:
    """A tiny cross-encoder with another last layer."""
    folder = shutil.copytree(
        TINY / CLASSES[name]["checkpoint"], folder / name, ignore=shutil.ignore_patterns("expected.*")
    )
    for path, content in CLASSES[name]["files"].items():
        (folder / path).write_text(json.dumps(content))
    start = f"{name}/tensors/"
    tensors = {key.removeprefix(start): EXPECTED[key] for key in EXPECTED if key.startswith(start)}
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")
    return folder


def graphs(folder: Path, target: Target, into: Path) -> tuple[Path, Path]:
    """Encoder and head of the family."""
    for model in models_of(describe(folder, folder.name), Checkpoint(folder), target):
        write_model(model, into / model.config.name)
    return steps(into, folder.name)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """All of them, in fp32."""
    folder = tmp_path_factory.mktemp("classifiers")
    options = ["--repository", str(folder / "repository")]
    for name in CLASSES:
        assert make.main([str(classifier(name, folder)), *options]) == 0
    for name, which in RERANKERS.items():
        assert make.main([str(reranker(which, folder / name)), "--name", name, *options]) == 0
    (folder / "work").mkdir()
    options += ["--models", *CLASSES, *RERANKERS]
    stack = Stack(folder / "work", options, {"ENCODER_PRECISION": "fp32"}).start()
    yield stack
    assert stack.stop() == 0


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("kind", INPUTS)
def test_numbers_of_labels_equal_the_reference(served: Stack, name: str, kind: str) -> None:
    answer = served.infer(name, None, **INPUTS[kind])
    np.testing.assert_allclose(answer["logits"], EXPECTED[f"{name}/{kind}/logits"], atol=1e-4)
    np.testing.assert_allclose(answer["probabilities"], EXPECTED[f"{name}/{kind}/probabilities"], atol=1e-5)
    assert answer["token_count"].shape == answer["truncated"].shape == (12, 1)


@pytest.mark.parametrize("name", CLASSES)
def test_a_pair_has_the_same_bits_in_any_company(served: Stack, name: str) -> None:
    def logits(chosen: list[int]) -> Array:
        columns = {key: [texts[i] for i in chosen] for key, texts in INPUTS["pairs"].items()}
        return served.infer(name, None, **columns)["logits"]

    assert_same_bits(logits(list(range(12))), logits)


def ranked(numbers: Array) -> list[dict[str, Any]]:
    """As TEI answers."""
    return [{"score": pytest.approx(numbers[i], abs=1e-4), "label": LABELS[i]} for i in np.argsort(-numbers)]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("raw", [False, True])
def test_predict(served: Stack, name: str, raw: bool) -> None:
    """A text, a pair, and a batch of both in turns."""
    tensor = "logits" if raw else "probabilities"
    texts, pairs = (EXPECTED[f"{name}/{kind}/{tensor}"] for kind in ("texts", "pairs"))

    def ask(inputs: Any) -> Any:
        answer = served.post("embed", "/predict", {"inputs": inputs, "raw_scores": raw, "model": name})
        assert answer.status == 200, answer.body
        return answer.json()

    for one in (TEXTS[0], [TEXTS[0]]):
        assert ask(one) == ranked(texts[0])
    assert ask(PAIRS[0]) == ranked(pairs[0])
    both = [one for text, pair in zip(TEXTS, PAIRS, strict=True) for one in ([text], pair)]
    assert ask(both) == [ranked(one) for one in itertools.chain(*zip(texts, pairs, strict=True))]
    assert ask(PAIRS) == [ranked(one) for one in pairs]


def test_the_root_of_a_server_of_classifiers(served: Stack) -> None:
    """As TEI's own router has it."""
    answer = served.post("embed", "/", {"inputs": [[TEXTS[0]], PAIRS[0]], "raw_scores": True})
    both = [EXPECTED[f"bert/{kind}/logits"][0] for kind in ("texts", "pairs")]
    assert answer.json() == [ranked(one) for one in both]


def test_predict_asks_the_first_classifier(served: Stack) -> None:
    answer = served.post("embed", "/predict", {"inputs": TEXTS[0]})
    assert answer.json() == ranked(EXPECTED["bert/texts/probabilities"][0])
    assert answer.headers["X-Truncated"] == "0"
    assert int(answer.headers["X-Token-Count"]) == served.infer("bert", text=TEXTS[:1])["token_count"].item()


LONG = "word " * 100
BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "three texts": ({"inputs": ["a", "b", "c"]}, 400, "inputs has 3 texts: send one or a pair"),
    "three texts in a batch": ({"inputs": [["a"], ["a", "b", "c"]]}, 400, r"inputs\[1\] has 3 texts"),
    "texts beside lists": ({"inputs": ["a", ["b"]]}, 400, "inputs has texts beside lists"),
    "an empty text": ({"inputs": [["a"], ["", "b"]]}, 400, r"inputs\[1\] is empty"),
    "nothing": ({"inputs": []}, 400, "inputs is empty"),
    "token ids": ({"inputs": [1, 2]}, 400, "token"),
    "too long": ({"inputs": [["a", "b"], ["c"], [LONG]], "truncate": False}, 413, "text 2 is longer than the 64"),
    "a pair too long": ({"inputs": [["a"], ["b", LONG], ["c"]], "truncate": False}, 413, "text 1 is longer"),
    "cut in front": ({"inputs": "a", "truncation_direction": "Left"}, 400, "cut at their end only"),
    "another model": ({"inputs": "a", "model": "logits"}, 404, "no model 'logits' for classify"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_call_is_told_what_to_change(served: Stack, case: str) -> None:
    body, status, words = BAD[case]
    answer = served.post("embed", "/predict", body)
    assert answer.status == status, answer.body
    assert re.search(words, answer.json()["error"])


def test_what_is_served_says_what_it_is(served: Stack) -> None:
    models = served.get("embed", "/models").json()["models"]
    assert {model["name"]: model["task"] for model in models} == dict.fromkeys(
        CLASSES, "classify"
    ) | dict.fromkeys(RERANKERS, "rerank")
    assert served.get("embed", "/health").json()["status"] == "ready"


def test_a_smoke_test_counts_labels(served: Stack) -> None:
    lines = smoke(served.url("embed", ""), served.url("rerank", ""))
    assert [line for line in lines if line.startswith("bert:")] == ["bert: 3 texts, 3 labels"]


def test_info_of_a_server_that_only_classifies() -> None:
    """Of others it tells what embeds or reranks."""
    facts = {"labels": json.dumps(LABELS), "source": "org/nli"}
    model = ServedModel("nli", "classify", 64, None, 128, ("nli-tokenizer",), {}, False, facts)

    async def models() -> list[ServedModel]:
        return [model]

    gateway: Any = SimpleNamespace(upstream=SimpleNamespace(models=models), lanes=Lanes())
    content: Any = asyncio.run(tei.info(gateway)).content
    assert content["model_id"] == "org/nli"
    assert content["model_type"] == {
        "classifier": {
            "id2label": dict(zip("012", LABELS, strict=True)),
            "label2id": {label: i for i, label in enumerate(LABELS)},
        }
    }


def test_a_classifier_does_not_rerank(served: Stack) -> None:
    answer = served.post("embed", "/rerank", {"query": "a", "documents": ["b"], "model": "bert"})
    assert answer.status == 404


def test_rows_with_and_without_a_pair(served: Stack) -> None:
    """In requests that Triton merges each has its own; within one they cannot be."""
    with pytest.raises(InferenceServerException):
        served.infer("bert", text=["a", "b"], text_pair=["c"])


@pytest.mark.parametrize("name", RERANKERS)
def test_scores_are_the_checkpoints_own(served: Stack, name: str) -> None:
    """Through Triton and by the contract; Text Embeddings Inference promises 0 to 1."""
    expected = SCORES[RERANKERS[name]]
    queries, passages = map(list, zip(*PAIRS, strict=True))
    direct = served.infer(name, query=queries, passage=passages)
    np.testing.assert_allclose(direct["score"][:, 0], expected, atol=1e-4)
    for i, (query, passage) in enumerate(PAIRS[:4]):
        content = served.post("rerank", "/rerank", {"query": query, "documents": [passage, "b"], "model": name})
        scores = content.json()["scores"]
        assert scores[0] == pytest.approx(expected[i], abs=1e-4)
        assert content.json()["order"] == sorted(range(2), key=lambda place: -scores[place])


def test_tei_gives_shares_of_logits(served: Stack) -> None:
    query, passage = PAIRS[0]
    expected = SCORES[RERANKERS["logits"]][0]
    for raw, value in ((True, expected), (False, 1 / (1 + np.exp(-expected)))):
        body = {"query": query, "texts": [passage], "raw_scores": raw}
        (rank,) = served.post("rerank", "/rerank", body).json()
        assert rank["score"] == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize(
    ("engine", "runtime"),
    [(OpenVino, "tensorrt"), pytest.param(OnnxRuntime, "onnxruntime", marks=needs_opset_24)],
)
@pytest.mark.parametrize("name", CLASSES)
def test_graphs_for_other_runtimes(
    name: str, engine: type[OpenVino] | type[OnnxRuntime], runtime: str, tmp_path: Path
) -> None:
    encoder, head = map(engine, graphs(classifier(name, tmp_path), Target(runtime), tmp_path / "built"))
    kind, ids = classified(name)
    for chosen, batch in requests(ids):
        (call,) = feeds(runtime, batch)
        states = states_fed(runtime, encoder(**call)["last_hidden_state"])
        found = head(last_hidden_state=states, **call)
        for tensor in ("logits", "probabilities"):
            np.testing.assert_allclose(found[tensor], EXPECTED[f"{name}/{kind}/{tensor}"][chosen], atol=1e-4)


def classified(name: str) -> tuple[str, list[list[int]]]:
    """What of INPUTS there are token ids of, and they."""
    if name not in DECODERS:
        return "pairs", token_ids(CLASSES[name]["checkpoint"])[:12]
    # Whose checkpoints are of other tasks, and so their ids of other texts.
    folder = TINY / CLASSES[name]["checkpoint"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"])
    return "texts", [encoding.ids for encoding in tokenizer.encode_batch(TEXTS)]


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_of_one_label_is_not_asked(name: str, tmp_path: Path) -> None:
    """Nothing says in what words; of Qwen3 it is the template of its rerankers."""
    folder = classifier(name, tmp_path)
    edit(folder / "config.json", lambda config: config.update(id2label={"0": "score"}))
    entry = dataclasses.replace(describe(folder, name), tasks=("rerank",)) if name != "qwen3" else None
    if entry is None:
        with pytest.raises(BuildError, match="nothing says in what words it is asked"):
            describe(folder, name)
        return
    with pytest.raises(BuildError, match="with one label, and nothing says in what words it is asked"):
        models_of(entry, Checkpoint(folder), Target())


REFUSED: dict[str, tuple[Change, str]] = {
    "regression": (lambda config: config.update(problem_type="regression"), "problem_type = .regression."),
    "labels without a name": (
        lambda config: config.update(id2label={"0": "a", "2": "b", "3": "c"}),
        "id2label that does not name the labels 0 to 2",
    ),
    "another function": (lambda config: config.update(function_to_apply="none"), "function_to_apply = .none."),
    "more labels than tensors": (
        lambda config: config.update(id2label={str(i): str(i) for i in range(4)}),
        r"classifier\.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_classifiers_are_refused_by_name(case: str, tmp_path: Path) -> None:
    change, words = REFUSED[case]
    folder = classifier("bert", tmp_path)
    edit(folder / "config.json", change)
    with pytest.raises(BuildError, match=words):
        graphs(folder, Target(), tmp_path / "built")


def test_one_label_is_a_reranker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = TINY / "cross-encoder"
    assert describe(folder, "one").tasks == ("rerank",)
    assert make.main([str(folder), "--task", "classify", "--repository", str(tmp_path)]) == 1
    assert "has one label, so it is no classifier but a reranker: say --task rerank" in capsys.readouterr().err


def test_labels_have_transformers_names_where_nothing_is_said(tmp_path: Path) -> None:
    folder = classifier("bert", tmp_path)
    edit(folder / "config.json", lambda config: (config.pop("id2label"), config.update(num_labels=3)))
    config = models_of(describe(folder, "bert"), Checkpoint(folder), Target())[0].config
    assert json.loads(config.parameters["labels"].string_value) == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_an_exported_classifier_is_refused(tmp_path: Path) -> None:
    folder = classifier("bert", tmp_path)
    (folder / "model.safetensors").rename(folder / "model.onnx")
    with pytest.raises(BuildError, match="classifiers of several labels are written from weights only"):
        graphs(folder, Target(), tmp_path / "built")
