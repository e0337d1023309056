"""What `config.json` says of a classifier's labels, as transformers' PretrainedConfig reads it."""

from __future__ import annotations

from build.errors import BuildError
from build.sources.settings import Settings


def labels(config: Settings) -> int:
    """How many a classifier gives; without a word on it transformers makes two."""
    named = config.find("id2label")
    count = config.integer("num_labels", "_num_labels", default=2)
    return len(named) if isinstance(named, dict) else count


def label_names(config: Settings) -> list[str]:
    """What a classifier's labels are called, LABEL_0 and so on where nothing is said."""
    count, named = labels(config), config.find("id2label")
    if named is None:
        return [f"LABEL_{i}" for i in range(count)]
    names = [named.get(str(i)) if isinstance(named, dict) else None for i in range(count)]
    if not all(isinstance(name, str) for name in names):
        raise BuildError(f"{config.path} has an id2label that does not name the labels 0 to {count - 1}")
    return [str(name) for name in names]
