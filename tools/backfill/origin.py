"""Where a vector comes from: what has to be equal for two of them to be comparable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Origin:
    """The vector space of a column or folder. Vectors of unlike origins are never mixed."""

    family: str
    """As it is served."""
    source: str | None
    revision: str | None
    graph: str | None
    """sha256 of graphs, weights, tokenizer, prompts and window; None where the gateway reads no repository."""
    precision: str | None
    """Precision of the graph."""
    prompt: str | None
    """What stands before every text, by name."""
    dimensions: int

    @classmethod
    def of(cls, model: Mapping[str, Any], prompt: str | None, dimensions: int) -> Origin:
        """By what `GET /v1/models/NAME` says of a model."""
        return cls(
            model["id"],
            model["source"],
            model["revision"],
            model["graph"],
            model["precision"],
            prompt,
            dimensions,
        )

    def json(self) -> str:
        """The same text for the same origin."""
        return json.dumps(asdict(self), sort_keys=True)

    def __str__(self) -> str:
        return describe(asdict(self))


def describe(origin: Mapping[str, Any]) -> str:
    """An origin in a sentence, as it was recorded."""
    graph = (origin.get("graph") or "unknown")[:12]
    return (
        f"{origin.get('family')} ({origin.get('source')} {origin.get('revision') or ''}, "
        f"{origin.get('precision')}, graph {graph}, prompt {origin.get('prompt') or 'none'}, "
        f"{origin.get('dimensions')} dimensions)"
    )


def text_hash(text: str) -> bytes:
    """SHA-256 of a text in UTF-8, by which a changed one is known."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
