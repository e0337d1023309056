"""Looks a question up in a table that a backfill has filled: its vector, pgvector's nearest rows, the reranker.

A column whose vectors are of another model than the question's is refused.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tools.backfill.client import GATEWAY, Client
from tools.backfill.errors import BackfillError
from tools.backfill.origin import Origin, describe
from tools.backfill.progress import Progress

NEAREST = """
SELECT t.id::text, t.text FROM {source} t WHERE t.vector IS NOT NULL AND t.text IS NOT NULL
ORDER BY t.vector <=> %(question)s::{vector_type} LIMIT %(rows)s"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the best rows, one a line: score, id, text."""
    parser = argparse.ArgumentParser(prog="python -m tools.search", description=__doc__)
    add = parser.add_argument
    add("source", help="postgresql://...")
    add("question")
    add("--table", required=True, help="table of texts, as SCHEMA.TABLE where needed")
    add("--id", default="id", help="column that names a row (default: id)")
    add("--text", default="text", help="column of texts (default: text)")
    add("--vector", default="embedding", help="column of vectors (default: embedding)")
    add("--into", metavar="TABLE", help="the table of vectors, where they have one of their own")
    add("--where", help="SQL that picks rows of the table")
    add("--url", default=GATEWAY, help=f"gateway (default: {GATEWAY})")
    add("--model", help="model of the vectors (default: the first that embeds)")
    add(
        "--prompt", help="name of the prompt put before the question, or none (default: query, where there is one)"
    )
    add("--dimensions", type=int, help="dimensions that the backfill cut vectors to")
    add("--reranker", help="model that reranks (default: the first)")
    add("--nearest", type=int, default=80, help="rows that are reranked (default: 80)")
    add("--top", type=int, default=10, help="rows that are shown (default: 10)")
    options = parser.parse_args(arguments)
    try:
        for score, row, text in asyncio.run(search(options)):
            print(f"{score:.4f}  {row}  {' '.join(text.split())[:80]}")
    except BackfillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


async def search(options: argparse.Namespace) -> list[tuple[float, str, str]]:
    """Score, id and text of the best rows, the best first."""
    key = os.environ.get("GATEWAY_API_KEY")
    async with Client(
        [options.url], options.model, options.prompt, options.dimensions, key, 1, Progress(), usual="query"
    ) as client:
        question = np.zeros((1, client.origin.dimensions), np.float32)
        refused: dict[int, str] = {}
        if not options.question:
            raise BackfillError("the question is empty")
        await client.embed([options.question], [0], question, refused)
        if refused:
            raise BackfillError(f"the question: {refused[0]}")
        rows = nearest(options, client.origin, question[0].tolist())
        if not rows:
            return []
        scores = await client.rerank(options.question, [text for _, text in rows], options.reranker)
    ranked = sorted(zip(scores, rows, strict=True), key=lambda one: -one[0])
    return [(score, row, text) for score, (row, text) in ranked[: options.top]]


def nearest(options: argparse.Namespace, origin: Origin, question: list[float]) -> list[tuple[str, str]]:
    """Id and text of the rows whose vectors are nearest by cosine."""
    from tools.backfill.connection import connected, told
    from tools.backfill.table import Table

    with connected(options.source) as connection, told():
        table = Table.find(connection, options, origin.dimensions, make=False)
        check_origin(connection, table, origin)
        # An index gives no more rows than it looks at.
        connection.execute(f"SET hnsw.ef_search = {min(1000, max(40, options.nearest))}")
        values = {"question": str(question), "rows": options.nearest}
        found: list[tuple[str, str]] = connection.execute(table.sql(NEAREST, 0), values).fetchall()
        return found


def check_origin(connection: Any, table: Any, origin: Origin) -> None:
    """Raises BackfillError where the vectors are not of the question's model."""
    side = table.parts["side"].as_string(connection).replace("%%", "%")
    if connection.execute("SELECT to_regclass(%s)", [side]).fetchone()[0] is None:
        raise BackfillError(f"no backfill has filled {table.name}: run python -m tools.backfill first")
    origins = connection.execute(
        table.sql("SELECT o.origin FROM {origins} o WHERE EXISTS (SELECT FROM {side} s WHERE s.origin = o.id)", 0),
        [],
    ).fetchall()
    for (there,) in origins:
        if Origin(**there) != replace(origin, prompt=there["prompt"]):
            raise BackfillError(
                f"{table.name} holds vectors of {describe(there)}, which do not compare with those of {origin}: "
                "name their model with --model"
            )


if __name__ == "__main__":
    sys.exit(main())
