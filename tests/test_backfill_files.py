"""A backfill of Parquet, JSON lines and a pipe, by the real stack."""

from __future__ import annotations

import json
import math
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, Stack
from containers import until
from test_backfill import (
    DIMENSIONS,
    Gateway,
    assert_one_sentence,
    command,
    direct,
    embedded,
    gateway,
    run,
    texts_of,
)

from tools.backfill.origin import Origin
from tools.backfill.parquet import Parquet

assert gateway  # a fixture

Rows = list[dict[str, Any]]


def write_parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows, pa.schema([("id", pa.string()), ("text", pa.string())])), path, 700)


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_parquet(path: Path) -> Rows:
    rows: Rows = pq.read_table(path).to_pylist()
    return rows


def read_jsonl(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


KINDS: dict[str, tuple[Callable[[Path, Rows], None], Callable[[Path], Rows]]] = {
    "parquet": (write_parquet, read_parquet),
    "jsonl": (write_jsonl, read_jsonl),
}


class Corpus:
    """A folder of texts, and one of vectors."""

    def __init__(self, kind: str, folder: Path, stack: Stack) -> None:
        self.kind, self.texts, self.vectors, self.stack = kind, folder / "texts", folder / "vectors", stack
        self.write_file, self.read_file = KINDS[kind]
        self.texts.mkdir()

    def write(self, name: str, texts: Sequence[str | None]) -> None:
        path = self.texts / f"{name}.{self.kind}"
        path.parent.mkdir(exist_ok=True)
        self.write_file(path, [{"id": f"{name}-{i}", "text": text} for i, text in enumerate(texts)])

    def words(self, *more: object) -> list[object]:
        words = [self.texts, self.vectors, "--url", self.stack.url("embed", ""), "--part-rows", 500, *more]
        return words if "--model" in more else [*words, "--model", "bert-cls"]

    def read(self) -> Rows:
        """All rows, in the order of files."""
        return [row for path in sorted(self.vectors.rglob(f"*.{self.kind}")) for row in self.read_file(path)]

    def matrix(self) -> npt.NDArray[np.float32]:
        return np.array([row["embedding"] or [0.0] * DIMENSIONS for row in self.read()], np.float32)


@pytest.fixture(params=KINDS)
def corpus(request: pytest.FixtureRequest, tmp_path: Path, small: Stack) -> Corpus:
    return Corpus(request.param, tmp_path, small)


def test_every_row_gets_its_vector(corpus: Corpus, small: Stack) -> None:
    texts = texts_of(1800)
    corpus.write("a", texts[:1300])
    corpus.write("b/c", texts[1300:])
    said = run(*corpus.words())
    assert embedded(said) == 1800
    names = [str(path.relative_to(corpus.vectors)) for path in sorted(corpus.vectors.rglob(f"*.{corpus.kind}"))]
    assert names == [f"{name}.{corpus.kind}" for name in ("a-00000", "a-00001", "a-00002", "b/c-00000")]
    assert [row["text"] for row in corpus.read()] == texts
    assert (corpus.matrix() == direct(small, texts)).all()
    noted = json.loads((corpus.vectors / "origin.json").read_text())["origin"]
    assert (noted["family"], noted["prompt"], noted["dimensions"]) == ("bert-cls", "document", DIMENSIONS)
    if corpus.kind == "parquet":
        schema = pq.read_schema(corpus.vectors / "a-00000.parquet")
        assert json.loads(schema.metadata[b"embedding_origin"]) == noted
        assert schema.field("embedding").type == pa.list_(pa.float32(), DIMENSIONS)
    assert embedded(run(*corpus.words())) == 0


def test_only_texts_that_changed_are_embedded_again(corpus: Corpus, small: Stack) -> None:
    texts = texts_of(1300)
    corpus.write("a", texts)
    run(*corpus.words())
    untouched = corpus.vectors / f"a-00002.{corpus.kind}"
    before = untouched.stat().st_mtime_ns
    texts = [*texts[:3], "changed", *texts[5:]]  # one text is gone
    corpus.write("a", texts)
    assert (
        embedded(run(*corpus.words())) == 3
    )  # the changed one, and one that moved into each part before the last
    assert [row["text"] for row in corpus.read()] == texts
    assert (corpus.matrix() == direct(small, texts)).all()
    assert untouched.stat().st_mtime_ns > before
    corpus.write("a", texts[:400])
    assert embedded(run(*corpus.words())) == 0
    assert [row["text"] for row in corpus.read()] == texts[:400]


def test_killed_three_times_two_jobs_end_it_the_same(corpus: Corpus, small: Stack) -> None:
    texts = texts_of(6000)
    corpus.write("a", texts)
    generator = random.Random(11)
    words = command(*corpus.words())
    done = 0
    for _ in range(3):
        job = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
        until(lambda job=job, done=done: job.poll() is not None or parts(corpus) > done)  # type: ignore[misc]
        time.sleep(0.3 * generator.random())
        job.kill()
        job.wait()
        done = parts(corpus)
    jobs = [subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert sum(embedded(job.communicate()[1]) for job in jobs) == 6000 - 500 * done
    assert [job.returncode for job in jobs] == [0, 0]
    assert [row["text"] for row in corpus.read()] == texts
    assert (corpus.matrix() == direct(small, texts)).all()
    assert [path for path in corpus.vectors.iterdir() if path.name.startswith(".")] == []


def parts(corpus: Corpus) -> int:
    return len(list(corpus.vectors.glob(f"a-*.{corpus.kind}")))


def test_a_job_waits_for_what_another_does_and_takes_it_over(corpus: Corpus, gateway: Gateway) -> None:
    corpus.write("a", texts_of(6000))
    with Gateway() as silent:
        silent.open.clear()
        words = command(corpus.texts, corpus.vectors, "--part-rows", 500, "--url")
        dead = subprocess.Popen([*words, silent.url], cwd=ROOT, stderr=subprocess.DEVNULL)
        until(lambda: len(silent.calls) > 0)
        living = subprocess.Popen([*words, gateway.url], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert living.stderr is not None
        said = next(line for line in living.stderr if line.startswith("waiting for"))
        assert said == f"waiting for another job, which does {corpus.vectors}/a-00000.{corpus.kind}\n"
        assert 0 < 500 * parts(corpus) == len(gateway.texts) < 6000
        dead.kill()
        dead.wait()
        silent.open.set()
        silent.shutdown()
    rest = living.communicate()[1]
    assert living.returncode == 0, rest
    assert sorted(gateway.texts) == sorted(texts_of(6000))
    assert [row["embedding"] for row in corpus.read()] == [[1.0] * DIMENSIONS] * 6000
    assert [path for path in corpus.vectors.iterdir() if path.name.startswith(".")] == []


def test_what_has_no_vector_is_listed(corpus: Corpus, small: Stack) -> None:
    corpus.write("a", ["one", "", None, "two"])
    for texts in (2, 0):
        said = run(*corpus.words(), status=3)
        assert embedded(said) == texts
        assert "a-1: its text is empty" in said
        assert "a-2: its text is NULL" in said
    assert [row["embedding"] is None for row in corpus.read()] == [False, True, True, False]
    assert (corpus.matrix()[[0, 3]] == direct(small, ["one", "two"])).all()


def test_two_vector_spaces_never_mix(corpus: Corpus, small: Stack) -> None:
    corpus.write("a", texts_of(5))
    run(*corpus.words())
    assert_one_sentence(
        run(*corpus.words("--model", "roberta"), status=1), "holds vectors of bert-cls .*--replace"
    )
    assert (corpus.matrix() == direct(small, texts_of(5))).all()
    run(*corpus.words("--model", "roberta", "--replace"))
    assert (corpus.matrix() == direct(small, texts_of(5), "roberta")).all()
    (corpus.vectors / "origin.json").unlink()
    assert_one_sentence(run(*corpus.words(), status=1), "holds vectors of unknown origin")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (["postgresql://localhost/x", "--table", "t"], "a table: leave it out, and share it"),
        (["-"], "a pipe: leave it out$"),
        (["corpus", "vectors"], "JSON lines: leave it out, and share it"),
    ],
)
def test_ray_does_nothing_but_parquet(source: list[str], said: str, tmp_path: Path) -> None:
    """Before anything starts."""
    (tmp_path / "corpus").mkdir()
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [{"text": "a"}])
    words = [tmp_path / word if word in ("corpus", "vectors") else word for word in source]
    said = f"--engine ray does Parquet and not {said}"
    assert_one_sentence(run(*words, "--engine", "ray", "--url", "http://127.0.0.1:9", status=1), said)
    assert not (tmp_path / "vectors").exists()


def test_a_row_with_no_number_is_the_same_row(tmp_path: Path) -> None:
    """As it is read again, from the middle of a file, beside a NULL."""
    written, origin = tmp_path / "part.parquet", Origin("m", None, None, None, None, None, 2)
    numbers = pa.table({"id": ["a", "b", "c", "d"], "share": pa.array([0.5, None, math.nan, 1.0])})
    pq.write_table(numbers, tmp_path / "source.parquet")
    *_, (_, part) = Parquet().parts(tmp_path / "source.parquet", 2, None)
    with written.open("wb") as file:
        Parquet().write(file, part, "embedding", [[0.0, 1.0], None], origin)
    again, _ = Parquet().split(written, "embedding")
    assert Parquet().equal(again, part)
    other = part.set_column(1, "share", pa.array([math.nan, math.nan]))
    assert not Parquet().equal(again, other)


def test_a_dry_run_writes_nothing(corpus: Corpus) -> None:
    corpus.write("a", texts_of(1000))
    assert "1000 texts of" in run(*corpus.words("--dry-run"))
    assert not corpus.vectors.exists()


def test_what_is_wrong_is_one_sentence(corpus: Corpus, tmp_path: Path) -> None:
    assert_one_sentence(run(*corpus.words(), status=1), "has neither .parquet nor .jsonl")
    corpus.write("a", ["a"])
    assert_one_sentence(
        run(*corpus.words("--text", "body"), status=1), "has no column 'body': name it with --text"
    )
    assert_one_sentence(run(*corpus.words("--vector", "id"), status=1), "has a column 'id' already")
    assert_one_sentence(run(*corpus.words("--table", "chunks"), status=1), "--table is for Postgres")
    assert_one_sentence(run(tmp_path / "missing", tmp_path, status=1), "there is no folder or file")
    assert_one_sentence(run(corpus.texts, status=1), "name the folder that the vectors go to")
    run(*corpus.words())
    assert_one_sentence(run(*corpus.words("--part-rows", "7"), status=1), "has files of 500 rows")
    (corpus.texts / f"broken.{corpus.kind}").write_bytes(b"{")
    assert_one_sentence(run(*corpus.words(), status=1), r"broken\.\w+")
    (corpus.texts / "other.parquet").touch()
    (corpus.texts / "other.jsonl").touch()
    assert_one_sentence(run(*corpus.words(), status=1), "has both .parquet and .jsonl")


def test_a_pipe(small: Stack) -> None:
    texts = texts_of(3000)
    rows: Rows = [{"n": i, "text": text} for i, text in enumerate([*texts, ""])]
    rows[1]["large"] = 10**30
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    words = command("-", "--url", small.url("embed", ""), "--model", "bert-cls")
    done = subprocess.run(words, cwd=ROOT, input=lines, capture_output=True, text=True)
    assert done.returncode == 3
    assert "line 3001: its text is empty" in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.stdout.startswith('{"n": 0, "text": "0 ')
    assert rows[1]["large"] == 10**30
    assert [row["n"] for row in rows] == list(range(3001))
    assert rows.pop()["embedding"] is None
    assert (np.array([row["embedding"] for row in rows], np.float32) == direct(small, texts)).all()
    done = subprocess.run(words, cwd=ROOT, input='{"text": "a"}\n["b"]\n', capture_output=True, text=True)
    assert_one_sentence(done.stderr, "line 2 is no JSON object")
