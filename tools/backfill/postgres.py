"""Rows of a Postgres table as a store: texts from one column, vectors into another, or into a table of their own.

Beside the vectors stand three tables. `<table>_<column>_origin` has for each vector its origin and the SHA-256 of
its text. `embedding_origins` has the origins. `embedding_windows` has what jobs are doing: ranges of ids, each
claimed by a job that lives as long as its session holds an advisory lock.

A window's vectors, their origin and the end of its claim are one transaction: who dies leaves nothing half done.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg

from tools.backfill.errors import BackfillError
from tools.backfill.flow import Window
from tools.backfill.origin import Origin, describe, text_hash
from tools.backfill.table import CLEAR_INTO, CLEAR_TABLE, INDEXABLE, INSERT_INTO, JOBS, UPDATE_TABLE, Table

WINDOW_ROWS, WINDOW_BYTES = 4096, 2**25
"""Of one transaction, at most; a larger text is a window by itself."""

TEXT_BYTES = 2**24
"""Of one text, over which no call takes it; it is not even read."""

CLAIMS = JOBS + 1
"""Namespace of advisory locks of targets whose next window is being claimed."""

ROUNDS = 3
"""Passes over texts that changed while they were embedded; what changes faster is the next run's."""

HEADER, TRAILER = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
"""Of COPY's binary format."""

SESSION = (
    # Windows are found in the order of the index on the id, however little the planner knows of fresh tables.
    "SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_seqscan = off; "
    "SET enable_bitmapscan = off; SET enable_sort = off; SET jit = off; SET tcp_keepalives_idle = 60"
)

TABLES = """
CREATE TABLE IF NOT EXISTS {side} (id {type} PRIMARY KEY, origin int NOT NULL, text_sha256 bytea NOT NULL);
CREATE TABLE IF NOT EXISTS {origins} (
    id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, origin jsonb NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS {windows} (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, target text NOT NULL, filter text NOT NULL,
    origin int NOT NULL, job int NOT NULL, first text, last text, done boolean NOT NULL)"""

ALONE = f"SELECT pg_advisory_xact_lock({CLAIMS}, hashtext(%s))"

COUNT = """
SELECT count(*), count(*) FILTER (WHERE t.vector IS NOT NULL AND s.origin = {origin}),
    count(*) FILTER (WHERE t.vector IS NOT NULL AND s.origin <> {origin}),
    count(*) FILTER (WHERE t.vector IS NOT NULL AND s.id IS NULL)
FROM {rows} t LEFT JOIN {side} s ON s.id = t.id"""

NEXT_ROWS = """
SELECT t.id::text, octet_length(t.text) FROM {source} t LEFT JOIN {side} s ON s.id = t.id
WHERE {pending} AND (%(after)s::text IS NULL OR t.id > %(after)s::text::{type}) ORDER BY t.id LIMIT %(rows)s"""

FIRST_ROWS = """
SELECT t.id::text, octet_length(t.text) FROM {source} t LEFT JOIN {side} s ON s.id = t.id
WHERE {pending} ORDER BY t.id LIMIT %(rows)s"""

ROWS = """
SELECT t.id::text, CASE WHEN octet_length(t.text) <= %(most)s THEN t.text END, octet_length(t.text)
FROM {source} t LEFT JOIN {side} s ON s.id = t.id WHERE {pending} AND """


@contextmanager
def connected(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection with a transaction for each statement; raises BackfillError where there is none."""
    try:
        connection = psycopg.connect(dsn, autocommit=True, application_name="backfill", connect_timeout=10)
    except psycopg.Error as error:
        raise BackfillError(f"cannot connect to Postgres: {sentence(error)}") from None
    with connection:
        yield connection


def sentence(error: Exception) -> str:
    """What Postgres or its client says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if "FATAL" in line), lines[0] if lines else type(error).__name__)
    return said.rpartition("FATAL:")[2].strip()


@contextmanager
def told() -> Iterator[None]:
    """Turns what Postgres has against a statement into one sentence."""
    try:
        yield
    except psycopg.OperationalError as error:
        raise BackfillError(
            f"Postgres has gone ({sentence(error)}): run the same command again to go on"
        ) from None
    except psycopg.Error as error:
        raise BackfillError(f"Postgres refuses: {sentence(error)}") from None


@dataclass(frozen=True)
class Counts:
    """Rows of a table, by where their vectors come from."""

    rows: int
    done: int
    """Of this origin; whether the text is still the same is not looked at."""
    others: int
    """Of another origin."""
    unknown: int
    """That no backfill wrote."""


class Postgres:
    """The store. Raises BackfillError in one sentence for what Postgres does not allow."""

    def __init__(
        self, reader: psycopg.Connection[Any], writer: psycopg.Connection[Any], table: Table, origin: Origin
    ) -> None:
        """Of a `table`, by two connections, each of which one thread uses at a time."""
        self._reader, self._writer, self._table = reader, writer, table
        self._origin, self._origin_id = origin, 0
        self._job = random.randrange(1, 2**31)
        self._changed: list[str] = []
        self._rounds = 0
        self._ids: list[str] | None = None
        """Those of this pass, where it is not the first."""

    def look(self) -> Counts:
        """What is there, without writing anything."""
        with told():
            side = self._table.parts["side"].as_string(self._reader)
            if self._one("SELECT to_regclass(%s)", [side]) is None:
                self._table = self._table.without_side()
            else:
                found = self._one("SELECT id FROM {origins} WHERE origin = %s::jsonb", [self._origin.json()])
                self._origin_id = found or 0
            return self._count("source")

    def pending(self) -> tuple[int, int, int]:
        """Rows that have to be done, the bytes of their texts, and how many have none: every text is looked at."""
        with told():
            found = self._reader.execute(
                self._sql(
                    "SELECT count(*), coalesce(sum(octet_length(t.text)), 0)::bigint, "
                    "count(*) FILTER (WHERE coalesce(t.text, '') = '') "
                    "FROM {source} t LEFT JOIN {side} s ON s.id = t.id WHERE {pending}"
                ),
                [],
            ).fetchone()
            assert found is not None
            return found[0], found[1], found[2]

    def sample(self, rows: int) -> list[str]:
        """Some of their texts, from anywhere in the table."""
        with told():
            found = self._reader.execute(
                self._sql(
                    "SELECT t.text FROM {source} t LEFT JOIN {side} s ON s.id = t.id WHERE {pending} "
                    "AND t.text <> '' AND octet_length(t.text) <= %s ORDER BY md5(t.id::text) LIMIT %s"
                ),
                [TEXT_BYTES, rows],
            )
            return [text for (text,) in found]

    def begin(self, replace: bool) -> Counts:
        """Makes the tables beside the vectors and enters this job; raises BackfillError before two origins mix."""
        with told():
            with self._reader.transaction():
                self._reader.execute(ALONE, [self._table.name])
                self._reader.execute(self._sql(TABLES))
                self._origin_id = self._enter()
            counts = self._count("source")
            whole = self._count("whole") if self._table.filter else counts
            if whole.others or whole.unknown:
                self._check_mix(whole, counts, replace)
            for connection in (self._reader, self._writer):
                connection.execute(SESSION)
            self._writer.execute("CREATE TEMPORARY TABLE embedded (id text, vector vector, hash bytea)")
            return counts

    def read(self) -> Window | None:
        """Claims the next window and reads it."""
        with told():
            if self._ids is not None:
                ids, self._ids = self._ids[:WINDOW_ROWS], self._ids[WINDOW_ROWS:]
                return self._window("t.id = ANY(%(ids)s::{type}[])", {"ids": ids}, None) if ids else None
            while (claim := self._claim()) is not None:
                number, first, last = claim
                between = "t.id BETWEEN %(first)s::text::{type} AND %(last)s::text::{type}"
                window = self._window(between, {"first": first, "last": last}, number)
                if window.ids:
                    return window
                self._reader.execute(self._sql("UPDATE {windows} SET done = true WHERE number = %s"), [number])
            return None

    def write(self, window: Window, vectors: npt.NDArray[np.float32], refused: Mapping[int, str]) -> int:
        """Writes rows whose texts are still the same, takes vectors from refused ones, and ends the claim."""
        places = [i for i in range(len(window.ids)) if i not in refused]
        rows = [packed(window.ids[i], vectors[i], text_hash(window.texts[i] or "")) for i in places]
        into = self._table.into
        with told(), self._writer.transaction(), self._writer.cursor() as cursor:
            cursor.execute("TRUNCATE pg_temp.embedded")
            with cursor.copy("COPY pg_temp.embedded FROM STDIN (FORMAT BINARY)") as copy:
                copy.write(b"".join([HEADER, *rows, TRAILER]))
            cursor.execute(self._sql(INSERT_INTO if into else UPDATE_TABLE))
            written = {one for (one,) in cursor.fetchall()}
            if refused:
                ids = [window.ids[i] for i in refused]
                cursor.execute(self._sql(CLEAR_INTO if into else CLEAR_TABLE), {"ids": ids})
            if window.token is not None:
                cursor.execute(self._sql("UPDATE {windows} SET done = true WHERE number = %s"), [window.token])
        self._changed += [window.ids[i] for i in places if window.ids[i] not in written]
        return len(written)

    def again(self) -> bool:
        """Texts that changed while they were embedded are read once more."""
        self._ids, self._changed = self._changed, []
        self._rounds += 1
        return bool(self._ids) and self._rounds <= ROUNDS

    def end(self) -> None:
        """Forgets the windows, unless another job still works on the target."""
        with told(), self._reader.transaction():
            self._reader.execute(ALONE, [self._table.name])
            others = self._one(
                "SELECT count(*) FROM {windows} w WHERE target = %s AND job <> %s AND {lives}",
                [self._table.name, self._job],
            )
            if not others:
                self._reader.execute(self._sql("DELETE FROM {windows} WHERE target = %s"), [self._table.name])

    def build_index(self) -> str:
        """Builds the HNSW index by cosine, without locking the table; returns its definition."""
        kind = self._table.vector_type
        statement = self._table.sql(
            f"CREATE INDEX CONCURRENTLY ON {{goal}} USING hnsw ({{vector}} {kind}_cosine_ops)", 0
        )
        with told():
            self._reader.execute(statement)
        return str(statement.as_string(self._reader))

    def _enter(self) -> int:
        """Registers this job; returns the number of its origin."""
        said, target = self._origin.json(), self._table.name
        self._reader.execute(
            self._sql("INSERT INTO {origins} (origin) VALUES (%s::jsonb) ON CONFLICT DO NOTHING"), [said]
        )
        origin: int = self._one("SELECT id FROM {origins} WHERE origin = %s::jsonb", [said])
        living = self._reader.execute(
            self._sql(
                "SELECT DISTINCT w.origin, o.origin FROM {windows} w JOIN {origins} o ON o.id = w.origin "
                "WHERE target = %s AND {lives}"
            ),
            [target],
        ).fetchall()
        for other, what in living:
            if other != origin:
                raise BackfillError(
                    f"another job is filling {target} with vectors of {describe(what)}, and these would be of "
                    f"{self._origin}: let it end or stop it first"
                )
        if not living:
            self._reader.execute(self._sql("DELETE FROM {windows} WHERE target = %s"), [target])
        self._reader.execute("SELECT pg_advisory_lock(%s, %s)", [JOBS, self._job])
        self._reader.execute(
            self._sql(
                "INSERT INTO {windows} (target, filter, origin, job, done) VALUES (%s, %s, {origin}, %s, true)",
                origin,
            ),
            [target, self._table.filter, self._job],
        )
        return origin

    def _check_mix(self, whole: Counts, counts: Counts, replace: bool) -> None:
        """Raises BackfillError where vectors of two origins would stand in one column."""
        kinds = self._reader.execute(
            self._sql(
                "SELECT o.origin, count(*) FROM {side} s JOIN {origins} o ON o.id = s.origin "
                "WHERE s.origin <> {origin} GROUP BY 1 ORDER BY 2 DESC LIMIT 1"
            )
        ).fetchone()
        there = f"{whole.others} vectors of {describe(kinds[0])}" if kinds and whole.others else ""
        if whole.unknown:
            there += (" and " if there else "") + f"{whole.unknown} vectors of unknown origin"
        if not replace:
            raise BackfillError(
                f"{self._table.name} holds {there}, which do not compare with those of {self._origin}: add "
                "--replace to embed their texts again, or choose another column"
            )
        left = whole.others + whole.unknown - counts.others - counts.unknown
        if left:
            raise BackfillError(
                f"{self._table.name} holds {there}, of which --where would leave {left}: leave it out"
            )

    def _claim(self) -> tuple[int, str, str] | None:
        """Number, first and last id of a window that is this job's alone; None where there is no more."""
        which: list[Any] = [self._table.name, self._table.filter]
        with self._reader.transaction():
            self._reader.execute(ALONE, which[:1])
            left = self._reader.execute(
                self._sql(
                    "UPDATE {windows} SET job = %s WHERE number = (SELECT number FROM {windows} w "
                    "WHERE target = %s AND filter = %s AND NOT done AND NOT {lives} ORDER BY number LIMIT 1) "
                    "RETURNING number, first, last"
                ),
                [self._job, *which],
            ).fetchone()
            if left is not None:  # of a job that has died
                return left[0], left[1], left[2]
            after = self._one(
                "SELECT last FROM {windows} WHERE target = %s AND filter = %s AND last IS NOT NULL "
                "ORDER BY number DESC LIMIT 1",
                which,
            )
            found = self._reader.execute(
                self._sql(FIRST_ROWS if after is None else NEXT_ROWS), {"after": after, "rows": WINDOW_ROWS}
            ).fetchall()
            if not found:
                return None
            ids: list[str] = []
            size = 0
            for row, length in found:
                size += min(length or 0, TEXT_BYTES)
                if ids and size > WINDOW_BYTES:
                    break
                ids.append(row)
            number = self._one(
                "INSERT INTO {windows} (target, filter, origin, job, first, last, done) "
                "VALUES (%s, %s, {origin}, %s, %s, %s, false) RETURNING number",
                [*which, self._job, ids[0], ids[-1]],
            )
            return number, ids[0], ids[-1]

    def _window(self, condition: str, values: dict[str, Any], number: int | None) -> Window:
        """The rows that a condition picks and that are still to be done."""
        found = self._reader.execute(
            self._sql(f"{ROWS}{condition} ORDER BY t.id"), {"most": TEXT_BYTES, **values}
        ).fetchall()
        reasons = {
            i: f"its text has {size} bytes, over the {TEXT_BYTES} that a call may have"
            for i, (_, _, size) in enumerate(found)
            if size is not None and size > TEXT_BYTES
        }
        return Window([row for row, _, _ in found], [text for _, text, _ in found], reasons, number)

    def _count(self, rows: str) -> Counts:
        found = self._reader.execute(self._sql(COUNT.replace("{rows}", f"{{{rows}}}")), []).fetchone()
        assert found is not None
        return Counts(*found)

    def _one(self, statement: str, values: Sequence[Any]) -> Any:
        """The first column of the first row; None where there is none."""
        found = self._reader.execute(self._sql(statement), values).fetchone()
        return found[0] if found else None

    def _sql(self, statement: str, number: int | None = None) -> Any:
        return self._table.sql(statement, self._origin_id if number is None else number)


def packed(row: str, vector: npt.NDArray[np.float32], digest: bytes) -> bytes:
    """One row of COPY's binary format: text, pgvector's own form of a vector, bytea."""
    name = row.encode()
    numbers = vector.astype(">f4").tobytes()
    return b"".join(
        (
            struct.pack(">hi", 3, len(name)),
            name,
            struct.pack(">ihh", 4 + len(numbers), len(vector), 0),
            numbers,
            struct.pack(">i", len(digest)),
            digest,
        )
    )


def indexable(table: Table, dimensions: int) -> None:
    """Raises BackfillError where pgvector's HNSW cannot index the column."""
    most = INDEXABLE[table.vector_type]
    if dimensions > most:
        raise BackfillError(
            f"pgvector's HNSW takes {most} dimensions of a {table.vector_type} and the model gives {dimensions}: "
            "leave --index out, cut with --dimensions, or make the column a halfvec"
        )
