"""The models of a repository that callers may name."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from build.config import is_called, read_config
from build.errors import BuildError
from tools.command import ServerError


def check_models(repository: Path, models: Sequence[str]) -> None:
    """Raises ServerError when a model is not in the repository; it names those there that callers may name."""
    there = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    for name in models:
        if name not in there:
            has = ", ".join(one for one in there if _may_be_named(repository, one)) or "no models"
            raise ServerError(f"no model {name!r} in {repository}, which has {has}: run `make build MODEL={name}`")


def _may_be_named(repository: Path, model: str) -> bool:
    with suppress(BuildError):
        return is_called(read_config(repository, model))
    return False
