"""JSON Lines, in files and pipes: an object a line, its vector a list of numbers that read back as they were.

All else of a line stays as it was written, numbers of any size included.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import orjson

from tools.backfill.errors import BackfillError
from tools.backfill.flow import Window
from tools.backfill.origin import Origin

Rows = list[tuple[bytes, dict[str, Any]]]
"""Lines, and what they say."""

PIPE_ROWS, PIPE_BYTES = 2048, 2**25
"""Rows and bytes of a window, at most."""


class JsonLines:
    """As `Format` has it; the rows of a part are Rows."""

    suffix, what = ".jsonl", "JSON lines"

    def count(self, path: Path) -> int:
        """Rows of a file."""
        with path.open("rb") as file:
            return sum(1 for line in file if not line.isspace())

    def parts(self, path: Path, rows: int, wanted: Collection[int] | None) -> Iterator[tuple[int, Any]]:
        """A file, so many rows at a time."""
        with path.open("rb") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if not line.isspace())
            part = 0
            while chunk := list(islice(lines, rows)):
                if wanted is None or part in wanted:
                    yield part, [(line, parsed(line, f"{path}:{number}")) for number, line in chunk]
                part += 1

    def column(self, part: Rows, name: str) -> list[Any] | None:
        """Values of a column, None in rows that lack it; None where no row has it."""
        return [row.get(name) for _, row in part] if any(name in row for _, row in part) else None

    def write(self, file: IO[bytes], part: Rows, name: str, vectors: Sequence[Any], _: Origin) -> None:
        """Rows and, under a `name`, their vectors."""
        for (line, row), vector in zip(part, vectors, strict=True):
            file.write(with_vector(line, row, name, vector))

    def split(self, path: Path, name: str) -> tuple[Rows, list[Any]]:
        """What `write` wrote: the rows, and the vectors under a `name`."""
        with path.open("rb") as file:
            rows = [(line, parsed(line, f"{path}:{number}")) for number, line in enumerate(file, 1)]
        found = [row.pop(name, None) for _, row in rows]
        return rows, [None if vector is None else np.array(vector, "<f4") for vector in found]

    def equal(self, part: Rows, other: Rows) -> bool:
        """Whether two parts have the same rows."""
        return [row for _, row in part] == [row for _, row in other]


@dataclass
class Pipe:
    """Lines of stdin to lines of stdout, in order: a store that remembers nothing."""

    source: IO[bytes]
    goal: IO[bytes]
    id: str
    text: str
    vector: str
    _number: int = 0

    def read(self) -> Window | None:
        """The next lines."""
        rows: Rows = []
        ids, size = [], 0
        while len(rows) < PIPE_ROWS and size < PIPE_BYTES and (line := self.source.readline()):
            self._number += 1
            if line.isspace():
                continue
            row = parsed(line, f"line {self._number}")
            if self.text not in row:
                raise BackfillError(f"line {self._number} has no field {self.text!r}: name it with --text")
            rows.append((line, row))
            ids.append(str(row.get(self.id, f"line {self._number}")))
            size += len(line)
        if not rows:
            return None
        values = [row[self.text] for _, row in rows]
        strange = {i: "its text is no string" for i, text in enumerate(values) if not isinstance(text, str | None)}
        texts = [text if isinstance(text, str) else None for text in values]
        return Window(ids, texts, strange, rows)

    def write(self, window: Window, vectors: npt.NDArray[np.float32], refused: Mapping[int, str]) -> int:
        """Each line again, with its vector, or null where it was refused."""
        for i, (line, row) in enumerate(window.token):
            self.goal.write(with_vector(line, row, self.vector, None if i in refused else vectors[i]))
        self.goal.flush()
        return len(window.ids) - len(refused)


def parsed(line: bytes, where: str) -> dict[str, Any]:
    """An object; raises BackfillError where the line is none."""
    try:
        row = orjson.loads(line)
    except ValueError as error:
        raise BackfillError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BackfillError(f'{where} is no JSON object such as {{"text": ...}}')
    return row


def with_vector(line: bytes, row: dict[str, Any], name: str, vector: Any) -> bytes:
    """The line again, with a vector or null under a `name`."""
    if name in row:
        return orjson.dumps({**row, name: vector}, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
    last = orjson.dumps({name: vector}, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
    return line.rstrip()[:-1] + (b"," if row else b"") + last[1:]
