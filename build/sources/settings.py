"""The JSON objects of a checkpoint, read so that nothing in them is passed over unseen.

A key is read by somebody, or is known to change nothing, or stops the build by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from build.errors import BuildError

LARGEST = 64 << 20
"""Bytes of a file of settings, or of an index of weights."""

MOST = 2**24
"""No count of a checkpoint is larger; what follows from one is allocated before a tensor can contradict it."""


def read_json(path: Path) -> Any:
    """The value in a JSON file; raises BuildError when it is missing, broken or larger than LARGEST."""
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise BuildError(f"{path} has {size >> 20} MB: no file of settings is larger than {LARGEST >> 20} MB")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BuildError(f"the checkpoint has no {path.name} (looked in {path.parent})") from None
    except (ValueError, RecursionError) as error:
        raise BuildError(f"{path} is not valid JSON: {error}") from None


class Settings:
    """One JSON object, which remembers what was read of it. A key that is null counts as absent."""

    def __init__(self, path: Path, values: object, place: str = "") -> None:
        if not isinstance(values, dict):
            where = f"{place.removesuffix('.')} in {path}" if place else str(path)
            raise BuildError(f"{where} must be a JSON object, not {_shown(values)}")
        self.path = path
        self._place = place
        self._values: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
        self._nulls = values.keys() - self._values.keys()
        self._read: set[str] = set()
        self._inner: dict[str, Settings] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def find(self, *names: str) -> Any:
        """The value under the first of `names` that is there, else None; they are spellings of one setting.

        Raises BuildError where two of them differ.
        """
        self._read.update(names)
        there = [name for name in names if name in self._values]
        for name in there[1:]:
            if self._values[name] != self._values[there[0]]:
                both = " and ".join(f"{one} = {_shown(self._values[one])}" for one in (there[0], name))
                raise BuildError(f"{self.path} has {both}: two spellings of one setting; leave the wrong one out")
        return self._values[there[0]] if there else None

    def is_null(self, name: str) -> bool:
        """Whether the key is there and null, where that says something else than its absence."""
        return name in self._nulls

    def integer(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """A count, `least` to MOST."""
        value = self._wanted(names, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
            raise self._wrong(names, value, f"a whole number from {least} to {MOST}")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._wanted(names, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self._wrong(names, value, "a number above 0")
        return float(value)

    def flag(self, *names: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._wanted(names, default)
        if not isinstance(value, bool):
            raise self._wrong(names, value, "true or false")
        return value

    def word(self, *names: str, default: str | None = None) -> str:
        """A text."""
        value = self._wanted(names, default)
        if not isinstance(value, str):
            raise self._wrong(names, value, "a text")
        return value

    def words(self, *names: str, default: list[str] | None = None) -> list[str]:
        """A list of texts."""
        value = self._wanted(names, default)
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self._wrong(names, value, "a list of texts")
        return value

    def inner(self, *names: str) -> Settings | None:
        """An object within, accounted for as this one is; None where it is absent."""
        value = self.find(*names)
        if value is None:
            return None
        name = next(name for name in names if name in self._values)
        if name not in self._inner:
            self._inner[name] = Settings(self.path, value, f"{self._place}{name}.")
        return self._inner[name]

    def require(self, name: str, *values: object, default: object = None) -> None:
        """Raises BuildError unless `name` has one of `values`, or is absent, which stands for `default`.

        Without a `default` it stands for the first.
        """
        found = self.find(name)
        found = default if found is None else found
        if found is not None and not any(found == value and type(found) is type(value) for value in values):
            written = " or ".join(map(_shown, values))
            raise BuildError(
                f"{self.path} has {self._place}{name} = {_shown(found)}; the graph is written for {written} only"
            )

    def skip(self, names: Iterable[str]) -> None:
        """Says of `names` that they change nothing."""
        self._read.update(names)

    def unread(self) -> Iterator[tuple[str, str]]:
        """Each key that nobody has read, with a sentence on it."""
        for name, value in self._values.items():
            if name not in self._read:
                key = self._place + name
                yield key, f"{self.path} has {key} = {_shown(value)}, which is not read and may change the result"
        for inner in self._inner.values():
            yield from inner.unread()

    def _wanted(self, names: tuple[str, ...], default: Any) -> Any:
        value = self.find(*names)
        if value is None and default is None:
            raise BuildError(f"{self.path} has no {' or '.join(self._place + name for name in names)}")
        return default if value is None else value

    def _wrong(self, names: tuple[str, ...], value: object, wanted: str) -> BuildError:
        name = next((name for name in names if name in self._values), names[0])
        return BuildError(f"{self.path} has {self._place}{name} = {_shown(value)}; it must be {wanted}")


def check_nothing_is_left(unread: Iterable[tuple[str, str]], ignore: Collection[str]) -> list[str]:
    """The names of what was passed over because `ignore`, a list of names or patterns, says so.

    Raises BuildError for the first name that it does not cover.
    """
    left = list(unread)
    for name, sentence in left:
        if not any(fnmatch(name, pattern) for pattern in ignore):
            others = sum(not any(fnmatch(other, pattern) for pattern in ignore) for other, _ in left) - 1
            more = f" (and {others} more like it)" if others else ""
            raise BuildError(f"{sentence}{more}: if it changes nothing, build past it with --ignore {name}")
    return [name for name, _ in left]


def _shown(value: object) -> str:
    """A value as JSON has it, cut short."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
