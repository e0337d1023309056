"""Which rows of a table a backfill's job does: ranges of ids that it claims.

`embedding_claims` has a row for each range, whatever the filter, and one for each job. A job lives as long as its
session holds an advisory lock; what one that has died had claimed is free again. Each job comes by every row. What
others have claimed it passes over, and looks at again when that claim has ended.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import psycopg

from tools.backfill.errors import BackfillError
from tools.backfill.flow import Wait
from tools.backfill.origin import Origin, describe
from tools.backfill.table import JOBS, Table

WINDOW_ROWS, WINDOW_BYTES = 4096, 2**25
"""Rows and bytes of text of one transaction, at most; a larger text is a window by itself."""

TEXT_BYTES = 2**24
"""Bytes of one text, over which no call takes it; it is not even read."""

CLAIMS = JOBS + 1
"""Namespace of advisory locks of targets whose next window is being claimed."""

ALONE = f"SELECT pg_advisory_xact_lock({CLAIMS}, hashtext(%s))"
"""Lets one transaction at a time claim rows of a target."""

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


class Claims:
    """The claims of one job. They are made by one thread; others may `forget` them."""

    def __init__(self, connection: psycopg.Connection[Any], table: Table, origin: int) -> None:
        """By the connection whose session is the job's life; `origin` is the number of its vectors' origin."""
        self._connection, self._table, self._origin = connection, table, origin
        self._job = random.randrange(1, 2**31)
        self._who = {"target": table.name, "job": self._job}
        self._spans = [Span()]
        self._mine: set[int] = set()
        """Numbers of the claims that have not ended."""

    def enter(self, origin: Origin) -> None:
        """Enters this job for vectors of `origin`; raises BackfillError where another job fills in others."""
        target = self._table.name
        living = self._connection.execute(
            self._sql(
                "SELECT DISTINCT c.origin, o.origin FROM {claims} c JOIN {origins} o ON o.id = c.origin "
                "WHERE target = %s AND {lives}"
            ),
            [target],
        ).fetchall()
        for other, what in living:
            if other != self._origin:
                raise BackfillError(
                    f"another job is filling {target} with vectors of {describe(what)}, and these would be of "
                    f"{origin}: let it end or stop it first"
                )
        if not living:
            self._connection.execute(self._sql("DELETE FROM {claims} WHERE target = %s"), [target])
        self._connection.execute("SELECT pg_advisory_lock(%s, %s)", [JOBS, self._job])
        self._connection.execute(
            self._sql("INSERT INTO {claims} (target, origin, job) VALUES (%s, {origin}, %s)"),
            [target, self._job],
        )

    def next(self) -> Claim | Wait | None:
        """Rows for this job alone: the next ones, or those that another had claimed who is done or dead."""
        while self._spans:
            found = self._connection.execute(self._sql(LIVING), self._who).fetchall()
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

    def end(self, claim: Claim) -> None:
        """Ends a claim whose rows are gone."""
        self._connection.execute(self._sql(END), [claim.number])
        self.forget(claim)

    def forget(self, claim: Claim) -> None:
        """Notes that a claim has ended, with the transaction that wrote its rows."""
        self._mine.discard(claim.number)

    def leave(self) -> None:
        """Forgets this job, and claims of those that have died."""
        with self._connection.transaction():
            self._connection.execute(ALONE, [self._table.name])
            self._connection.execute(
                self._sql("DELETE FROM {claims} c WHERE target = %s AND (job = %s OR NOT {lives})"),
                [self._table.name, self._job],
            )

    def _look(self, span: Span) -> list[str]:
        """The first rows of a span that have to be done, whoever has claimed them."""
        after = " AND t.id > %(after)s::text::{type}" if span.after is not None else ""
        until = " AND t.id <= %(last)s::text::{type}" if span.last is not None else ""
        statement = self._sql(f"{LOOK}{after}{until} ORDER BY t.id LIMIT %(rows)s")
        values = {"after": span.after, "last": span.last, "rows": WINDOW_ROWS}
        return [row for (row,) in self._connection.execute(statement, values)]

    def _choose(self, span: Span, ids: list[str]) -> Claim | None:
        """Claims what is free of the first rows of a span, and goes on in it; what is not becomes a span."""
        chosen: list[str] = []
        size = 0
        with self._connection.transaction():
            self._connection.execute(ALONE, [self._table.name])
            found = self._connection.execute(self._sql(CHOOSE), {**self._who, "ids": ids}).fetchall()
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
                (number,) = self._connection.execute(
                    self._sql(
                        "INSERT INTO {claims} (target, origin, job, first, last) "
                        "VALUES (%s, {origin}, %s, %s, %s) RETURNING number"
                    ),
                    [self._table.name, self._job, chosen[0], chosen[-1]],
                ).fetchall()[0]
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

    def _sql(self, statement: str) -> Any:
        return self._table.sql(statement, self._origin)
