"""The plots of a benchmark's results, light and dark; `python -m tools.bench.plots` draws them again."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import ScalarFormatter

from tools.bench.results import RESULTS, Measurement, Results

NAMES = ("throughput.svg", "latency.svg", "stages.svg", "scaling.svg")
COLOURS = {"raw": "#6e7781", "grpc": "#3b6fb6", "embed": "#d1742c"}
LABELS = {"raw": "raw loop", "grpc": "v2 gRPC", "embed": "/embed"}
STAGES = ("gateway", "queue", "tokenizer", "encoder")
PEER_PANELS = {"1 client": (1, 1), "32 clients": (32, 1), "64 texts a call": (1, 64)}
"""Label -> the (clients, texts a call) it shows."""
INK, GRID = "#24292f", "#d0d7de"
DARK = {INK: "#e6edf3", GRID: "#3d444d"}
"""Colour -> what it is where the reader's system is dark."""
OF = ("fill", "stroke")
STYLE = {
    "svg.fonttype": "none",
    # The same results give the same bytes.
    "svg.hashsalt": "triton-embeddings",
    "savefig.transparent": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
    "lines.marker": "o",
    "lines.markersize": 4,
}


def main() -> int:
    """Draws them from the results that are there."""
    draw(Results.read(RESULTS / "bench.json"), RESULTS)
    draw_peers(Results.read(RESULTS / "peers.json"), RESULTS)
    draw_residency(json.loads((RESULTS / "residency.json").read_text()), RESULTS)
    return 0


def draw(results: Results, folder: Path) -> None:
    """Writes every plot of NAMES."""
    mpl.use("agg")
    with plt.rc_context(STYLE):
        for name, plot in zip(NAMES, (_throughput, _latency, _stages, _scaling), strict=True):
            save(plot(results), folder / name)


def draw_peers(results: Results, folder: Path) -> None:
    """Writes peers.svg: speed above, latency below."""
    mpl.use("agg")
    found = {one.key: one for one in results.measurements}
    ways = [way for way, peer in results.peers.items() if not peer.missing][::-1]
    with plt.rc_context(STYLE):
        size = {"figsize": (8, 0.6 + 0.4 * len(ways)), "layout": "constrained"}
        figure, (speeds, latencies) = plt.subplots(2, len(PEER_PANELS), sharey=True, **size)
        for above, below, (call, key) in zip(speeds, latencies, PEER_PANELS.items(), strict=True):
            ones = [found.get((way, "docstrings", *key)) for way in ways]
            _bars(above, f"texts/s, {call}", ways, [one.texts_per_second if one else None for one in ones])
            slowest = [one.percentiles_ms[99] if one else None for one in ones]
            _bars(below, f"ms, 99 of 100 calls, {call}", ways, slowest)
        save(figure, folder / "peers.svg")


def draw_residency(content: dict[str, Any], folder: Path) -> None:
    """Writes residency.svg: what each family takes, over time, under what there is for all."""
    mpl.use("agg")
    seconds = [one["seconds"] for one in content["samples"]]
    names = sorted({name for one in content["samples"] for name in one["resident"]})
    taken = [[one["resident"].get(name, 0) / 1e6 for one in content["samples"]] for name in names]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
        shades = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(names)))
        axes.stackplot(seconds, taken, labels=names, colors=shades, step="post")
        axes.axhline(
            content["budget_bytes"] / 1e6, color=INK, linestyle="--", marker="", label="memory for models"
        )
        axes.set(xlabel="seconds", ylabel="MB of loaded models", xlim=(0, seconds[-1]))
        figure.legend(loc="outside right")
        save(figure, folder / "residency.svg")


def _bars(axes: Any, label: str, ways: list[str], sizes: list[float | None]) -> None:
    """One a peer, none where it was not measured."""
    colours = [COLOURS["embed" if way == "this" else "raw"] for way in ways]
    bars = axes.barh(ways, [size or 0 for size in sizes], color=colours, height=0.6)
    axes.bar_label(bars, [f"{size:.0f}" if size else "" for size in sizes], padding=3)
    axes.margins(x=0.25)
    axes.set_xlabel(label)
    axes.grid(axis="y", visible=False)


def save(figure: Any, path: Path) -> None:
    """As SVG without the metadata that changes with every run, and with other colours on a dark page."""
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    rules = [
        f"[style*='{of}: {light}'] {{ {of}: {dark} !important }}" for light, dark in DARK.items() for of in OF
    ]
    style = f"<style>@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}</style>"
    path.write_text(re.sub(r"(<svg [^>]*>)", lambda tag: f"{tag[1]}\n {style}", path.read_text(), count=1))


def _throughput(results: Results) -> Any:
    figure, (by_clock, by_cpu) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    raw = results.find("raw", "docstrings", 0, 0)
    panels: list[tuple[Any, str, Callable[[Measurement], float]]] = [
        (by_clock, "tokens per second", lambda one: one.tokens_per_second),
        (by_cpu, "tokens per CPU second", lambda one: one.tokens_per_cpu_second),
    ]
    for axes, label, value in panels:
        axes.axhline(value(raw), color=COLOURS["raw"], linestyle="--", marker="", label=LABELS["raw"])
        for way in ("grpc", "embed"):
            line = _by_clients(results, way)
            axes.plot(
                [one.clients for one in line], [value(one) for one in line], color=COLOURS[way], label=LABELS[way]
            )
        _count_axis(axes, [1, 4, 16, 64], "clients, one text a call")
        axes.set(ylabel=label, ylim=(0, None))
    by_clock.legend(loc="lower right")
    return figure


def _latency(results: Results) -> Any:
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    shades = ["#f0b383", "#e08f4e", "#d1742c", "#8f4a15"]
    for one, shade in zip(_by_clients(results, "embed"), shades, strict=True):
        clients = "1 client" if one.clients == 1 else f"{one.clients} clients"
        p50, p99 = one.percentiles_ms[50], one.percentiles_ms[99]
        label = f"{clients}: p50 {p50:.0f} ms, p99 {p99:.0f} ms"
        axes.plot(one.percentiles_ms, range(101), color=shade, marker="", label=label)
    axes.set(
        xscale="log", xlabel="ms from sending a text to /embed to its vector", ylabel="% of calls", ylim=(0, 100)
    )
    axes.xaxis.set_major_formatter(ScalarFormatter())
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _stages(results: Results) -> Any:
    figure, axes = plt.subplots(figsize=(8, 2.2), layout="constrained")
    rows = {"a query": "queries", "a docstring": "docstrings"}
    colours = dict(zip(STAGES, ["#d1742c", "#c9c9c9", "#7fa650", "#3b6fb6"], strict=True))
    ends = dict.fromkeys(rows, 0.0)
    for stage, colour in colours.items():
        sizes = [results.find("embed", name, 1).stages_ms[stage] for name in rows.values()]
        axes.barh(list(rows), sizes, left=list(ends.values()), color=colour, label=stage, height=0.5)
        ends = {row: end + size for (row, end), size in zip(ends.items(), sizes, strict=True)}
    axes.set(xlabel="ms of a call of one text to /embed, one client, mean")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=len(STAGES))
    return figure


def _scaling(results: Results) -> Any:
    figure, panels = plt.subplots(1, 3, figsize=(8, 3), layout="constrained", sharey=True)
    raw = results.find("raw", "docstrings", 0, 0)
    calls = sorted(
        (one for one in results.measurements if one.key[:3] == ("embed", "docstrings", 1)),
        key=lambda one: one.texts_per_call,
    )
    lengths = {
        way: {
            int(one.corpus.split()[0]): one
            for one in results.measurements
            if one.way == way and "tokens" in one.corpus
        }
        for way in ("raw", "embed")
    }
    for way in ("grpc", "embed"):
        panels[0].plot(
            [one.clients for one in _by_clients(results, way)],
            _costs(_by_clients(results, way)),
            color=COLOURS[way],
        )
    panels[1].plot([one.texts_per_call for one in calls], _costs(calls), color=COLOURS["embed"])
    for axes in panels[:2]:
        axes.axhline(_costs([raw])[0], color=COLOURS["raw"], linestyle="--", marker="")
    for way, line in lengths.items():
        style = {"linestyle": "--", "marker": ""} if way == "raw" else {}
        panels[2].plot(list(line), _costs(list(line.values())), color=COLOURS[way], **style)
    _count_axis(panels[0], [1, 4, 16, 64], "clients, one text a call")
    _count_axis(panels[1], [1, 8, 64, 256, 1024], "texts a call, one client")
    _count_axis(panels[2], list(lengths["embed"]), "tokens a text, 16 clients")
    panels[0].set(ylabel="µs of CPU time a token", ylim=(0, None))
    handles = [
        Line2D([], [], color=COLOURS[way], linestyle="--" if way == "raw" else "-", marker="") for way in LABELS
    ]
    figure.legend(handles, list(LABELS.values()), loc="outside upper center", ncols=3)
    return figure


def _by_clients(results: Results, way: str) -> list[Measurement]:
    """One docstring a call."""
    line = [one for one in results.measurements if one.key[:2] == (way, "docstrings") and one.texts_per_call == 1]
    return sorted(line, key=lambda one: one.clients)


def _costs(line: list[Measurement]) -> list[float]:
    return [1e6 / one.tokens_per_cpu_second for one in line]


def _count_axis(axes: Any, ticks: list[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel(label)


if __name__ == "__main__":
    sys.exit(main())
