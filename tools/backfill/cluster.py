"""The same flow on a Ray cluster: each worker does parts of files, as a client of one stack or of many.

Ray Data maps parts over actors. What a part becomes is a file, written aside and renamed: a worker that dies is
replaced, its parts are done again, and a job that is killed goes on where it was. All machines see the folders of
texts and vectors under the same path, on a file system with locks.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from dataclasses import replace
from typing import Any

import ray

from tools.backfill import flow
from tools.backfill.client import Client
from tools.backfill.errors import BackfillError
from tools.backfill.files import Files
from tools.backfill.progress import Progress
from tools.command import ROOT

PARTS = 4
"""Parts of one task, so that reading and writing one overlaps with embedding another."""

Batch = dict[str, Any]


class Worker:
    """An actor of Ray's, which does parts and answers with counts and the rows that were refused."""

    def __init__(self, store: Files, options: argparse.Namespace, key: str | None) -> None:
        """For a `store` whose origin is noted, with the command line's `options` and a key of the gateway."""
        self._store, self._options, self._key = store, options, key

    def __call__(self, batch: Batch) -> Batch:
        """Does the parts that the columns `file` and `part` name."""
        return asyncio.run(self._do(list(zip(map(str, batch["file"]), map(int, batch["part"]), strict=True))))

    async def _do(self, only: list[tuple[str, int]]) -> Batch:
        options, progress = self._options, Progress(names=PARTS * self._store.part_rows)
        urls = options.url
        async with Client(
            urls, options.model, options.prompt, options.dimensions, self._key, options.calls, progress
        ) as client:
            if client.origin != self._store.origin:
                raise BackfillError(f"{urls[0]} serves {client.origin} and served {self._store.origin}")
            progress.texts = progress.tokens = progress.cut = 0
            await flow.run(replace(self._store, only=only, todo=None), client, progress)
        counts = {"rows": progress.rows, "texts": progress.texts, "tokens": progress.tokens, "cut": progress.cut}
        return {**{name: [count] for name, count in counts.items()}, "refused": [list(progress.named.items())]}


def run(store: Files, options: argparse.Namespace, progress: Progress, total: int) -> None:
    """Does every part by `--workers` actors; a cluster that is there already is used, by RAY_ADDRESS."""
    parts = [part for path in store.inputs() for part in store.parts_of(path)]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no other host is told
    environment = {"PYTHONPATH": str(ROOT)}
    key = os.environ.get("GATEWAY_API_KEY")
    try:
        ray.init(runtime_env={"env_vars": environment}, log_to_driver=False, include_dashboard=False)
        items = [{"file": file, "part": part} for file, part in parts]
        data = ray.data.from_items(items, override_num_blocks=-(-len(parts) // PARTS))
        done = data.map_batches(
            Worker,
            fn_constructor_args=(store, options, key),
            batch_size=PARTS,
            compute=ray.data.ActorPoolStrategy(size=options.workers),
            num_cpus=1,
        )
        progress.begin(total)
        for row in done.iter_rows():
            progress.answered(row["texts"], row["tokens"], row["cut"])
            progress.wrote(row["rows"], dict(row["refused"]))
    except (ray.exceptions.RayError, RuntimeError, ConnectionError) as error:  # of its start, too
        raise BackfillError(f"Ray: {str(error).strip().splitlines()[-1]}") from None
    finally:
        progress.end()
        ray.shutdown()
    progress.say(progress.summary())
