"""A table with texts and vectors: what it must be like, and the SQL over it."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from psycopg import sql

from tools.backfill.errors import BackfillError

INDEXABLE = {"vector": 2000, "halfvec": 4000}
"""Types of vectors -> dimensions that pgvector's HNSW takes."""

NAME_BYTES = 63
"""Bytes of an identifier, at which Postgres cuts it."""

JOBS = 0x7E3B
"""Namespace of the advisory locks that jobs hold while they live."""

LIVES = (
    "EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = {jobs} AND l.objsubid = 2"
    " AND l.objid::bigint = c.job"
    " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
)
"""Whether the job of a claim `c` lives."""

NO_SIDE = "(SELECT NULL::{type} AS id, NULL::int AS origin, NULL::bytea AS text_sha256 WHERE false)"
"""Stands for a table of origins that is not made yet."""

PENDING = (
    "(s.id IS NULL OR s.origin <> {origin} OR t.vector IS NULL"
    " OR s.text_sha256 IS DISTINCT FROM sha256(convert_to(t.text, 'UTF8')))"
)
"""Rows that have to be done: missing, of another origin, or of another text."""

UPDATE_TABLE = """
WITH written AS (
    UPDATE {table} t SET {vector} = e.vector::{vector_type} FROM pg_temp.embedded e
    WHERE t.{id} = e.id::{type} AND sha256(convert_to(t.{text}::text, 'UTF8')) = e.hash
    RETURNING e.id, e.hash
), noted AS (
    INSERT INTO {side} (id, origin, text_sha256) SELECT id::{type}, {origin}, hash FROM written
    ON CONFLICT (id) DO UPDATE SET origin = excluded.origin, text_sha256 = excluded.text_sha256
) SELECT id FROM written"""

INSERT_INTO = """
WITH fresh AS (
    SELECT e.id, e.vector, e.hash FROM pg_temp.embedded e JOIN {table} t ON t.{id} = e.id::{type}
    WHERE sha256(convert_to(t.{text}::text, 'UTF8')) = e.hash
), written AS (
    INSERT INTO {into} (id, {vector}) SELECT id::{type}, vector::{vector_type} FROM fresh
    ON CONFLICT (id) DO UPDATE SET {vector} = excluded.{vector}
), noted AS (
    INSERT INTO {side} (id, origin, text_sha256) SELECT id::{type}, {origin}, hash FROM fresh
    ON CONFLICT (id) DO UPDATE SET origin = excluded.origin, text_sha256 = excluded.text_sha256
) SELECT id FROM fresh"""

CLEAR_TABLE = """
WITH gone AS (DELETE FROM {side} WHERE id = ANY(%(ids)s::{type}[]))
UPDATE {table} SET {vector} = NULL WHERE {id} = ANY(%(ids)s::{type}[]) AND {vector} IS NOT NULL"""

CLEAR_INTO = """
WITH gone AS (DELETE FROM {side} WHERE id = ANY(%(ids)s::{type}[]))
DELETE FROM {into} WHERE id = ANY(%(ids)s::{type}[])"""


@dataclass(frozen=True)
class Table:
    """Where texts are and where vectors go, as it was found in the database."""

    name: str
    """As it was asked for, the column of vectors behind it."""
    into: bool
    """Whether vectors go into a table of their own."""
    filter: str
    """SQL over the table, or ""."""
    vector_type: str
    """vector or halfvec."""
    sized: bool
    """Whether the column says how many dimensions it has."""
    partitioned: bool
    """Whether vectors go into partitions."""
    index: str | None
    """An HNSW or IVFFlat index that is there."""
    parts: dict[str, sql.Composable]
    """What the statements are made of."""

    @classmethod
    def find(
        cls, connection: psycopg.Connection[Any], options: argparse.Namespace, dimensions: int, make: bool
    ) -> Table:
        """Looks up what a command's options name, and makes the table `into` where asked to.

        Raises BackfillError in one sentence for what is missing or does not fit.
        """
        table, id_column, into = options.table, options.id, options.into
        text, vector, where = options.text, options.vector, options.where
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_extension WHERE extname = 'vector'")
            if cursor.fetchone() is None:
                raise BackfillError("the database has no pgvector: run CREATE EXTENSION vector in it")
        schema, name, partitioned = resolve(connection, table, "--table")
        columns = columns_of(connection, schema, name)
        for option, column in (("--id", id_column), ("--text", text)):
            if column not in columns:
                raise BackfillError(f"{table} has no column {column!r} for {option}: it has {', '.join(columns)}")
        if columns[text].partition("(")[0] in ("bytea", *INDEXABLE):
            raise BackfillError(f"{table}.{text} is {columns[text]}: name a column of texts with --text")
        if not is_unique(connection, schema, name, id_column):
            raise BackfillError(
                f"{table}.{id_column} is not known to be unique: name the primary key with --id, or run "
                f"CREATE UNIQUE INDEX ON {table} ({id_column}) and set it NOT NULL"
            )
        type_name = columns[id_column]
        parts: dict[str, sql.Composable] = {
            "table": identifier(schema, name),
            "id": identifier(id_column),
            "text": identifier(text),
            "vector": identifier(vector),
            "type": sql.SQL(type_name.replace("%", "%%")),  # of format_type
        }
        goal_schema, goal, goal_columns = schema, name, columns
        if into is not None:
            if make:
                make_into(connection, into, parts, dimensions)
            goal_schema, goal, partitioned = resolve(connection, into, "--into")
            goal_columns = columns_of(connection, goal_schema, goal)
            parts["into"] = identifier(goal_schema, goal)
            if goal_columns.get("id") != type_name or not is_unique(connection, goal_schema, goal, "id"):
                raise BackfillError(
                    f"{into} needs a column id {type_name} PRIMARY KEY, as {table}.{id_column} has"
                )
        vector_type = check_vector(into or table, vector, goal_columns, dimensions)
        side = f"{goal}_{vector}_origin"
        if len(side.encode()) > NAME_BYTES:
            side = f"{hashlib.sha256(side.encode()).hexdigest()[:32]}_origin"
        parts |= {
            "vector_type": sql.SQL(goal_columns[vector]),
            "side": identifier(goal_schema, side),
            "origins": identifier(goal_schema, "embedding_origins"),
            "claims": identifier(goal_schema, "embedding_claims"),
        }
        parts["source"] = source(parts, where, into is not None)
        parts["whole"] = source(parts, None, into is not None)
        return cls(
            name=f"{goal_schema}.{goal}.{vector}",
            into=into is not None,
            filter=where or "",
            vector_type=vector_type,
            sized="(" in goal_columns[vector],
            partitioned=partitioned,
            index=index_on(connection, goal_schema, goal, vector),
            parts=parts,
        )

    def check_indexable(self, dimensions: int) -> None:
        """Raises BackfillError where pgvector's HNSW index cannot be built on the column."""
        if self.partitioned:
            raise BackfillError("--index does not do partitioned tables: run CREATE INDEX yourself, afterwards")
        if not self.sized:
            raise BackfillError(
                f"--index needs a column of so many dimensions, and {self.name} is a {self.vector_type} of any: "
                f"make it {self.vector_type}({dimensions})"
            )
        most = INDEXABLE[self.vector_type]
        if dimensions > most:
            raise BackfillError(
                f"pgvector's HNSW takes {most} dimensions of a {self.vector_type} and the model gives "
                f"{dimensions}: leave --index out, cut with --dimensions, or make the column a halfvec"
            )

    def without_side(self) -> Table:
        """The same for a look at a table that no backfill has seen yet."""
        return replace(self, parts={**self.parts, "side": sql.SQL(NO_SIDE).format(**self.parts)})

    def sql(self, statement: str, origin: int) -> sql.Composed:
        """A statement over the table; `{pending}` are rows of `t` beside `s` that are not of `origin`.

        It is for execution with parameters, if only with none: each % is written twice.
        """
        number = sql.Literal(origin)
        pending = sql.SQL(PENDING).format(origin=number)
        goal = self.parts["into" if self.into else "table"]
        lives = sql.SQL(LIVES).format(jobs=sql.Literal(JOBS))
        return sql.SQL(statement).format(**self.parts, goal=goal, origin=number, pending=pending, lives=lives)


def source(parts: dict[str, sql.Composable], where: str | None, into: bool) -> sql.Composable:
    """Rows of `id`, `text` and `vector`."""
    rows = sql.SQL("SELECT {id} AS id, {text}::text AS text, {vector} AS vector FROM {table}")
    if into:
        rows = sql.SQL("SELECT {id} AS id, {text}::text AS text FROM {table}")
    found: sql.Composable = rows.format(**parts)
    if where:
        found = (
            found
            + sql.SQL(" WHERE (" + where.replace("{", "{{").replace("}", "}}").replace("%", "%%") + "\n)").format()
        )
    if into:
        joined = sql.SQL(
            "SELECT a.id, a.text, b.{vector} AS vector FROM ({rows}) a LEFT JOIN {into} b ON b.id = a.id"
        )
        found = joined.format(rows=found, **{key: parts[key] for key in ("vector", "into")})
    return sql.SQL("({})").format(found)


def identifier(*words: str) -> sql.Composable:
    """A quoted name, for a statement with parameters."""
    return sql.SQL(sql.Identifier(*words).as_string(None).replace("%", "%%"))


def resolve(connection: psycopg.Connection[Any], name: str, option: str) -> tuple[str, str, bool]:
    """Schema and name of the table that an `option` names, and whether it is partitioned."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT n.nspname, c.relname, c.relkind::text FROM pg_class c "
            "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%s)",
            [name],
        )
        found = cursor.fetchone()
    if found is None:
        raise BackfillError(
            f"there is no table {name} in the database {connection.info.dbname!r}: name it with {option}, its "
            "schema before it where it is not in the search path"
        )
    if found[2] not in ("r", "p"):
        what = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}.get(found[2], "none")
        raise BackfillError(f"{name} is no table but {what}: name the table that it shows with {option}")
    return found[0], found[1], found[2] == "p"


def make_into(
    connection: psycopg.Connection[Any], name: str, parts: dict[str, sql.Composable], dimensions: int
) -> None:
    """Makes a table of vectors where there is none."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass(%s) IS NULL, parse_ident(%s)", [name, name])
        missing, words = cursor.fetchone() or (False, [])
        if missing:
            statement = sql.SQL("CREATE TABLE IF NOT EXISTS {} (id {} PRIMARY KEY, {} vector({}))")
            vector = parts["type"], parts["vector"], sql.Literal(dimensions)
            cursor.execute(statement.format(identifier(*words), *vector), [])


def columns_of(connection: psycopg.Connection[Any], schema: str, table: str) -> dict[str, str]:
    """Columns and their types, as Postgres writes them."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute "
            "WHERE attrelid = format('%%I.%%I', %s::text, %s::text)::regclass AND attnum > 0 AND NOT attisdropped "
            "ORDER BY attnum",
            [schema, table],
        )
        return dict(cursor.fetchall())


def is_unique(connection: psycopg.Connection[Any], schema: str, table: str, column: str) -> bool:
    """Whether no two rows have the same value there, and every row has one."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT 1 FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] "
            "WHERE i.indrelid = format('%%I.%%I', %s::text, %s::text)::regclass AND a.attname = %s "
            "AND a.attnotnull AND i.indisunique AND i.indnkeyatts = 1 AND i.indpred IS NULL AND i.indisvalid",
            [schema, table, column],
        )
        return cursor.fetchone() is not None


def index_on(connection: psycopg.Connection[Any], schema: str, table: str, column: str) -> str | None:
    """The name of an index of pgvector's on a column."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
            "JOIN pg_am m ON m.oid = c.relam "
            "JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] "
            "WHERE i.indrelid = format('%%I.%%I', %s::text, %s::text)::regclass AND a.attname = %s "
            "AND m.amname IN ('hnsw', 'ivfflat')",
            [schema, table, column],
        )
        found = cursor.fetchone()
        return found[0] if found else None


def check_vector(table: str, vector: str, columns: dict[str, str], dimensions: int) -> str:
    """The type of the column of vectors; raises BackfillError where the model's vectors do not go there."""
    fitting = f"vector({dimensions})"
    if vector not in columns:
        raise BackfillError(
            f"{table} has no column {vector!r} for --vector: run ALTER TABLE {table} ADD COLUMN {vector} {fitting}"
        )
    kind = columns[vector].rpartition(".")[2]  # its schema before it where that is not in the search path
    name, _, size = kind.rstrip(")").partition("(")
    if name not in INDEXABLE:
        raise BackfillError(f"{table}.{vector} is {kind}: vectors go into a column of type {fitting}")
    if size and int(size) != dimensions:
        raise BackfillError(
            f"{table}.{vector} is {kind} and the model gives {dimensions} dimensions: make it {fitting}, choose "
            "another model with --model, or cut with --dimensions where it was trained for that"
        )
    return name
