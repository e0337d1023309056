"""Rows of a Postgres table as a store: texts from one column, vectors into another, or into a table of their own.

Beside the vectors stand three tables. `<table>_<column>_origin` has for each vector its origin and the SHA-256 of
its text. `embedding_origins` has the origins. `embedding_claims` has what jobs are doing: see `claims.py`.

A window's vectors, their origin and the end of its claim are one transaction: who dies leaves nothing half done.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg

from tools.backfill.claims import ALONE, END, TEXT_BYTES, Claim, Claims
from tools.backfill.connection import told
from tools.backfill.errors import BackfillError
from tools.backfill.flow import Wait, Window
from tools.backfill.origin import Origin, describe, text_hash
from tools.backfill.table import CLEAR_INTO, CLEAR_TABLE, INSERT_INTO, UPDATE_TABLE, Table

ROUNDS = 4
"""How often a text is embedded that changes meanwhile."""

HEADER, TRAILER = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
"""Beginning and end of COPY's binary format."""

SESSION = (
    # Windows are found in the order of the index on the id, however little the planner knows of fresh tables.
    "SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_seqscan = off; "
    "SET enable_bitmapscan = off; SET enable_sort = off; SET jit = off; SET tcp_keepalives_idle = 60"
)

TABLES = """
CREATE TABLE IF NOT EXISTS {side} (id {type} PRIMARY KEY, origin int NOT NULL, text_sha256 bytea NOT NULL);
CREATE TABLE IF NOT EXISTS {origins} (
    id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, origin jsonb NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS {claims} (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, target text NOT NULL, origin int NOT NULL,
    job int NOT NULL, first text, last text)"""

COUNT = """
SELECT count(*), count(*) FILTER (WHERE t.vector IS NOT NULL AND s.origin = {origin}),
    count(*) FILTER (WHERE t.vector IS NOT NULL AND s.origin <> {origin}),
    count(*) FILTER (WHERE t.vector IS NOT NULL AND s.id IS NULL)
FROM {rows} t LEFT JOIN {side} s ON s.id = t.id"""

ROWS = """
SELECT t.id::text, CASE WHEN octet_length(t.text) <= %(most)s THEN t.text END, octet_length(t.text)
FROM {source} t WHERE t.id = ANY(%(ids)s::{type}[]) ORDER BY t.id"""


@dataclass(frozen=True)
class Counts:
    """Rows of a table, by where their vectors come from."""

    rows: int
    done: int
    """Rows with a vector of this origin; whether the text is still the same is not looked at."""
    others: int
    """Rows with a vector of another origin."""
    unknown: int
    """Rows with a vector that no backfill wrote."""


class Postgres:
    """The store. Raises BackfillError in one sentence for what Postgres does not allow."""

    def __init__(
        self, reader: psycopg.Connection[Any], writer: psycopg.Connection[Any], table: Table, origin: Origin
    ) -> None:
        """Of a `table`, by two connections, each of which one thread uses at a time."""
        self._reader, self._writer, self._table = reader, writer, table
        self._origin, self._origin_id = origin, 0
        self._claims: Claims
        self._changed: deque[Claim] = deque()
        """Rows whose texts changed while they were embedded."""

    def look(self) -> Counts:
        """What is there, without writing anything."""
        with told():
            side = self._table.parts["side"].as_string(self._reader).replace("%%", "%")
            if self._one("SELECT to_regclass(%s)", [side]) is None:
                self._table = self._table.without_side()
            else:
                found = self._one("SELECT id FROM {origins} WHERE origin = %s::jsonb", [self._origin.json()])
                self._origin_id = found or 0
            return self._count("source")

    def pending(self) -> tuple[int, int, int]:
        """Rows that have to be done, their bytes, and how many have no text to send: every text is looked at."""
        with told():
            found = self._reader.execute(
                self._sql(
                    "SELECT count(*), coalesce(sum(octet_length(t.text)), 0)::bigint, "
                    "count(*) FILTER (WHERE coalesce(octet_length(t.text), 0) NOT BETWEEN 1 AND %s) "
                    "FROM {source} t LEFT JOIN {side} s ON s.id = t.id WHERE {pending}"
                ),
                [TEXT_BYTES],
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
                self._reader.execute(self._sql(TABLES), [])
                self._origin_id = self._register()
                self._claims = Claims(self._reader, self._table, self._origin_id)
                self._claims.enter(self._origin)
            counts = self._count("source")
            whole = self._count("whole") if self._table.filter else counts
            if whole.others or whole.unknown:
                self._check_mix(whole, counts, replace)
            for connection in (self._reader, self._writer):
                connection.execute(SESSION)
            self._writer.execute("CREATE TEMPORARY TABLE embedded (id text, vector vector, hash bytea)")
            return counts

    def read(self) -> Window | Wait | None:
        """Claims the next rows and reads them."""
        with told():
            while True:
                claim = self._changed.popleft() if self._changed else self._claims.next()
                if not isinstance(claim, Claim):
                    return claim
                window = self._window(claim)
                if window.ids:
                    return window
                self._claims.end(claim)

    def write(self, window: Window, vectors: npt.NDArray[np.float32], refused: Mapping[int, str]) -> int:
        """Writes rows whose texts are still the same, takes vectors from refused ones, and ends the claim.

        Where texts have changed meanwhile, the claim goes on with their rows.
        """
        claim: Claim = window.token
        places = [i for i in range(len(window.ids)) if i not in refused]
        rows = [packed(window.ids[i], vectors[i], text_hash(window.texts[i] or "")) for i in places]
        unwritten = [window.ids[i] for i in refused]
        with told():
            while True:
                try:
                    written = self._write(claim, [window.ids[i] for i in places], rows, unwritten)
                    break
                except psycopg.errors.DeadlockDetected:  # with who updates rows in another order
                    continue
        changed = [window.ids[i] for i in places if window.ids[i] not in written]
        if changed:
            self._changed.append(Claim(claim.number, changed, claim.rounds + 1))
        else:
            self._claims.forget(claim)
        return len(written)

    def _write(self, claim: Claim, ids: list[str], rows: list[bytes], unwritten: list[str]) -> set[str]:
        """One transaction: vectors, or none, and the end of the claim where all are written; returns which."""
        into = self._table.into
        with self._writer.transaction(), self._writer.cursor() as cursor:
            cursor.execute("TRUNCATE pg_temp.embedded")
            with cursor.copy("COPY pg_temp.embedded FROM STDIN (FORMAT BINARY)") as copy:
                copy.write(b"".join([HEADER, *rows, TRAILER]))
            cursor.execute(self._sql(INSERT_INTO if into else UPDATE_TABLE), [])
            written = {one for (one,) in cursor.fetchall()}
            if unwritten:
                cursor.execute(self._sql(CLEAR_INTO if into else CLEAR_TABLE), {"ids": unwritten})
            if written.issuperset(ids):
                cursor.execute(self._sql(END), [claim.number])
            return written

    def end(self) -> None:
        """Forgets this job, and claims of those that have died."""
        with told():
            self._claims.leave()

    def build_index(self) -> str:
        """Builds the HNSW index by cosine, without locking the table; returns its definition."""
        kind = self._table.vector_type
        statement = self._table.sql(
            f"CREATE INDEX CONCURRENTLY ON {{goal}} USING hnsw ({{vector}} {kind}_cosine_ops)", 0
        )
        with told():
            self._reader.execute(statement, [])
        return str(statement.as_string(self._reader)).replace("%%", "%")

    def _register(self) -> int:
        """Enters the origin of the vectors; returns its number."""
        said = self._origin.json()
        self._reader.execute(
            self._sql("INSERT INTO {origins} (origin) VALUES (%s::jsonb) ON CONFLICT DO NOTHING"), [said]
        )
        number: int = self._one("SELECT id FROM {origins} WHERE origin = %s::jsonb", [said])
        return number

    def _check_mix(self, whole: Counts, counts: Counts, replace: bool) -> None:
        """Raises BackfillError where vectors of two origins would stand in one column."""
        kinds = self._reader.execute(
            self._sql(
                "SELECT o.origin, count(*) FROM {side} s JOIN {origins} o ON o.id = s.origin "
                "WHERE s.origin <> {origin} GROUP BY 1 ORDER BY 2 DESC LIMIT 1"
            ),
            [],
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

    def _window(self, claim: Claim) -> Window:
        """The rows of a claim that are still there."""
        found = self._reader.execute(self._sql(ROWS), {"most": TEXT_BYTES, "ids": claim.ids}).fetchall()
        ids = [row for row, _, _ in found]
        if claim.rounds > ROUNDS:
            reason = f"{ROUNDS} times its text changed meanwhile, or a trigger or row policy kept its vector out"
            return Window(ids, [None] * len(ids), dict.fromkeys(range(len(ids)), reason), claim)
        reasons = {
            i: f"its text has {size} bytes, over the {TEXT_BYTES} that a call may have"
            for i, (_, _, size) in enumerate(found)
            if size is not None and size > TEXT_BYTES
        }
        return Window(ids, [text for _, text, _ in found], reasons, claim)

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
