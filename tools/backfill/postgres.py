"""Rows of a Postgres table as a store: texts from one column, vectors into another, or into a table of their own.

Beside the vectors stand three tables. `<table>_<column>_origin` has for each vector its origin and the SHA-256 of
its text. `embedding_origins` has the origins. `embedding_claims` has what jobs are doing: ranges of ids, whatever
the filter, each claimed by a job that lives as long as its session holds an advisory lock.

A window's vectors, their origin and the end of its claim are one transaction: who dies leaves nothing half done.
Each job comes by every row. What others have claimed it passes over, and looks at again when that claim has ended.
"""

from __future__ import annotations

import random
import struct
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg

from tools.backfill.errors import BackfillError
from tools.backfill.flow import Wait, Window
from tools.backfill.origin import Origin, describe, text_hash
from tools.backfill.table import CLEAR_INTO, CLEAR_TABLE, INDEXABLE, INSERT_INTO, JOBS, UPDATE_TABLE, Table

WINDOW_ROWS, WINDOW_BYTES = 4096, 2**25
"""Of one transaction, at most; a larger text is a window by itself."""

TEXT_BYTES = 2**24
"""Of one text, over which no call takes it; it is not even read."""

CLAIMS = JOBS + 1
"""Namespace of advisory locks of targets whose next window is being claimed."""

ROUNDS = 4
"""How often a text is embedded that changes meanwhile."""

HEADER, TRAILER = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
"""Of COPY's binary format."""

SEARCH_PATH = """
SELECT set_config(
    'search_path', concat_ws(', ', nullif(current_setting('search_path'), ''), quote_ident(n.nspname)), false)
FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace WHERE extname = 'vector'"""
"""pgvector may lie in a schema of its own."""

PATIENT = """
SELECT set_config(name, '0', false) FROM pg_settings WHERE name IN ('statement_timeout', 'idle_session_timeout')"""
"""Counting a large table takes long, and so does waiting for a server."""

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

ALONE = f"SELECT pg_advisory_xact_lock({CLAIMS}, hashtext(%s))"

COUNT = """
SELECT count(*), count(*) FILTER (WHERE t.vector IS NOT NULL AND s.origin = {origin}),
    count(*) FILTER (WHERE t.vector IS NOT NULL AND s.origin <> {origin}),
    count(*) FILTER (WHERE t.vector IS NOT NULL AND s.id IS NULL)
FROM {rows} t LEFT JOIN {side} s ON s.id = t.id"""

LOOK = """
SELECT t.id::text FROM {source} t LEFT JOIN {side} s ON s.id = t.id WHERE {pending}"""

LIVING = "SELECT number, first, last FROM {claims} c WHERE target = %(target)s AND job <> %(job)s AND {lives}"

CHOOSE = """
WITH living AS MATERIALIZED ({living})
SELECT t.id::text, octet_length(t.text), (
    SELECT min(number) FROM living WHERE t.id BETWEEN first::{type} AND last::{type})
FROM {source} t LEFT JOIN {side} s ON s.id = t.id
WHERE {pending} AND t.id = ANY(%(ids)s::{type}[]) ORDER BY t.id""".replace("{living}", LIVING)
"""Rows that still have to be done, and who has claimed them."""

END = "DELETE FROM {claims} WHERE number = %s"

ROWS = """
SELECT t.id::text, CASE WHEN octet_length(t.text) <= %(most)s THEN t.text END, octet_length(t.text)
FROM {source} t WHERE t.id = ANY(%(ids)s::{type}[]) ORDER BY t.id"""


@contextmanager
def connected(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection with a transaction for each statement; raises BackfillError where there is none."""
    try:
        connection = psycopg.connect(
            dsn, autocommit=True, application_name="backfill", connect_timeout=10, client_encoding="utf8"
        )
    except psycopg.Error as error:
        raise BackfillError(f"cannot connect to Postgres: {sentence(error)}") from None
    with connection:
        connection.execute(SEARCH_PATH)
        connection.execute(PATIENT)
        try:
            yield connection
        except BaseException:
            connection.cancel()  # what another thread may be waiting for
            raise


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
    except psycopg.errors.InsufficientPrivilege as error:
        raise BackfillError(
            f"Postgres refuses: {sentence(error)}: the role has to read texts, to write vectors, and to make "
            "tables beside them"
        ) from None
    except psycopg.Error as error:
        if isinstance(error, psycopg.OperationalError) and (error.sqlstate or "08")[:2] in ("08", "57"):
            raise BackfillError(
                f"Postgres has gone ({sentence(error)}): run the same command again to go on"
            ) from None
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


@dataclass(eq=False)
class Span:
    """Ids that this job has not come by yet, or that another had claimed when it did."""

    after: str | None = None
    """The last id before it; None where it begins with the first row."""
    last: str | None = None
    """None where it has no end."""
    claim: int | None = None
    """Number of the other's claim."""


@dataclass(frozen=True)
class Claim:
    """Rows that this job does, alone."""

    number: int
    ids: list[str]
    rounds: int = 1


class Postgres:
    """The store. Raises BackfillError in one sentence for what Postgres does not allow."""

    def __init__(
        self, reader: psycopg.Connection[Any], writer: psycopg.Connection[Any], table: Table, origin: Origin
    ) -> None:
        """Of a `table`, by two connections, each of which one thread uses at a time."""
        self._reader, self._writer, self._table = reader, writer, table
        self._origin, self._origin_id = origin, 0
        self._job = random.randrange(1, 2**31)
        self._who = {"target": table.name, "job": self._job}
        self._spans = [Span()]
        self._mine: set[int] = set()
        """Numbers of this job's claims."""
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
                self._origin_id = self._enter()
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
                claim = self._changed.popleft() if self._changed else self._claim()
                if not isinstance(claim, Claim):
                    return claim
                window = self._window(claim)
                if window.ids:
                    return window
                self._reader.execute(self._sql(END), [claim.number])  # its rows are gone
                self._mine.discard(claim.number)

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
            self._mine.discard(claim.number)
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
        with told(), self._reader.transaction():
            self._reader.execute(ALONE, [self._table.name])
            self._reader.execute(
                self._sql("DELETE FROM {claims} c WHERE target = %s AND (job = %s OR NOT {lives})"),
                [self._table.name, self._job],
            )

    def build_index(self) -> str:
        """Builds the HNSW index by cosine, without locking the table; returns its definition."""
        kind = self._table.vector_type
        statement = self._table.sql(
            f"CREATE INDEX CONCURRENTLY ON {{goal}} USING hnsw ({{vector}} {kind}_cosine_ops)", 0
        )
        with told():
            self._reader.execute(statement, [])
        return str(statement.as_string(self._reader)).replace("%%", "%")

    def _enter(self) -> int:
        """Registers this job; returns the number of its origin."""
        said, target = self._origin.json(), self._table.name
        self._reader.execute(
            self._sql("INSERT INTO {origins} (origin) VALUES (%s::jsonb) ON CONFLICT DO NOTHING"), [said]
        )
        origin: int = self._one("SELECT id FROM {origins} WHERE origin = %s::jsonb", [said])
        living = self._reader.execute(
            self._sql(
                "SELECT DISTINCT c.origin, o.origin FROM {claims} c JOIN {origins} o ON o.id = c.origin "
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
            self._reader.execute(self._sql("DELETE FROM {claims} WHERE target = %s"), [target])
        self._reader.execute("SELECT pg_advisory_lock(%s, %s)", [JOBS, self._job])
        self._reader.execute(
            self._sql(
                "INSERT INTO {claims} (target, origin, job) VALUES (%s, {origin}, %s)",
                origin,
            ),
            [target, self._job],
        )
        return origin

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

    def _claim(self) -> Claim | Wait | None:
        """Rows for this job alone: the next ones, or those that another had claimed who is done or dead."""
        while self._spans:
            found = self._reader.execute(self._sql(LIVING), self._who).fetchall()
            living: dict[int | None, tuple[str, str]] = {number: (first, last) for number, first, last in found}
            span = next((span for span in self._spans if span.claim not in living), None)
            if span is None:
                first, last = living[self._spans[0].claim]
                return Wait(f"another job, which has claimed the ids from {first} to {last} of {self._table.name}")
            while ids := self._look(span):
                if (claim := self._choose(span, ids)) is not None:
                    return claim
            self._spans.remove(span)
        return Wait(None) if self._mine else None

    def _look(self, span: Span) -> list[str]:
        """The first rows of a span that have to be done, whoever has claimed them."""
        after = " AND t.id > %(after)s::text::{type}" if span.after is not None else ""
        until = " AND t.id <= %(last)s::text::{type}" if span.last is not None else ""
        statement = self._sql(f"{LOOK}{after}{until} ORDER BY t.id LIMIT %(rows)s")
        values = {"after": span.after, "last": span.last, "rows": WINDOW_ROWS}
        return [row for (row,) in self._reader.execute(statement, values)]

    def _choose(self, span: Span, ids: list[str]) -> Claim | None:
        """Claims what is free of the first rows of a span, and goes on in it; what is not becomes a span."""
        chosen: list[str] = []
        size = 0
        with self._reader.transaction():
            self._reader.execute(ALONE, [self._table.name])
            found = self._reader.execute(self._sql(CHOOSE), {**self._who, "ids": ids}).fetchall()
            for row, length, other in found:
                size += min(length or 0, TEXT_BYTES)
                if chosen and (other is not None or size > WINDOW_BYTES):
                    break
                if other is None:
                    chosen.append(row)
                else:
                    self._pass(span, row, other)
                span.after = row
            else:
                span.after = ids[-1]
            if chosen:
                number = self._one(
                    "INSERT INTO {claims} (target, origin, job, first, last) "
                    "VALUES (%s, {origin}, %s, %s, %s) RETURNING number",
                    [self._table.name, self._job, chosen[0], chosen[-1]],
                )
                self._mine.add(number)
        return Claim(number, chosen) if chosen else None

    def _pass(self, span: Span, row: str, claim: int) -> None:
        """Leaves the next row of a span to the one before it, which is another's claim."""
        place = self._spans.index(span)
        before = self._spans[place - 1] if place else None
        if before is not None and (before.claim, before.last) == (claim, span.after):
            before.last = row
        else:
            self._spans.insert(place, Span(span.after, row, claim))

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


def indexable(table: Table, dimensions: int) -> None:
    """Raises BackfillError where pgvector's HNSW index cannot be built on the column."""
    if table.partitioned:
        raise BackfillError("--index does not do partitioned tables: run CREATE INDEX yourself, afterwards")
    if not table.sized:
        raise BackfillError(
            f"--index needs a column of so many dimensions, and {table.name} is a {table.vector_type} of any: "
            f"make it {table.vector_type}({dimensions})"
        )
    most = INDEXABLE[table.vector_type]
    if dimensions > most:
        raise BackfillError(
            f"pgvector's HNSW takes {most} dimensions of a {table.vector_type} and the model gives {dimensions}: "
            "leave --index out, cut with --dimensions, or make the column a halfvec"
        )
