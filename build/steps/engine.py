"""What a generator asks of the engine that computes its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

GUIDES = ("json_schema", "structural_tag")
"""Kinds of guides: a JSON Schema; or literal texts and schemas in turn, in xgrammar's words."""


@dataclass(frozen=True)
class Guide:
    """A form that a text follows."""

    kind: str
    """One of GUIDES."""
    text: str
    """The guide itself, in JSON."""


@dataclass(frozen=True)
class Sampling:
    """How an engine chooses the tokens of an answer."""

    max_tokens: int
    end_tokens: frozenset[int]
    """Each of which ends the answer."""
    temperature: float
    """0 for the likeliest token always."""
    top_p: float
    seed: int
    frequency_penalty: float
    presence_penalty: float
    guide: Guide | None
    """What the text follows."""
    log_probs: bool
    """Whether the tokens' probabilities are wanted."""


@dataclass(frozen=True)
class Piece:
    """What a step has added to an answer."""

    key: int
    """Of the request."""
    ids: Sequence[int]
    reason: str
    """stop, length or error for the last piece, else ""."""
    log_probs: Sequence[float]
    """Of each token, if they are wanted: the model's own, before penalties, temperature and guide."""


class Engine(Protocol):
    """One language model in memory, which computes every answer under way one step further at a time."""

    block: int
    """Tokens of a block of its cache."""
    blocks: int
    """Number of blocks of its cache."""

    def __init__(self, folder: Path, parameters: Mapping[str, str], cache: int) -> None:
        """Loads a version folder, by the model's parameters, with room for so many tokens in the `cache`."""
        ...

    def refusal(self, guide: Guide) -> str:
        """Why no text can follow a guide, or "" where one can. It takes seconds, in a thread of its own."""
        ...

    def add(self, key: int, prompt: Sequence[int], sampling: Sampling) -> None:
        """Takes a request; raises any Exception where it cannot."""
        ...

    def step(self) -> Iterable[Piece]:
        """One token for each answer, or a piece of a prompt; an Exception means that the engine is lost."""
        ...

    def drop(self, key: int) -> None:
        """Stops an answer. Does nothing where it has ended."""
        ...

    def on_gpu(self) -> int:
        """Bytes of a GPU's memory that it holds."""
        ...
