"""`build.verify --mteb`: mteb's tasks on data of a few texts, in the environment that has torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REFERENCE, ROOT, TINY, Stack

from build.errors import BuildError
from build.verification.quality import Outcome, summarise, table, tasks

PYTHON = ROOT / ".venv-torch" / "bin" / "python"
PACKAGES = PYTHON.parent.parent / "torch.txt"
CHECKPOINT = ROOT / ".cache" / "checkpoints" / "minilm"
OWN = """
import json, sys
from pathlib import Path
import mteb
from sentence_transformers import SentenceTransformer
from build.verification.quality import tasks
model = SentenceTransformer(sys.argv[1], device="cpu")
options = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
found = [mteb.evaluate(model, task, **options) for task in tasks(sys.argv[3:], Path(sys.argv[2]))]
print(json.dumps([one.task_results[0].get_score() for one in found]))
"""


def test_a_difference_counts_on_both_sides() -> None:
    same, better, worse = (Outcome("STS12", "cosine_spearman", 0.7 + by, 0.7) for by in (5e-5, 2e-4, -2e-4))
    assert summarise([same], tolerance=0.9999)["passed"]
    for one in (better, worse):
        report = summarise([same, one], tolerance=0.9999)
        assert not report["passed"]
        assert [task["agreement"] for task in report["tasks"]] == pytest.approx([0.99995, 0.9998])
        assert summarise([same, one], tolerance=0.999)["passed"]


def test_the_table() -> None:
    report = summarise([Outcome("NFCorpus", "ndcg_at_10", 0.31, 0.3125)], tolerance=0.9999)
    lines = table({"family": "f", "server": "triton 2", "reference": "r", **report})
    assert lines[0] == "f on triton 2 against r"
    assert lines[2].split() == ["NFCorpus", "ndcg_at_10", "0.31000", "0.31250", "-0.002500"]
    assert lines[3] == "FAILED     tolerance 1.0e-04"


def test_without_mteb() -> None:
    with pytest.raises(BuildError, match=r"mteb is not installed: run this with .* verify\.lock"):
        tasks(["STS12"])


def test_the_lock_has_what_is_tested() -> None:
    lock = (ROOT / "verify.lock").read_text()
    assert set((ROOT / "tests" / "torch.txt").read_text().split()) <= set(re.findall(r"^\S+==\S+", lock, re.M))
    assert "://" not in lock


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def retrieval(folder: Path, splits: dict[str, str], candidates: bool) -> None:
    """Queries and their documents: of a query's own, what answers it counts for two, some others for one."""
    sets = json.loads((REFERENCE / "rerank.json").read_text())[:12]
    documents = list(dict.fromkeys(text for one in sets for text in one["documents"]))
    lines(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(documents)])
    lines(folder / "queries.jsonl", [{"_id": f"q{i}", "text": one["query"]} for i, one in enumerate(sets)])
    own = [[documents.index(text) for text in one["documents"]] for one in sets]
    answers = [documents.index(one["documents"][one["relevant"]]) for one in sets]
    judged = [(i, j, 1 + (j == answers[i])) for i, row in enumerate(own) for j in row if j == answers[i] or j % 3]
    rows = [{"query-id": f"q{i}", "corpus-id": f"d{j}", "score": score} for i, j, score in judged]
    lines(folder / "qrels.jsonl", rows)
    files = {"default": "qrels", "corpus": "corpus", "queries": "queries"}
    if candidates:
        ranked = [{"query-id": f"q{i}", "corpus-ids": [f"d{j}" for j in row]} for i, row in enumerate(own)]
        lines(folder / "top_ranked.jsonl", ranked)
        files["top_ranked"] = "top_ranked"
    configs = [
        f"- config_name: {name}\n  data_files: [{{split: {splits.get(name, name)}, path: {file}.jsonl}}]\n"
        for name, file in files.items()
    ]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets in the layout of the tasks' own: texts and their beginnings, and what answers a question."""
    folder = tmp_path_factory.mktemp("mteb")
    texts = [text for text in json.loads((REFERENCE / "texts.json").read_text()) if 30 < len(text) < 300][:40]
    cuts = [(text, 1 + i % 9) for i, text in enumerate(texts)]
    rows = [{"sentence1": text, "sentence2": text[: len(text) * n // 10], "score": n / 2} for text, n in cuts]
    lines(folder / "mteb" / "sts12-sts" / "test.jsonl", rows)
    retrieval(folder / "mteb" / "nfcorpus", {"default": "test"}, candidates=False)
    splits = dict.fromkeys(("default", "corpus", "queries", "top_ranked"), "test")
    retrieval(folder / "mteb" / "AskUbuntuDupQuestions", splits, candidates=True)
    return folder


@pytest.fixture(scope="session")
def torch() -> None:
    """The environment, as tests/torch.txt has it now."""
    if not PACKAGES.exists() or PACKAGES.read_text() != (ROOT / "tests" / "torch.txt").read_text():
        if os.environ.get("REQUIRE_TORCH"):
            pytest.fail("`make .venv-torch/torch.txt` could not install torch and mteb")
        pytest.skip("`make .venv-torch/torch.txt` installs torch and mteb")


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = Stack(tmp_path_factory.mktemp("quality") / "work", [], {"ENCODER_PRECISION": "fp32"}).start()
    yield running
    assert running.stop() == 0


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    words = [str(PYTHON), *command]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def verify(stack: Stack, family: str, reference: Path, data: Path, *names: str, report: Path) -> Any:
    url = f"localhost:{stack.ports['grpc']}"
    options = ["--url", url, "--mteb", *names, "--mteb-data", str(data), "--report", str(report)]
    done = run("-m", "build.verify", family, "--reference", str(reference), *options)
    assert report.exists(), done.stderr[-2000:]
    content = json.loads(report.read_text())
    assert done.returncode == (0 if content["passed"] else 1)
    return content


@pytest.mark.usefixtures("torch")
def test_a_family_scores_as_its_reference_does(fp32: Stack, data: Path, tmp_path: Path) -> None:
    """And the reference as mteb itself has sentence-transformers score."""
    names = ("STS12", "NFCorpus")
    report = verify(fp32, "minilm", CHECKPOINT, data, *names, report=tmp_path / "report.json")
    assert report["passed"]
    assert [(one["task"], one["measure"]) for one in report["tasks"]] == [
        ("STS12", "cosine_spearman"),
        ("NFCorpus", "ndcg_at_10"),
    ]
    done = run("-c", OWN, str(CHECKPOINT), str(data), *names)
    assert done.returncode == 0, done.stderr[-2000:]
    own = json.loads(done.stdout.splitlines()[-1])
    assert [one["reference"] for one in report["tasks"]] == pytest.approx(own, abs=1e-4)
    assert all(0.3 < score < 0.99 for score in own)


@pytest.mark.usefixtures("torch")
def test_a_reranker_scores_as_its_reference_does(fp32: Stack, data: Path, tmp_path: Path) -> None:
    report = verify(
        fp32, "minilm-rerank", CHECKPOINT, data, "AskUbuntuDupQuestions", report=tmp_path / "report.json"
    )
    assert report["passed"]
    assert 0.3 < report["tasks"][0]["served"] < 0.99


@pytest.mark.usefixtures("torch")
def test_another_model_is_found_out(fp32: Stack, data: Path, tmp_path: Path) -> None:
    report = verify(fp32, "minilm", TINY / "bert-cls", data, "STS12", report=tmp_path / "report.json")
    assert not report["passed"]


@pytest.mark.usefixtures("torch")
def test_what_mteb_cannot_do_is_one_sentence(data: Path) -> None:
    cases = (
        (["STS99"], "error: mteb .* has no task 'STS99'"),
        (
            ["STS13", "--mteb-data", str(data)],
            "error: there is no .*sts13-sts, which is to hold the data of STS13",
        ),
        (["STS13"], "error: the data of STS13 cannot be loaded: .* fetch mteb/sts13-sts of the Hub's data sets"),
    )
    calls = [["minilm", "--reference", str(CHECKPOINT), "--mteb", *options] for options, _ in cases]
    done = run("-c", f"from build.verify import main; print([main(call) for call in {calls}])")
    assert done.stdout.splitlines()[-1:] == ["[1, 1, 1]"], done.stderr[-2000:]
    found = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for line, (_, words) in zip(found, cases, strict=True):
        assert re.match(words, line), line
