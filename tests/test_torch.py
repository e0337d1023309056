"""The torch runtime on a CPU, in an environment of its own: every family against its reference, and limits."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import REFERENCE, ROOT, TINY, Stack, cosines
from engines import token_ids
from test_adoption import checkpoint
from test_classifiers import CLASSES, classified, classifier
from test_classifiers import EXPECTED as CLASSES_EXPECTED
from test_families import PAIRS, PASSAGES, QUERIES, TEXTS, assert_same_bits, expected
from test_gpu import H200, write_smi
from test_graphs import COSINE, SCORE
from test_heads import EXPECTED as HEADS_EXPECTED
from test_heads import FILES as HEADS
from test_heads import IDS as HEAD_IDS
from test_heads import checkpoint as with_modules
from test_multi_vector import M3, kept
from test_multi_vector import expected as vectors_expected
from test_sparse import expected as sparse_expected
from test_sparse import opened
from tiny import EMBEDDERS as ALL_EMBEDDERS
from tiny import PACKED, STATIC, VARIANTS, task, tiny_entry, variant
from tiny import RERANKERS as ALL_RERANKERS
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from build import make
from build.catalog import CatalogEntry
from build.config import read_config, runtime_of
from build.rendering.model_folder import write_model
from build.rendering.models import models_of
from build.sources.checkpoint import Checkpoint
from build.sources.obtain import describe
from build.target import PRECISIONS, Target

PYTHON = ROOT / ".venv-torch" / "bin" / "python"
EMBEDDERS = [name for name in ALL_EMBEDDERS if name in PACKED]
RERANKERS = [name for name in ALL_RERANKERS if name in PACKED]
FAMILIES = [*EMBEDDERS, *RERANKERS]
SPARSE = ["bert-splade", "bge-m3-sparse", "xlm-roberta-splade"]
"""By the largest, by ids and by sums."""
VECTORS = ["bert-colbert", "pylate-colbert", "bge-m3-colbert"]
"""With tokens that are seen by none, within a window too, and without the first vector."""
SERVED = ["bert-cls", "gemma3", "qwen3-embedding", "xlm-roberta"]
SERVED_RERANKERS = ["bert-cross-encoder", "qwen3-reranker"]
"""Of each way to a head; the server adds nothing to the others."""
BF16 = ["qwen3-embedding", "qwen3-reranker"]
HALVES = ["bert-cls", "gemma3", "qwen3-embedding", "qwen3-reranker"]
"""Those that are built in fp16, too, which is bf16 with other rounding."""


@pytest.fixture(scope="session", autouse=True)
def _torch() -> None:
    if not (PYTHON.parent.parent / "torch.txt").exists():
        if os.environ.get("REQUIRE_TORCH"):
            pytest.fail("`make .venv-torch/torch.txt` could not install torch")
        pytest.skip("`make .venv-torch/torch.txt` installs torch")


def built(name: str, precision: str) -> str:
    """What a family is served as."""
    return name if precision == "fp32" else f"{name}-{precision}"


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder of every family in every precision, with its head; its name ends in that, but for fp32."""
    folder = tmp_path_factory.mktemp("torch-graphs")
    for precision in PRECISIONS:
        for name in HALVES if precision == "fp16" else FAMILIES:
            write_encoder(
                tiny_entry(name), Target("torch", precision), folder / f"{built(name, precision)}-encoder"
            )
    for name in SPARSE:
        write_encoder(describe(TINY / name, name, "embed_sparse"), Target("torch"), folder / f"{name}-encoder")
    return folder


def write_encoder(entry: CatalogEntry, target: Target, folder: Path) -> None:
    """Writes that model of a family alone."""
    models = models_of(entry, Checkpoint(TINY / entry.name), target)
    (encoder,) = (model for model in models if model.config.name == f"{entry.name}-encoder")
    write_model(encoder, folder)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The families that are served."""
    folder = tmp_path_factory.mktemp("torch") / "repository"
    options = ["--runtime", "torch", "--repository", str(folder)]
    assert make.main(["minilm", *options]) == 0
    for name in (*SERVED, *SERVED_RERANKERS, *VECTORS, SPARSE[0]):
        own = ["--task", "rerank"] if name in (*RERANKERS, M3) else []
        own += ["--task", "embed"] if name in EMBEDDERS else []
        assert make.main([str(TINY / name), *own, *options]) == 0
    for name in BF16:
        words = ["--name", built(name, "bf16"), "--precision", "bf16", "--task", task(name)]
        assert make.main([str(TINY / name), *words, *options]) == 0
    return folder


def engine(repository: Path, families: list[str], ids: list[Any], *options: str) -> Any:
    """What the encoders of families give for rows of token ids, by torch_engine.py."""
    folders = [str(repository / f"{name}-encoder" / "1") for name in families]
    command = [str(PYTHON), str(ROOT / "tests" / "torch_engine.py"), *folders, *options]
    done = subprocess.run(command, input=json.dumps(ids), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def agrees(name: str, precision: str, rows: list[dict[str, list[float]]]) -> None:
    """Rows of outputs are as near to the reference as the precision asks for."""
    reference = expected(name)
    if name in EMBEDDERS:
        vectors = np.array([row["embeddings"] for row in rows])
        assert cosines(vectors, reference["embeddings"]).min() >= COSINE[precision]
    else:
        scores = np.array([row["score"] for row in rows])
        np.testing.assert_allclose(scores[:, 0], reference["scores"], atol=SCORE[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_family_gives_what_the_reference_gives(graphs: Path, precision: str) -> None:
    """Packed beside all others and alone; layers share what is compiled between attentions."""
    names = HALVES if precision == "fp16" else FAMILIES
    families, ids = [built(name, precision) for name in names], [token_ids(name) for name in names]
    for name, answer in zip(names, engine(graphs, families, ids), strict=True):
        agrees(name, precision, answer["together"])
        agrees(name, precision, answer["alone"])
        # Before the first attention, between two, and behind the last; and where experts are in between.
        functions = 1 if name in STATIC else 4 if name == "nomic-bert-moe" else 3
        assert answer["functions"] == functions, name


def test_what_a_token_sees_may_be_said_otherwise(tmp_path: Path) -> None:
    """Of windows and of those that see what comes: packed, a mask of its own each."""
    changed = [name for name, one in VARIANTS.items() if not one["config"].keys() & {"rope_parameters"}]
    options = ["--runtime", "torch", "--repository", str(tmp_path / "repository"), "--task", "embed"]
    for i, name in enumerate(changed):
        assert make.main([str(variant(name, tmp_path / str(i))), "--name", str(i), *options]) == 0
    ids = [token_ids(VARIANTS[name]["fixture"])[::4] for name in changed]
    reference = np.load(REFERENCE / "variants.npz")
    answers = engine(tmp_path / "repository", [str(i) for i in range(len(changed))], ids)
    for name, answer in zip(changed, answers, strict=True):
        for rows in (answer["together"], answer["alone"]):
            found = np.array([row["embeddings"] for row in rows])
            assert cosines(found, reference[name]).min() >= COSINE["fp32"], name


def test_modules_give_what_the_reference_gives(tmp_path: Path) -> None:
    """Every kind and option of test_heads.py, beside other texts and alone."""
    repository, names = tmp_path / "repository", [f"head-{i}" for i in range(len(HEADS))]
    for name, head in zip(names, HEADS, strict=True):
        folder = with_modules(head, tmp_path / name)
        options = ["--name", name, "--runtime", "torch", "--repository", str(repository)]
        assert make.main([str(folder), *options]) == 0
    for answer, head in zip(engine(repository, names, [HEAD_IDS] * len(names)), HEADS, strict=True):
        for rows in (answer["together"], answer["alone"]):
            vectors = np.array([row["embeddings"] for row in rows])
            assert cosines(vectors, HEADS_EXPECTED[head]).min() >= 0.999999
            lengths = [np.linalg.norm(one, axis=1) for one in (vectors, HEADS_EXPECTED[head])]
            np.testing.assert_allclose(*lengths, rtol=1e-5)


def test_classifiers_give_what_the_reference_gives(tmp_path: Path) -> None:
    """Every label's number, beside other pairs and alone."""
    repository = tmp_path / "repository"
    packed = [name for name, one in CLASSES.items() if one["checkpoint"] in PACKED]
    for name in packed:
        folder = classifier(name, tmp_path)
        assert make.main([str(folder), "--runtime", "torch", "--repository", str(repository)]) == 0
    kinds, ids = zip(*map(classified, packed), strict=True)
    for answer, name, kind in zip(engine(repository, packed, list(ids)), packed, kinds, strict=True):
        for rows, tensor in itertools.product((answer["together"], answer["alone"]), ("logits", "probabilities")):
            found = np.array([row[tensor] for row in rows])
            np.testing.assert_allclose(found, CLASSES_EXPECTED[f"{name}/{kind}/{tensor}"], atol=1e-4)


def test_sparse_vectors_give_what_the_reference_gives(graphs: Path) -> None:
    """Beside other texts, whose rows are longer, and alone."""
    answers = engine(graphs, SPARSE, [token_ids(name) for name in SPARSE])
    for name, answer in zip(SPARSE, answers, strict=True):
        reference = sparse_expected(name)
        for rows in (answer["together"], answer["alone"]):
            found = [
                opened(*(np.array([row[tensor]]) for tensor in ("indices", "values")), reference.shape[1])
                for row in rows
            ]
            np.testing.assert_allclose(np.concatenate(found), reference, rtol=1e-5, atol=1e-5)


def test_compiled_it_gives_the_same(graphs: Path) -> None:
    """As on a GPU: with shapes that change from batch to batch."""
    if shutil.which("g++") is None:
        pytest.skip("torch compiles with g++ on a CPU")
    (answer,) = engine(graphs, ["qwen3-embedding"], [token_ids("qwen3-embedding")], "--compiled")
    agrees("qwen3-embedding", "fp32", answer["together"])
    agrees("qwen3-embedding", "fp32", answer["alone"])


def test_a_micro_batch_without_memory_is_cut(graphs: Path) -> None:
    """All rows come out as with memory enough, but for those that find none alone, and the budget stays cut."""
    ids = token_ids("bert-cls")
    longest = max(map(len, ids))
    (plenty,) = engine(graphs, ["bert-cls"], [ids])
    (tight,) = engine(graphs, ["bert-cls"], [ids], "--memory", str(longest - 1))
    assert plenty["budget"] == 512
    assert tight["budget"] < 512
    for row, with_memory, without in zip(ids, plenty["together"], tight["together"], strict=True):
        if len(row) < longest:
            assert without == with_memory
        else:
            assert without == f"{longest} tokens do not fit: there is not enough memory"


def test_an_unknown_operator_is_named(graphs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd-encoder" / "1"
    shutil.copytree(graphs / "bert-cls-encoder" / "1", folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Gelu").op_type = "Selu"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(AssertionError, match="has the operator Selu, which is not written for torch"):
        engine(tmp_path, ["odd"], [[[1]]])


@pytest.fixture(scope="session")
def stack(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Families in fp32, two in bf16, in one server whose Python has torch."""
    models = ["minilm", "minilm-rerank", *SERVED, *SERVED_RERANKERS, SPARSE[0]]
    models += [f"{name}{end}" for name in VECTORS for end in ("", "-rerank")]
    models += [built(name, "bf16") for name in BF16]
    options = ["--repository", str(repository), "--models", *models]
    # Each model is a process of its own: with all processors each, they are in each other's way.
    environment = {"OMP_NUM_THREADS": "1"}
    folder = tmp_path_factory.mktemp("torch-stack")
    running = Stack(folder, options, environment, python=str(PYTHON)).start()
    assert "is not served" not in running.said()
    yield running
    assert running.stop() == 0


def test_sparse_vectors_through_the_server(stack: Stack) -> None:
    answer, reference = stack.infer(SPARSE[0], text=TEXTS), sparse_expected(SPARSE[0])
    found = opened(answer["indices"], answer["values"], reference.shape[1])
    np.testing.assert_allclose(found, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", ["", "query", "document"])
@pytest.mark.parametrize("name", VECTORS)
def test_vectors_of_tokens_through_the_server(stack: Stack, name: str, prompt: str) -> None:
    """As many as count, beside texts of other lengths and prompts."""
    named = {"prompt_name": [prompt] * len(TEXTS)} if prompt else {}
    found = kept(stack.infer(name, text=TEXTS, **named))
    start = f"{prompt}_" if prompt and name != M3 else ""
    reference = vectors_expected(start, model=name)
    assert list(map(len, found)) == list(map(len, reference))
    assert cosines(np.concatenate(found), np.concatenate(reference)).min() >= COSINE["fp32"]


@pytest.mark.parametrize("name", VECTORS)
def test_maxsim_through_the_server(stack: Stack, name: str) -> None:
    answer = stack.infer(f"{name}-rerank", query=QUERIES, passage=PASSAGES)
    reference = np.load(TINY / name / "expected.npz")["pair_maxsim"]
    np.testing.assert_allclose(answer["logit"][:, 0], reference, atol=1e-3)


@pytest.mark.parametrize("name", SERVED)
def test_vectors_through_the_server(stack: Stack, name: str) -> None:
    agrees(name, "fp32", [{"embeddings": row.tolist()} for row in stack.embed(TEXTS, name)])
    answer = stack.infer(name, text=TEXTS, prompt_name=["query"] * len(TEXTS))
    assert cosines(answer["embeddings"], expected(name)["query_embeddings"]).min() >= COSINE["fp32"]
    assert (answer["token_count"][:, 0] == expected(name)["query_token_counts"]).all()


@pytest.mark.parametrize("name", SERVED_RERANKERS)
def test_scores_through_the_server(stack: Stack, name: str) -> None:
    answer = stack.infer(name, query=QUERIES, passage=PASSAGES)
    agrees(name, "fp32", [{"score": row.tolist()} for row in answer["score"]])
    np.testing.assert_allclose(answer["logit"][:, 0], expected(name)["logits"], atol=1e-3)
    body = {"query": QUERIES[0], "documents": PASSAGES[:3], "model": name}
    assert len(stack.post("rerank", "/rerank", body).json()["scores"]) == 3


def test_bf16_through_the_server(stack: Stack) -> None:
    rows = stack.embed(TEXTS, "qwen3-embedding-bf16")
    agrees("qwen3-embedding", "bf16", [{"embeddings": row.tolist()} for row in rows])
    answer = stack.infer("qwen3-reranker-bf16", query=QUERIES, passage=PASSAGES)
    agrees("qwen3-reranker", "bf16", [{"score": row.tolist()} for row in answer["score"]])


def test_a_bi_encoder_scores_by_the_cosine(stack: Stack) -> None:
    query, passage = (stack.embed(list(texts), "minilm") for texts in zip(*PAIRS, strict=True))
    answer = stack.infer("minilm-rerank", query=QUERIES, passage=PASSAGES)
    np.testing.assert_allclose(answer["logit"][:, 0], (query * passage).sum(axis=1), atol=1e-6)


def test_a_head_gives_a_text_the_same_bits_in_any_company(stack: Stack) -> None:
    assert_same_bits(
        stack.embed(TEXTS, "gemma3"), lambda chosen: stack.embed([TEXTS[i] for i in chosen], "gemma3")
    )


def test_what_no_tokenizer_made_fails_alone(stack: Stack) -> None:
    with InferenceServerClient(f"127.0.0.1:{stack.ports['grpc']}") as client:

        def ask(ids: list[int]) -> Any:
            tensor = InferInput("input_ids", [1, len(ids)], "INT32")
            return client.infer("bert-cls-encoder", [tensor.set_data_from_numpy(np.array([ids], np.int32))])

        for ids, sentence in (
            ([1, 10**6], "ids are below"),
            ([1] * 1000, "is over this model's"),
            ([-1], "without a token"),
        ):
            with pytest.raises(InferenceServerException, match=sentence):
                ask(ids)
        assert ask([1, 2, 3]).as_numpy("embeddings").shape == (1, 48)


def test_tokens_are_counted(stack: Stack) -> None:
    def count(state: str) -> float:
        return stack.metric("encoder_tokens_total", model="xlm-roberta-encoder", state=state)

    before = count("received"), count("computed")
    tokens = int(stack.infer("xlm-roberta", text=["one text", "one text"])["token_count"].sum())
    assert (count("received") - before[0], count("computed") - before[1]) == (tokens, tokens // 2)


def test_a_build_checks_the_graphs(tmp_path: Path) -> None:
    """Where there is torch; where there is none it says so."""
    command = ["-m", "build.make", str(TINY / "bert-cross-encoder"), "--runtime", "torch", "--repository"]
    for python, said in ((PYTHON, 0), (ROOT / ".venv" / "bin" / "python", 1)):
        words = [str(python), *command, str(tmp_path / python.parent.parent.name)]
        output = subprocess.check_output(words, cwd=ROOT, text=True)
        assert output.count("its graphs were not checked: torch is not installed") == said


def test_auto_takes_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not for a graph that is adopted."""
    write_smi(tmp_path / "bin", H200)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    folders = [str(TINY / "bert-cls"), str(checkpoint("xlm-roberta", tmp_path))]
    command = [
        str(PYTHON),
        "-m",
        "build.make",
        *folders,
        "--runtime",
        "auto",
        "--repository",
        str(tmp_path / "own"),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    chosen = [runtime_of(read_config(tmp_path / "own", f"{name}-encoder")) for name in ("bert-cls", "xlm-roberta")]
    assert chosen == ["torch", "openvino"]


def test_models_past_the_memory_of_a_card_are_left_out(repository: Path, tmp_path: Path) -> None:
    write_smi(tmp_path, H200.replace("143167", "4096"))
    options = ["--repository", str(repository), "--models", "bert-cls", "xlm-roberta", "minilm", "minilm-rerank"]
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    own = Stack(tmp_path / "stack", options, environment, python=str(PYTHON)).start()
    assert own.stop() == 0
    assert re.findall(
        r"WARNING (\S+) is not served: it needs 2.\d GB of the GPU's memory, and 0.3 GB are left", own.said()
    ) == ["minilm", "minilm-rerank"]
