"""What proofs have found, in tables and plots: `python -m tools.bench.gpu.report` writes them into docs/gpu.md.

Only proofs of a GPU lie in the folder that the page shows.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

from tools.bench.gpu.proof import Proof, Speed
from tools.bench.results import RESULTS
from tools.command import ROOT

PAGE = ROOT / "docs" / "gpu.md"
FOLDER = RESULTS / "gpu"
BEGIN, END = "<!-- proven: written by tools.bench.gpu.report -->", "<!-- end of proven -->"
NOTHING = "No GPU has run it yet, so there are no numbers here."


def table(proof: Proof) -> str:
    """As Markdown: tokens a second of every engine on every load, and what else was found."""
    lines = [
        f"| {proof.device}, {proof.checkpoint}, bf16 | {' | '.join(proof.loads)} | memory |",
        f"|---|{'---|' * len(proof.loads)}---|",
    ]
    for engine in proof.engines:
        cells = [_cell(proof, proof.find(engine, load)) for load in proof.loads]
        lines.append(f"| {engine} | {' | '.join(cells)} | {proof.memory[engine] / 1e9:.1f} GB |")
    return "\n".join([*lines, "", *textwrap.wrap(" ".join(_sentences(proof)), 115)])


def _cell(proof: Proof, speed: Speed | None) -> str:
    return "" if speed is None else f"{speed.tokens_per_second:,.0f} ({proof.share(speed):.0%})"


def _sentences(proof: Proof) -> list[str]:
    rounds = len(proof.speeds[0].rounds)
    rounds_said = f"medians of {rounds} rounds" if rounds > 1 else "one round"
    cosines = [f"{who} {one['lowest']:.7f} ({one['mean']:.7f})" for who, one in proof.cosines.items()]
    bits = [f"{same} of {texts} in {precision}" for precision, (same, texts) in proof.same_bits.items()]
    return [
        f"Tokens a second, {rounds_said}, and the share of the {proof.peak / 1e12:.3g} TFLOP/s that "
        "a large product of bf16 matrices reaches there.",
        f"Lowest (and mean) cosines: {'; '.join(cosines)}; of unlike texts on average {proof.unlike:.2f}.",
        f"Texts with the same bits alone as beside others: {', '.join(bits)}.",
        *(f"{what} was not measured: {why}." for what, why in proof.absent.items()),
    ]


def with_proofs(text: str, proofs: list[Proof]) -> str:
    """`text` with a table and a plot of each proof between the marks."""
    parts = [f"{table(one)}\n\n![Tokens per second](../{_plot(one).relative_to(ROOT)})" for one in proofs]
    content = "\n\n".join([BEGIN, *(parts or [NOTHING]), END])
    return re.sub(f"{BEGIN}.*?{END}", lambda _: content, text, flags=re.DOTALL)


def proofs() -> list[Proof]:
    """Those that the page shows."""
    return [Proof.read(path) for path in sorted(FOLDER.glob("*.json"))]


def _plot(proof: Proof) -> Path:
    return FOLDER / f"{proof.name}.svg"


def main() -> int:
    """Draws the plots and rewrites the page's part."""
    from tools.bench.gpu import plot  # which needs matplotlib

    for proof in proofs():
        plot.draw(proof, _plot(proof))
    PAGE.write_text(with_proofs(PAGE.read_text(), proofs()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
