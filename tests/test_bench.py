"""The pages show what the benchmark measured, and the benchmark's own arithmetic."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from tools.bench import corpus, machine, report
from tools.bench.padding import padding
from tools.bench.report import (
    FASTEST,
    OURS,
    SAME,
    Measured,
    full_table,
    shell_table,
    strongest,
    with_front,
    with_measured,
)
from tools.bench.results import RESULTS, Results, percentiles


def test_pages_are_in_step_with_the_results() -> None:
    """`python -m tools.bench.report` brings them there."""
    measured, front, page = Measured.read(), report.README.read_text(), report.PAGE.read_text()
    assert with_front(front, measured) == front
    assert with_measured(page, measured) == page


def test_every_plot_is_there() -> None:
    """Those that pages and benchmark name; matplotlib, which draws them, is not installed for tests."""
    names = re.search(r"^NAMES = \((.*)\)$", (ROOT / "tools/bench/plots.py").read_text(), re.MULTILINE)
    assert names is not None
    plots = re.findall(r'"(.*?)"', names[1])
    assert len(plots) == 4
    for path in RESULTS.glob("*.svg"):
        assert "prefers-color-scheme: dark" in path.read_text()
    assert {*plots, "peers.svg", "residency.svg"} <= {path.name for path in RESULTS.iterdir()}


def test_results_are_written_as_they_are_read(tmp_path: Path) -> None:
    results = Results.read(RESULTS / "bench.json")
    results.write(tmp_path / "again.json")
    assert Results.read(tmp_path / "again.json") == results
    assert full_table(results).count("\n| ") == len(results.measurements)


def test_the_shell_is_measured_at_every_load() -> None:
    results = Results.read(RESULTS / "shell.json")
    loads = {(way, clients, texts) for way in ("embed", "grpc") for clients in (1, 16, 64) for texts in (1, 8, 64)}
    assert {(one.way, one.clients, one.texts_per_call) for one in results.measurements} == loads
    one = results.measurements[0]
    seconds = sum(one.rounds[0].cpu_seconds.values())
    assert sum(one.rounds[0].cpu_ms_a_text.values()) == pytest.approx(1000 * seconds / one.rounds[0].texts)
    assert shell_table(results).count("\n| ") == len(loads)


def test_a_peer_is_measured_or_said_to_be_missing() -> None:
    """Nothing is both, and the README shows of each kind the one that no other of the same vectors outruns."""
    results = Results.read(RESULTS / "peers.json")
    measured = {one.way for one in results.measurements}
    assert measured == {way for way, peer in results.peers.items() if not peer.missing}
    page = report.PAGE.read_text()
    assert all(f"{way} was not measured: " in page for way in results.peers.keys() - measured)
    speeds = {one.key: one.texts_per_second for one in results.measurements}
    for way, peer in results.peers.items():
        if way != OURS and peer.cosine is not None and peer.cosine >= SAME:
            clients, texts = FASTEST[peer.kind]
            best = strongest(results)[peer.kind]
            assert speeds[way, "docstrings", clients, texts] <= speeds[best, "docstrings", clients, texts]


def test_corpora_are_the_same_on_every_call() -> None:
    for texts in (corpus.docstrings(), corpus.queries(), corpus.chunks()):
        assert all(texts)
        assert len(set(texts)) == len(texts) > 128
    repeated = corpus.repeats()[:512]
    assert 0.4 < len(set(repeated)) / len(repeated) < 0.6
    assert repeated == corpus.repeats()[:512]


def test_percentiles() -> None:
    assert percentiles([3.0]) == [3.0] * 101
    assert [percentiles([float(n) for n in range(1000, -1, -1)])[share] for share in (0, 50, 99, 100)] == [
        0,
        500,
        990,
        1000,
    ]


def test_padding_follows_the_steps_rule() -> None:
    """The step rounds the tokens of a micro-batch, and the width of its rows, up to 16."""
    assert padding([16, 32, 48], 1) == {"linear": 0, "attention": 0}
    assert padding([8], 1) == {"linear": 0.5, "attention": 0.5}
    assert padding([8, 8], 2) == {"linear": 0, "attention": 0.5}


@pytest.mark.parametrize("name", ["stolen", "others", "raw_spread"])
def test_a_noisy_machine_is_said(name: str) -> None:
    quiet = {"stolen": 0.0, "others": 0.01, "raw_spread": 0.02}
    assert machine.warnings(quiet) == []
    (sentence,) = machine.warnings(quiet | {name: 0.2})
    assert "20%" in sentence


RUN = """
from time import sleep
from tools.bench.server import stack
from tools.command import ROOT
with stack(["minilm"], ROOT / "model_repository"):
    print("measuring", flush=True)
    sleep(600)
"""


@pytest.mark.parametrize("is_ready", [True, False])
def test_sigterm_ends_what_a_benchmark_has_started(is_ready: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", RUN], cwd=ROOT, stdout=subprocess.PIPE) as run:
        own = psutil.Process(run.pid)
        if is_ready:
            assert run.stdout is not None
            assert run.stdout.readline() == b"measuring\n"
        while not own.children(recursive=True):
            assert run.poll() is None
        servers = own.children(recursive=True)
        assert any(process.name() == "tritonserver" for process in servers) == is_ready
        run.terminate()
        assert run.wait(60) == 143
        _, alive = psutil.wait_procs(servers, timeout=30)
        assert not alive
