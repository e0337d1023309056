"""The same on Ray's local cluster: two workers, one of them killed, and a job that is killed as a whole."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, Stack
from containers import until
from test_backfill import direct, embedded, run, texts_of
from test_backfill_files import Corpus, parts

PYTHON = ROOT / ".venv-ray" / "bin" / "python"
TEXTS = 6000
WORKER = "ray::MapWorker"


@pytest.fixture(scope="module", autouse=True)
def ray() -> None:
    if not (ROOT / ".venv-ray" / "ray.lock").exists():
        if os.environ.get("REQUIRE_RAY"):
            pytest.fail("`make .venv-ray/ray.lock` could not install Ray")
        pytest.skip("`make .venv-ray/ray.lock` installs Ray")


@pytest.fixture
def corpus(tmp_path: Path, small: Stack) -> Corpus:
    found = Corpus("parquet", tmp_path, small)
    found.write("a", texts_of(TEXTS)[:4000])
    found.write("b", texts_of(TEXTS)[4000:])
    return found


class Job:
    """`--engine ray` with two workers, and all that it starts."""

    def __init__(self, corpus: Corpus, said: Path) -> None:
        self.said = said
        words = map(str, corpus.words("--engine", "ray", "--workers", 2, "--calls", 1))
        with said.open("w") as errors:
            self.process = subprocess.Popen(
                [PYTHON, "-m", "tools.backfill", *words],
                cwd=ROOT,
                stderr=errors,
                stdout=errors,
                env=os.environ | {"RAY_ADDRESS": "local"},
                start_new_session=True,
            )

    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        found = []
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                found += [process] if any(WORKER in word for word in process.cmdline()) else []
        return found

    def end(self) -> None:
        """Nothing of it is left."""
        for process in [psutil.Process(self.process.pid), *self.tree()] if self.process.poll() is None else []:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def job(corpus: Corpus, tmp_path: Path) -> Iterator[Job]:
    running = Job(corpus, tmp_path / "said")
    yield running
    running.end()


def test_a_worker_that_is_killed_is_replaced(job: Job, corpus: Corpus, small: Stack) -> None:
    until(lambda: (len(job.workers()) == 2 and parts(corpus) > 0) or job.process.poll() is not None, 200)
    job.workers()[0].kill()
    assert job.process.wait(240) == 0, job.said.read_text()
    assert embedded(job.said.read_text()) >= TEXTS - 2000
    assert [row["text"] for row in corpus.read()] == texts_of(TEXTS)
    assert (corpus.matrix() == direct(small, texts_of(TEXTS))).all()
    assert embedded(run(*corpus.words())) == 0


def test_a_killed_job_goes_on_and_either_engine_can(job: Job, corpus: Corpus, small: Stack) -> None:
    until(lambda: parts(corpus) > 0 or job.process.poll() is not None, 200)
    job.end()
    done = [path for path in corpus.vectors.iterdir() if path.suffix == ".parquet" and path.name[0] != "."]
    assert embedded(run(*corpus.words())) == TEXTS - 500 * len(done)
    assert (corpus.matrix() == direct(small, texts_of(TEXTS))).all()
