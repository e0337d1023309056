"""Connections to Postgres, and what it has against a statement in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from tools.backfill.errors import BackfillError

SEARCH_PATH = """
SELECT set_config(
    'search_path', concat_ws(', ', nullif(current_setting('search_path'), ''), quote_ident(n.nspname)), false)
FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace WHERE extname = 'vector'"""
"""pgvector may lie in a schema of its own."""

PATIENT = """
SELECT set_config(name, '0', false) FROM pg_settings WHERE name IN ('statement_timeout', 'idle_session_timeout')"""
"""Counting a large table takes long, and so does waiting for a server."""


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
