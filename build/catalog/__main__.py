"""Writes the catalog's README, the table of its entries: `python -m build.catalog`."""

from __future__ import annotations

import argparse

from build import catalog
from build.catalog import CatalogEntry, Wheel
from build.runtimes import RUNTIMES
from build.tasks import DOCUMENT_TASKS, TASKS

PUBLISHED = ("all-mpnet-base-v2",)
"""Models of the Hub whose published weights the tests build, too: they get the same files elsewhere, by hash."""
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PATH = catalog.FOLDER / "README.md"

HEAD = """\
# The catalog

<!-- Written by `python -m build.catalog` from the files beside it. -->

Models that are built by their name: `make serve MODEL=bge-small-en-v1.5`. An entry says where a checkpoint lies,
at which commit, and what its own files leave open, as prompts; pooling, norms and tokenizer are read from those
files. Precisions have the default first, each with the gigabytes of the weights. The check at the end of a build
needs free memory of three times those of its precision; [what a server takes](../../docs/memory.md) is measured
where it runs.

Each is built for every runtime, but for those under "not for"; `vllm` runs models that write text, and no other.
MPNet, T5, DeBERTa and jina-embeddings-v2 have biases in attention, and are not for `torch` either. On a CPU the
runtime is `openvino`, unless another is asked for; [an NVIDIA GPU](../../docs/gpu.md) gets `torch`.

**Only what is tested by `weights` has been built here from published weights.** Of all others the layout is
tested, with tiny random checkpoints of the same `model_type`, against transformers and sentence-transformers.
Commits, sizes, licences and prompts are quoted, most of them from mteb's register of models; a repository
without safetensors at its commit is refused before anything large is brought. `python -m build.verify` compares
a built family with its reference.

| name | kind | dimensions | tokens | languages | licence | million weights | GB by precision | not for | tested |
|---|---|---|---|---|---|---|---|---|---|
"""


def row(entry: CatalogEntry) -> str:
    """One model's line of the table."""
    kinds = " and ".join((TASKS | DOCUMENT_TASKS)[task].gives for task in entry.tasks)
    sizes = [f"{precision} {gigabytes(entry, precision):.2g}" for precision in entry.precisions]
    cells = [
        f"[{entry.name}]({entry.name}.toml)",
        kinds,
        entry.dimensions or entry.width or "",
        entry.max_tokens or "",
        entry.languages or "",
        entry.licence,
        entry.parameters,
        ", ".join(sizes),
        ", ".join(not_for(entry)),
        "weights" if isinstance(entry.source, Wheel) or entry.name in PUBLISHED else "layout",
    ]
    return f"| {' | '.join(str(cell) for cell in cells)} |\n"


def not_for(entry: CatalogEntry) -> list[str]:
    """The runtimes of encoders that do not run the model's tasks."""
    return [name for name, one in RUNTIMES.items() if "embed" in one.tasks and not {*entry.tasks} <= {*one.tasks}]


def gigabytes(entry: CatalogEntry, precision: str) -> float:
    """Of the weights alone."""
    assert entry.parameters is not None, "every entry says it"
    return entry.parameters * BYTES[precision] / 1000


def table() -> str:
    """The whole file."""
    return HEAD + "".join(row(catalog.load(name)) for name in catalog.names())


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m build.catalog", description=__doc__).parse_args()
    PATH.write_text(table())
