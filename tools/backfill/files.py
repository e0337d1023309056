"""A folder of files as a store: each file is read in parts of so many rows, and each becomes a file of output.

A part of output has all columns of its rows, and their vectors. It is done when it is there, complete, and its
other columns are still those of the input; of an older one, the vectors of unchanged texts are kept. Parts are
written aside, under a lock that ends with its process, and renamed into place: a killed job has done whole parts.
A job that ends has seen that every part is done: it waits for those that another one does.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from tools.backfill.errors import BackfillError
from tools.backfill.flow import Wait, Window
from tools.backfill.origin import Origin, describe, text_hash

ORIGIN = "origin.json"
"""File in the folder of vectors that says where all of them come from."""

Vectors = npt.NDArray[np.float32]


class Format(Protocol):
    """How rows are kept in files. `Any` are the rows of a part, as the format has them."""

    suffix: str
    what: str
    """Its name."""

    def count(self, path: Path) -> int:
        """Rows of a file."""

    def parts(self, path: Path, rows: int, wanted: Collection[int] | None) -> Iterator[tuple[int, Any]]:
        """A file, so many rows at a time, by number; only those that are `wanted`."""

    def column(self, part: Any, name: str) -> list[Any] | None:
        """Values of a column; None where there is no such column."""

    def write(self, file: IO[bytes], part: Any, name: str, vectors: Sequence[Any], origin: Origin) -> None:
        """Rows and, under a `name`, their vectors: float32 [D] or None."""

    def split(self, path: Path, name: str) -> tuple[Any, list[Any]]:
        """What `write` wrote: the rows, and the vectors under a `name`."""

    def equal(self, part: Any, other: Any) -> bool:
        """Whether two parts have the same rows."""


@dataclass(frozen=True)
class Columns:
    """What a row is made of."""

    id: str
    """Names a row where it is refused; where there is no such column, file and row do."""
    text: str
    vector: str


@dataclass(frozen=True)
class Part:
    """A part that is being done."""

    rows: Any
    goal: Path
    aside: IO[bytes]
    """Locked."""
    places: list[int]
    """Rows that are embedded now."""
    kept: dict[int, Any]
    """Vectors of the others."""


@dataclass
class Files:
    """The store. Raises BackfillError in one sentence for what the files do not allow."""

    source: Path
    goal: Path
    format: Format
    columns: Columns
    part_rows: int
    origin: Origin
    only: Sequence[tuple[str, int]] | None = None
    """Files and numbers of the parts that are this job's, where others have the rest."""
    todo: Iterator[Part | Wait] | None = field(default=None, repr=False)
    """What is left, once it has begun."""

    def inputs(self) -> list[Path]:
        """The files, in order; raises BackfillError where there are none."""
        found = sorted(
            path
            for path in self.source.rglob(f"*{self.format.suffix}")
            if path.is_file() and not path.name.startswith(".") and self.goal not in path.parents
        )
        if not found:
            raise BackfillError(f"{self.source} has no files *{self.format.suffix}")
        return found

    def begin(self, replace: bool) -> None:
        """Notes the origin; raises BackfillError before two mix in one folder."""
        self.goal.mkdir(parents=True, exist_ok=True)
        note = self.goal / ORIGIN
        said = json.dumps({"origin": asdict(self.origin), "part_rows": self.part_rows}, sort_keys=True)
        there = sorted(path for path in self.goal.rglob(f"*{self.format.suffix}") if path.is_file())
        old = note.read_text() if note.exists() else None
        if old == said:
            return
        if there and not replace:
            before = json.loads(old) if old else {}
            if before.get("origin") == asdict(self.origin):
                raise BackfillError(
                    f"{self.goal} has files of {before['part_rows']} rows: say so with --part-rows, or "
                    "add --replace to embed all texts again"
                )
            what = describe(before["origin"]) if before else "unknown origin"
            raise BackfillError(
                f"{self.goal} holds vectors of {what}, which do not compare with those of {self.origin}: add "
                "--replace to embed their texts again, or choose another folder"
            )
        for path in there:
            path.unlink()
        aside = note.with_suffix(".tmp")
        aside.write_text(said)
        aside.replace(note)

    def rows(self) -> int:
        """Rows of all files."""
        return sum(self.format.count(path) for path in self.inputs())

    def read(self) -> Window | Wait | None:
        """The next part that is not done and that nobody else does."""
        if self.todo is None:
            self.todo = self._parts()
        part = next(self.todo, None)
        if not isinstance(part, Part):
            return part
        texts = self._texts(part.rows)
        names = self.format.column(part.rows, self.columns.id)
        ids = [str(names[i]) if names else f"{part.goal.name}[{i}]" for i in part.places]
        reasons: dict[int, str] = {}
        chosen: list[str | None] = []
        for place, i in enumerate(part.places):
            if texts[i] is not None and not isinstance(texts[i], str):
                reasons[place] = f"its text is no string but {type(texts[i]).__name__}"
            chosen.append(texts[i] if isinstance(texts[i], str) else None)
        return Window(ids, chosen, reasons, part)

    def write(self, window: Window, vectors: Vectors, refused: Mapping[int, str]) -> int:
        """Writes the part aside and renames it into place."""
        part: Part = window.token
        rows: dict[int, Any] = dict(part.kept)
        rows |= {i: vectors[place] for place, i in enumerate(part.places) if place not in refused}
        count = len(part.places) + len(part.kept)
        with part.aside as file:
            file.truncate(0)
            file.seek(0)
            in_order = [rows.get(i) for i in range(count)]
            self.format.write(file, part.rows, self.columns.vector, in_order, self.origin)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(part.goal)
        return len(part.places) - len(refused)

    def pending(self) -> Iterator[tuple[Any, list[int]]]:
        """Parts that are not done, and their rows that have no vector; nothing is written."""
        for file, number, rows in self._all(self.only):
            places, _ = self._state(rows, self.goal_of(file, number))
            if places is not None:
                yield rows, places

    def texts(self, rows: Any, places: Sequence[int]) -> list[str]:
        """Those of a part's rows that have one."""
        texts = self._texts(rows)
        return [texts[i] for i in places if isinstance(texts[i], str) and texts[i]]

    def parts_of(self, path: Path) -> list[tuple[str, int]]:
        """The parts of one file, as `only` names them."""
        return [(str(path), number) for number in range(-(-self.format.count(path) // self.part_rows))]

    def goal_of(self, file: str, number: int) -> Path:
        """Where a part goes."""
        return self._goal(Path(file), number)

    def _all(self, only: Sequence[tuple[str, int]] | None) -> Iterator[tuple[str, int, Any]]:
        """Each part, or those that are named: its file, its number, its rows."""
        for path in self.inputs():
            wanted = None if only is None else {number for name, number in only if name == str(path)}
            if wanted is not None and not wanted:
                continue
            for number, rows in self.format.parts(path, self.part_rows, wanted):
                yield str(path), number, rows

    def _goal(self, path: Path, number: int) -> Path:
        relative = path.relative_to(self.source) if self.source.is_dir() else Path(path.name)
        return self.goal / relative.with_name(f"{path.stem}-{number:05d}{self.format.suffix}")

    def _parts(self) -> Iterator[Part | Wait]:
        """What is to be done; then what other jobs were doing, when they have ended."""
        busy: list[tuple[str, int]] = []
        yield from self._free(self.only, busy)
        while busy:
            free = [part for part in busy if is_free(self.goal_of(*part))]
            busy = [part for part in busy if part not in free]
            if free:
                yield from self._free(free, busy)
            if busy:
                yield Wait(f"another job, which does {self.goal_of(*busy[0])}")
        for path in self.inputs() if self.only is None else []:
            number = -(-self.format.count(path) // self.part_rows)
            while (rest := self._goal(path, number)).exists():  # of a file that was longer
                rest.unlink()
                number += 1

    def _free(self, only: Sequence[tuple[str, int]] | None, busy: list[tuple[str, int]]) -> Iterator[Part]:
        """Parts that are not done, locked for this job; those that others do are added to `busy`."""
        for file, number, rows in self._all(only):
            goal = self.goal_of(file, number)
            if self._state(rows, goal)[0] is None:
                continue
            aside = locked(goal)
            if aside is None:
                busy.append((file, number))
                continue
            places, kept = self._state(rows, goal)  # another job may have just done it
            if places is None:
                Path(aside.name).unlink()
                aside.close()
                continue
            yield Part(rows, goal, aside, places, kept)

    def _state(self, rows: Any, goal: Path) -> tuple[list[int] | None, dict[int, Any]]:
        """The rows that need a vector, None where the part is done; and the vectors that are kept."""
        texts = self._texts(rows)
        if not goal.exists():
            return list(range(len(texts))), {}
        old, vectors = self.format.split(goal, self.columns.vector)
        known = {
            text_hash(text): vector
            for text, vector in zip(self._texts(old), vectors, strict=True)
            if vector is not None and isinstance(text, str)
        }
        found = {i: known.get(text_hash(text)) for i, text in enumerate(texts) if isinstance(text, str)}
        kept = {i: vector for i, vector in found.items() if vector is not None}
        places = [i for i in range(len(texts)) if i not in kept]
        if not places and self.format.equal(old, rows):
            return None, {}
        return places, kept

    def _texts(self, rows: Any) -> list[Any]:
        texts = self.format.column(rows, self.columns.text)
        if texts is None:
            raise BackfillError(
                f"a file in {self.source} has no column {self.columns.text!r}: name it with --text"
            )
        if self.format.column(rows, self.columns.vector) is not None:
            raise BackfillError(
                f"a file in {self.source} has a column {self.columns.vector!r} already: name another with --vector"
            )
        return texts


def aside_of(goal: Path) -> Path:
    """The file that a part is written into first."""
    return goal.with_name(f".{goal.name}.part")


def locked(goal: Path) -> IO[bytes] | None:
    """The file aside, locked for this process; None where another has it."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    path = aside_of(goal)
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return file
    except OSError:  # somebody else holds it, or has just renamed it
        pass
    file.close()
    return None


def is_free(goal: Path) -> bool:
    """Whether nobody has the file aside."""
    try:
        with aside_of(goal).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
