"""How the references are loaded, and what they give."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from build.errors import BuildError

PACKAGES = ("sentence_transformers", "transformers", "torch")
BATCH = 8
FP32: dict[str, Any] = {"dtype": "float32"}

Array: TypeAlias = npt.NDArray[np.float32]

Pair: TypeAlias = tuple[str, str]
"""(query, passage), or a classifier's two texts."""


@dataclass(frozen=True)
class Expected:
    """What a reference gives for some texts or pairs."""

    values: Array
    """Embeddings [n, D]; sparse vectors [n, V]; probabilities [n, L]; or scores [n], mostly in 0..1."""
    token_ids: list[list[int]] | None = None
    """Of each, special tokens included, or None where the reference reads a pair as two texts."""
    token_types: list[list[int]] | None = None
    """0 for the first text of a pair and 1 for the second, where the model tells them apart."""


@dataclass(frozen=True)
class ExpectedVectors:
    """What a reference gives for some texts, a vector for each token that counts."""

    values: list[Array]
    """[N, D] of each text."""
    token_ids: list[list[int]]
    vocabulary: int
    """Rows of the table of embeddings."""


Embedder: TypeAlias = Callable[[Sequence[str], str], Expected]
"""(texts, prompt name or "") -> embeddings or sparse vectors."""

MultiEmbedder: TypeAlias = Callable[[Sequence[str], str], ExpectedVectors]
"""(texts, prompt name or "") -> vectors of tokens."""

Scorer: TypeAlias = Callable[[Sequence[Pair]], Expected]
"""[(query, passage)] -> scores."""

Classifier: TypeAlias = Callable[[Sequence[tuple[str, ...]]], Expected]
"""[(text,) or (text, text_pair)] -> probabilities."""


def versions() -> dict[str, str]:
    """Package -> version of everything the references are made of."""
    return {name: str(package(name).__version__) for name in PACKAGES}


def load(loader: Callable[..., Any], checkpoint: str, **options: Any) -> Any:
    """What a library's loader makes of the checkpoint; raises BuildError where it cannot."""
    try:
        return loader(checkpoint, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise BuildError(f"the reference {checkpoint} cannot be loaded: {' '.join(str(error).split())}") from None


def pretrained(name: str, checkpoint: str, **options: Any) -> Any:
    """The checkpoint by transformers' class of that name; code of its own is refused without asking."""
    loader = getattr(package("transformers"), name).from_pretrained
    return load(loader, checkpoint, trust_remote_code=False, **options)


def loaded(name: str, checkpoint: str) -> Any:
    """The checkpoint by sentence-transformers' class of that name."""
    return load(getattr(package("sentence_transformers"), name), checkpoint, model_kwargs=FP32)


def find(checkpoint: str, name: str) -> Path | None:
    """A file of the folder or of the Hub's repository `checkpoint`, None where it has none of that name."""
    found = load(package("sentence_transformers").util.load_file_path, checkpoint, filename=name)
    return None if found is None else Path(found)


def content(checkpoint: str, name: str) -> Any:
    """What a JSON file of the checkpoint says, {} where it has none of that name."""
    path = find(checkpoint, name)
    return {} if path is None else json.loads(path.read_bytes())


def architecture(checkpoint: str) -> str:
    """The class that the checkpoint was saved from, "" where it does not say."""
    return str((content(checkpoint, "config.json").get("architectures") or [""])[0])


def check_class(checkpoint: str, kind: str) -> None:
    """Raises BuildError where transformers' own class `kind` lacks weights, as it does where it is another model.

    A checkpoint with code of its own may be of a `model_type` that transformers has for another architecture, and
    is then loaded with random weights and a warning.
    """
    if not content(checkpoint, "config.json").get("auto_map"):
        return
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, **FP32}
    _, found = pretrained(kind, checkpoint, **options)
    missing = sorted({str(one) for one in (*found["missing_keys"], *map(_first, found["mismatched_keys"]))})
    missing = [name for name in missing if "pooler" not in name]
    if missing:
        raise BuildError(
            f"{checkpoint} is computed by code of its own, which is never run, and transformers' class for it has "
            f"other weights ({missing[0]} is not there): nothing here can tell what it should give"
        )


def _first(mismatched: Any) -> Any:
    """The tensor's name, beside which some versions give shapes."""
    return mismatched[0] if isinstance(mismatched, tuple) else mismatched


def cosines(a: Array, b: Array) -> npt.NDArray[np.float64]:
    """Cosine of each row of `a` with the same row of `b`; -1 where either has no direction."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(all="ignore"):
        found = (a64 * b64).sum(axis=1) / (np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1))
    return np.where(np.isfinite(found), found, -1.0)


def package(name: str) -> Any:
    """A package of the environment; raises BuildError where it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise BuildError(
            f"{name} is not installed: run this with the Python of an environment made of verify.lock; nothing "
            "else here needs it"
        ) from None
