"""The plot of a proof."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from tools.bench.gpu.proof import Proof
from tools.bench.plots import STYLE, save


def draw(proof: Proof, path: Path) -> None:
    """Writes it: tokens per second of every engine, by load."""
    mpl.use("agg")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
        engines, loads = proof.engines, proof.loads
        width = 0.8 / len(engines)
        for i, engine in enumerate(engines):
            found = [(place, one) for place, load in enumerate(loads) if (one := proof.find(engine, load))]
            places = [place + (i - (len(engines) - 1) / 2) * width for place, _ in found]
            bars = axes.bar(places, [one.tokens_per_second for _, one in found], width, label=engine.strip("`"))
            axes.bar_label(bars, [f"{proof.share(one):.0%}" for _, one in found], fontsize=6)
        axes.set_xticks(range(len(loads)), loads)
        axes.set(ylabel="tokens per second, share of peak")
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside upper center", ncols=len(engines))
        save(figure, path)
