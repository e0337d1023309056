"""Tables of benchmarks; `python -m tools.bench.report` writes those of README and docs/benchmarks.md."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tools.bench import machine
from tools.bench.results import RESULTS, Measurement, Results
from tools.command import ROOT

README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured: written by tools.bench.report -->", "<!-- end of measured -->"

ROWS = [
    ("grpc", "docstrings", 1, 1),
    ("grpc", "docstrings", 16, 1),
    ("grpc", "docstrings", 64, 1),
    ("embed", "docstrings", 1, 1),
    ("embed", "docstrings", 16, 1),
    ("embed", "docstrings", 64, 1),
    ("embed", "docstrings", 1, 64),
    ("embed", "chunks", 16, 1),
]
"""What of it all the page shows."""


ROLES = ("gateway", "tritonserver", "tokenizer", "encoder", "pooling")
"""Processes of a stack, as far as it has them."""

SHELL_ROWS = [("embed", 1, 1), ("embed", 16, 1), ("embed", 64, 1), ("embed", 16, 8), ("embed", 16, 64)]
SHELL_ROWS += [("grpc", 1, 1), ("grpc", 64, 1), ("grpc", 16, 64)]
"""(way, clients, texts a call) of the shell's rows on the page."""


@dataclass(frozen=True)
class Measured:
    """What the benchmarks wrote."""

    bench: Results
    shell: Results
    peers: Results
    backfill: dict[str, Any]
    residency: dict[str, Any]

    @classmethod
    def read(cls) -> Measured:
        """As it is committed."""
        bench, shell, peers = (Results.read(RESULTS / f"{name}.json") for name in ("bench", "shell", "peers"))
        others = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("backfill", "residency")}
        return cls(bench, shell, peers, **others)


def main() -> int:
    """Rewrites their parts."""
    measured = Measured.read()
    README.write_text(with_front(README.read_text(), measured))
    PAGE.write_text(with_measured(PAGE.read_text(), measured))
    return 0


def with_front(text: str, measured: Measured) -> str:
    """The README with the few lines that compare, between the marks."""
    return _between_marks(text, front_table(measured.peers), front_sentences(measured.bench, measured.peers))


def with_measured(text: str, measured: Measured) -> str:
    """The page with every table and plot, between the marks."""
    bench, shell, peers = measured.bench, measured.shell, measured.peers
    plot = f"![Tokens per second, and per CPU second, as clients grow]({_path('throughput.svg')})"
    parts = [RAW, table(bench), plot, sentences(bench)]
    corpora = dict.fromkeys(one.corpus for one in peers.measurements)
    parts += ["## Beside others", peers_sentences(peers), *(peers_table(peers, name) for name in corpora)]
    parts += [f"![Texts a second, and latency, of each peer]({_path('peers.svg')})"]
    parts += ["## A large backfill", backfill_sentences(measured.backfill)]
    parts += ["## Many models in the memory of a few", residency_sentences(measured.residency)]
    parts += [f"![Memory that each model takes, over time]({_path('residency.svg')})"]
    parts += ["## Around the engine", shell_table(shell, SHELL_ROWS), shell_sentences(shell)]
    parts += ["## Sizing", sizing_table(bench), sizing_sentences(bench)]
    return _between_marks(text, *parts)


def _between_marks(text: str, *parts: str) -> str:
    content = "\n\n".join([BEGIN, *parts, END])
    return re.sub(f"{BEGIN}.*?{END}", lambda _: content, text, flags=re.DOTALL)


def _path(name: str) -> str:
    """Of a plot, as the page links to it."""
    return f"../{(RESULTS / name).relative_to(ROOT)}"


RAW = """The raw loop is OpenVINO alone. It runs again before and after each load.
*Share of raw* is what a load keeps of those runs, not of the first row."""
"""How to read the first table."""

OURS = "this"
"""The stack among its peers."""

FRONT_KINDS = {
    "gateway": "a home-made gateway",
    "server": "the fastest other server",
    "library": "the fastest library",
}
"""Kind of a peer -> what the README calls the one that it shows."""

FASTEST = {"gateway": (32, 1), "server": (32, 1), "library": (1, 64)}
"""Kind of a peer -> clients and texts a call that decide which is the fastest: what such a peer is made for."""

SAME = 0.999
"""Cosine from which on vectors are the same up to the precision of fp32 and bf16."""

FRONT_ROWS: list[tuple[str, int, int, Callable[[Measurement], str]]] = [
    ("texts a second, 32 clients", 32, 1, lambda one: f"{one.texts_per_second:.0f}"),
    ("99 of 100 calls take at most, 32 clients", 32, 1, lambda one: f"{one.percentiles_ms[99]:.0f} ms"),
    ("tokens per second of CPU time, 32 clients", 32, 1, lambda one: f"{one.tokens_per_cpu_second:.0f}"),
    ("texts a second, 64 texts a call", 1, 64, lambda one: f"{one.texts_per_second:.0f}"),
    ("texts a second, 1 client", 1, 1, lambda one: f"{one.texts_per_second:.0f}"),
]
"""(title, clients, texts a call, number) of the README's rows."""


def strongest(peers: Results) -> dict[str, str]:
    """Kind -> the peer with the same vectors that is the fastest of its kind, in the load of FASTEST."""
    best = {}
    for one in sorted(peers.measurements, key=lambda one: one.texts_per_second):
        peer = peers.peers[one.way]
        is_same = peer.cosine is not None and peer.cosine >= SAME
        if is_same and one.way != OURS and one.key[1:] == ("docstrings", *FASTEST[peer.kind]):
            best[peer.kind] = one.way
    return {kind: best[kind] for kind in FRONT_KINDS if kind in best}


def front_table(peers: Results) -> str:
    """The stack beside the strongest of the usual choices, in five lines."""
    found = {one.key: one for one in peers.measurements}
    shown = strongest(peers)
    titles = [
        "here",
        *(FRONT_KINDS[kind] + (f": {way}" if way != "home-made" else "") for kind, way in shown.items()),
    ]
    lines = [
        f"| all-MiniLM-L6-v2, {peers.machine['processors']} cores of {peers.machine['cpu']} "
        f"| {' | '.join(titles)} |",
        f"|---|{'---|' * len(titles)}",
    ]
    for label, clients, texts, number in FRONT_ROWS:
        ones = [found.get((way, "docstrings", clients, texts)) for way in (OURS, *shown.values())]
        lines.append(f"| {label} | {' | '.join(number(one) if one else '' for one in ones)} |")
    return "\n".join(lines)


def front_sentences(results: Results, peers: Results) -> str:
    """What the table leaves out."""
    busy, large = (results.find("embed", "docstrings", *load).share_of_raw for load in ((64, 1), (1, 64)))
    docstring = peers.find(OURS, "docstrings", 1).rounds[0]
    precisions = {way: peers.peers[way].precision for way in (OURS, *strongest(peers).values())}
    unlike = ", ".join(f"{precision} ({way})" for way, precision in precisions.items())
    said = [
        f"Texts are docstrings, {docstring.tokens / docstring.texts:.0f} tokens each on average.",
        "Fastest means: a server at 32 clients, a library in calls of 64 texts.",
        f"Peers whose cosine with ours is below {SAME} are left out.",
        f"All compute in {precisions[OURS]}."
        if len({*precisions.values()}) == 1
        else f"Precisions are {unlike}.".replace(f"({OURS})", "(here)"),
        "The home-made gateway is FastAPI before the same Triton and engine: it pads, and pools in numpy.",
        "A library takes one call at a time.",
        "Of the tokens per CPU second of the bare engine, run beside each load, `/embed` keeps "
        f"{busy:.0%} with 64 clients and {large:.0%} in large calls.",
        *(f"N{warning[1:]}." for warning in machine.warnings(peers.noise)),
    ]
    return paragraph(said)


def table(results: Results) -> str:
    """The few rows that say most."""
    raw = results.find("raw", "docstrings", 0, 0)
    cores = results.machine["processors"]
    length = raw.rounds[0].tokens / raw.rounds[0].texts
    lines = [
        f"| docstrings, {length:.0f} tokens each on average, {results.precision}, {cores} cores "
        "| texts/s | tokens per CPU s | share of raw | p50 ms | p99 ms | batch |",
        "|---|---|---|---|---|---|---|",
        f"| raw OpenVINO loop: the limit | {raw.texts_per_second:.0f} "
        f"| {raw.tokens_per_cpu_second:.0f} | 1.00 | | | |",
    ]
    for key in ROWS:
        one = results.find(*key)
        kind = f", {one.corpus}" if one.corpus != "docstrings" else ""
        cells = [f"{title(one)}{kind}", f"{one.texts_per_second:.0f}", f"{one.tokens_per_cpu_second:.0f}"]
        cells += [
            f"{one.share_of_raw:.2f}",
            *(f"{one.percentiles_ms[n]:.1f}" for n in (50, 99)),
            f"{one.batch:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sentences(results: Results) -> str:
    """What the table leaves out."""
    rerank = results.find("rerank", "cross-encoder", 1, 80)
    resident = sum(results.memory["resident_mib"].values())
    said = [
        f"{medians(results)} on {results.machine['cpu']}.",
        f"One query against 80 documents through a cross-encoder of MiniLM's size takes "
        f"{rerank.percentiles_ms[50]:.0f} ms, {rerank.texts_per_second:.0f} pairs a second.",
        f"The whole stack takes {resident} MiB of memory after the load, of which "
        f"{results.memory['weights_mib']} MiB are weights.",
        *(f"N{warning[1:]}." for warning in machine.warnings(results.noise)),
    ]
    return paragraph(said)


def peers_sentences(peers: Results) -> str:
    """What the peers are."""
    said = [
        "`make bench-peers` measures other ways to get the same vectors on the same machine.",
        "It is another run than the table above, of other texts, so the numbers of the stack itself differ.",
        f"{medians(peers)}. In each, all take turns at every load.",
        "All have the same number of threads.",
        "Home-made is a gateway of FastAPI before the same Triton and engine: it pads, and pools in numpy.",
        "Cosine is the lowest of a peer's vectors with those of the stack.",
        *(f"{way} was not measured: {peer.missing}." for way, peer in peers.peers.items() if peer.missing),
        *(f"N{warning[1:]}." for warning in machine.warnings(peers.noise)),
    ]
    return paragraph(said)


def backfill_sentences(backfill: dict[str, Any]) -> str:
    """Speed and memory of many texts."""
    progress = backfill["progress"]
    texts, resident = progress[-1]["texts"], [moment["resident_mib"] for moment in progress]
    said = [
        f"`python -m tools.bench.backfill` sends {texts:,} other docstrings through `/embed`:",
        f"{texts / progress[-1]['seconds']:.0f} texts a second.",
        f"The stack's memory stays between {min(resident)} and {max(resident)} MiB.",
        f"At the end it is {resident[-1]} MiB.",
        *(f"N{warning[1:]}." for warning in machine.warnings(backfill["noise"])),
    ]
    return paragraph(said)


def residency_sentences(residency: dict[str, Any]) -> str:
    """What calls of loaded models took, and what those that waited for a load did."""
    samples, budget = residency["samples"], residency["budget_bytes"] / 1e6
    families, most = len(samples[0]["resident"]), max(sum(one["resident"].values()) for one in samples) / 1e6
    hits, misses = residency["hits"], residency["misses"]
    calls = hits["calls"] + misses["calls"]
    said = [
        f"`python -m tools.bench.residency` serves {families} families of MiniLM's size in {budget:.0f} MB.",
        f"{residency['clients']} clients call them for {samples[-1]['seconds']:.0f} seconds, the k-th one as",
        f"often as 1 / k. Of {calls} calls {hits['calls'] / calls:.0%} found their model loaded, and",
        f"{residency['refused']} were refused. There were {residency['loads']} loads. At most {most:.0f} MB were",
        f"taken. A call of a loaded model took {hits['p50_ms']:.0f} ms (p50) or {hits['p99_ms']:.0f} ms (p99).",
        f"One that waited for its model took {misses['p50_ms'] / 1000:.1f} s or {misses['p99_ms'] / 1000:.1f} s.",
    ]
    return paragraph(said)


def full_table(results: Results) -> str:
    """Every measurement, medians over the rounds, as Markdown."""
    lines = [
        "| | texts/s | tokens/s | tokens per CPU s | share of raw | p50 ms | p95 ms | p99 ms | batch | padding "
        "| CPU time in |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results.measurements:
        cells = [f"{one.texts_per_second:.0f}", f"{one.tokens_per_second:.0f}", f"{one.tokens_per_cpu_second:.0f}"]
        cells.append(f"{one.share_of_raw:.2f}" if one.share_of_raw else "")
        cells += [f"{one.percentiles_ms[n]:.1f}" if one.percentiles_ms else "" for n in (50, 95, 99)]
        cells.append(f"{one.batch:.1f}" if one.batch else "")
        cells.append(", ".join(f"{what} {share:.1%}" for what, share in one.padding.items()))
        cells.append(", ".join(f"{role} {share:.0%}" for role, share in one.cpu_shares.items() if share > 0.005))
        lines.append(f"| {title(one)}, {one.corpus} | {' | '.join(cells)} |")
    for one in results.measurements:
        if one.stages_ms and one.clients == 1:
            parts = ", ".join(f"{stage} {ms:.2f}" for stage, ms in one.stages_ms.items())
            lines.append(f"\n{title(one)}, {one.corpus}, ms of a call: {parts}")
    lines.append(f"\nmemory after it: {results.memory}\nnoise: {results.noise}")
    return "\n".join(lines)


def sizing_table(results: Results) -> str:
    """What each process of the stack takes, as Markdown."""
    loads = [results.find("embed", "docstrings", *load).cpu_ms_a_text for load in ((64, 1), (1, 64))]
    lines = [
        "| process | MiB after the load | CPU ms a text, one a call | CPU ms a text, 64 a call |",
        "|---|---|---|---|",
    ]
    for role, resident in results.memory["resident_mib"].items():
        lines.append(f"| {role} | {resident} | {' | '.join(f'{spent[role]:.2f}' for spent in loads)} |")
    return "\n".join(lines)


def sizing_sentences(results: Results) -> str:
    """What a core computes, and how many cores keep one process of the gateway busy."""
    loads = [results.find("embed", "docstrings", *load) for load in ((64, 1), (1, 64))]
    cores = results.machine["processors"]
    texts = [1000 / load.cpu_ms_a_text["gateway"] for load in loads]
    busy = [sum(load.cpu_ms_a_text.values()) / load.cpu_ms_a_text["gateway"] for load in loads]
    computed = " to ".join(f"{load.tokens_per_cpu_second:.0f}" for load in loads)
    said = [
        f"This is the first table's run. A core computes {computed} tokens of MiniLM a second. A process of the",
        f"gateway ends at {texts[0]:.0f} calls of one text a second, or at {texts[1]:.0f} texts in calls of 64.",
        f"That is what {busy[0]:.0f} cores compute, or {busy[1]:.0f}. This is reckoned",
        f"from {cores} cores: more have not been measured.",
    ]
    return paragraph(said)


def shell_table(results: Results, keys: Sequence[tuple[str, int, int]] = ()) -> str:
    """Speed, latency and CPU time by process around an engine that costs next to nothing, as Markdown."""
    rows = [results.find(way, "shell", *key) for way, *key in keys] or results.measurements
    roles = [role for role in ROLES if role in rows[0].cpu_ms_a_text]
    lines = [
        "| around an engine that costs next to nothing | texts/s | p50 ms | p99 ms | CPU ms a text "
        f"| {' | '.join(roles)} |",
        "|" + "---|" * (5 + len(roles)),
    ]
    for one in rows:
        spent = one.cpu_ms_a_text
        cells = [title(one), f"{one.texts_per_second:.0f}", *(f"{one.percentiles_ms[n]:.1f}" for n in (50, 99))]
        cells += [f"{sum(spent.values()):.2f}", *(f"{spent[role]:.2f}" for role in roles)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shell_sentences(results: Results) -> str:
    """What the table is of."""
    said = [
        "This is the same stack before a model of one layer of width 64: nearly all CPU time is spent around it.",
        f"{medians(results)} on {results.machine['cpu']}.",
        *(f"N{warning[1:]}." for warning in machine.warnings(results.noise)),
    ]
    return paragraph(said)


def medians(results: Results) -> str:
    """Over how many rounds the numbers are medians."""
    rounds = len(results.measurements[0].rounds)
    return "Numbers are of one round" if rounds == 1 else f"Numbers are medians of {rounds} rounds"


def peers_table(results: Results, corpus: str) -> str:
    """Every peer beside the stack on texts of one kind, medians over the rounds, as Markdown."""
    rows = sorted(
        (one for one in results.measurements if one.corpus == corpus),
        key=lambda one: (one.texts_per_call, one.clients, list(results.peers).index(one.way)),
    )
    length = rows[0].rounds[0].tokens / rows[0].rounds[0].texts
    lines = [
        f"| {length:.0f} tokens a text on average | precision | cosine | texts/s | tokens per CPU s "
        "| p50 ms | p99 ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        peer = results.peers[one.way]
        cells = [title(one), peer.precision, f"{peer.cosine:.4f}" if peer.cosine else ""]
        cells += [f"{one.texts_per_second:.0f}", f"{one.tokens_per_cpu_second:.0f}"]
        cells += [f"{one.percentiles_ms[share]:.1f}" for share in (50, 99)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def title(one: Measurement) -> str:
    """What a row is called."""
    if one.way == "raw":
        return "raw, one text at a time" if one.clients else "raw"
    way = {"grpc": "v2 gRPC", "embed": "`/embed`", "rerank": "`/rerank`"}.get(one.way, one.way)
    clients = "1 client" if one.clients == 1 else f"{one.clients} clients"
    texts = f", {one.texts_per_call} texts a call" if one.texts_per_call > 1 else ""
    return f"{way}, {clients}{texts}"


def paragraph(sentences: Sequence[str]) -> str:
    """Sentences as lines of a page."""
    return "\n".join(textwrap.wrap(" ".join(sentences), 115, break_on_hyphens=False))


if __name__ == "__main__":
    sys.exit(main())
