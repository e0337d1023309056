"""Embeds a corpus and puts the vectors where retrieval reads them: rows of a Postgres table, files of a folder.

It is safe to kill and to start again: a second run does what is missing, changed or new. Vectors of two origins
are never mixed. Exit status: 0; 1 for an error; 3 where rows were refused (an empty text), which stops no others.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Awaitable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tools.backfill.client import GATEWAY, Client
from tools.backfill.errors import BackfillError
from tools.backfill.files import Columns, Files, Format
from tools.backfill.flow import Store, run
from tools.backfill.jsonl import JsonLines, Pipe
from tools.backfill.progress import Progress

REFUSED = 3
"""Exit status where some rows have no vector."""

SAMPLE = 512
"""Texts that a dry run embeds to see how fast the server is."""

EXAMPLES = """examples:
  python -m tools.backfill postgresql://me@localhost/rag --table chunks --text content --vector embedding
  python -m tools.backfill corpus/ vectors/ --text content
  python -m tools.backfill - < texts.jsonl > vectors.jsonl
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m tools.backfill",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = found.add_argument
    add("source", help="postgresql://..., a folder of .parquet or .jsonl, or - for JSON lines of stdin to stdout")
    add("output", nargs="?", type=Path, help="folder to write the vectors into, where the source is a folder")
    add("--table", help="table of Postgres, as SCHEMA.TABLE where needed")
    add("--id", default="id", help="column that names a row (default: id)")
    add("--text", default="text", help="column to embed (default: text)")
    add("--vector", default="embedding", help="column for the vectors (default: embedding)")
    add("--where", help="SQL that picks rows of the table")
    add("--into", metavar="TABLE", help="write vectors into a table of their own (id, VECTOR), made where missing")
    add("--index", action="store_true", help="build pgvector's HNSW index afterwards")
    add("--url", nargs="+", default=[GATEWAY], help=f"gateways (default: {GATEWAY})")
    add("--model", help="name of the model (default: the first that embeds)")
    add(
        "--prompt",
        help="name of the prompt put before each text, or none (default: document, where the model has it)",
    )
    add("--dimensions", type=int, help="cut vectors to this many dimensions, where the model was trained for that")
    add("--calls", type=int, default=4, help="calls at once, to each gateway (default: 4)")
    add(
        "--replace",
        action="store_true",
        help="embed again the rows whose vectors come from another model, build or prompt",
    )
    add("--dry-run", action="store_true", help="count what is to be done and estimate how long it takes")
    add("--refused", type=Path, metavar="FILE", help="append id and reason of each refused row, as JSON lines")
    add("--part-rows", type=int, default=4096, help="rows of an output file (default: 4096)")
    add(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="where the work runs: local (default), or ray: on a Ray cluster (RAY_ADDRESS), for Parquet only",
    )
    add("--workers", type=int, default=2, help="workers of ray, one CPU each (default: 2)")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the command line says; returns the exit status."""
    options = parser().parse_args(arguments)
    progress = Progress(options.refused)
    try:
        check(options)
        asyncio.run(stoppable(backfill(options, progress)))
    except BackfillError as error:
        progress.end()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        progress.end()
        print("stopped: run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:
        progress.end()
        print(
            f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}", file=sys.stderr
        )
        return 1
    return REFUSED if progress.refused else 0


async def stoppable(work: Awaitable[None]) -> None:
    """Waits for `work`, which SIGTERM ends as Ctrl-C does."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await task


def check(options: argparse.Namespace) -> None:
    """Raises BackfillError for options that do not go together."""
    is_table = is_postgres(options.source)
    for name in ("dimensions", "calls", "part_rows", "workers"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise BackfillError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if is_table and options.table is None:
        raise BackfillError("name the table with --table")
    if not is_table and (used := [name for name in ("table", "where", "into", "index") if getattr(options, name)]):
        raise BackfillError(f"--{used[0]} is for Postgres: begin with a URL such as postgresql://localhost/mydb")
    if is_table or options.source == "-":
        if options.output is not None:
            raise BackfillError(f"vectors go back to where the texts are from: leave {options.output} out")
    elif options.output is None:
        raise BackfillError("name the folder that the vectors go to, behind that of the texts")
    elif not Path(options.source).exists():
        raise BackfillError(f"there is no folder or file {options.source}")
    elif Path(options.source).resolve() == options.output.resolve():
        raise BackfillError("vectors go into a folder of their own: name another than that of the texts")
    if options.engine == "ray":
        check_ray(options.source)
    if options.refused is not None:
        options.refused.open("a").close()
    key = os.environ.get("GATEWAY_API_KEY", "")
    if not (key.isascii() and key.isprintable()):
        raise BackfillError("GATEWAY_API_KEY holds what no header may: a line break, or letters beyond ASCII")


def check_ray(source: str) -> None:
    """Raises BackfillError where a cluster cannot do what is asked."""
    what = "a table" if is_postgres(source) else "a pipe" if source == "-" else format_of(Path(source)).what
    if what != "Parquet":
        alone = "" if source == "-" else ", and share it by the same command on several machines"
        raise BackfillError(f"--engine ray does Parquet and not {what}: leave it out{alone}")
    if importlib.util.find_spec("ray") is None:
        raise BackfillError("Ray is not installed: run `make .venv-ray/ray.lock`, and .venv-ray/bin/python")


def is_postgres(source: str) -> bool:
    """Whether it is a URL or a list of settings of libpq's."""
    words = ("dbname=", "host=", "service=")
    return source.startswith(("postgresql://", "postgres://")) or any(word in source for word in words)


async def backfill(options: argparse.Namespace, progress: Progress) -> None:
    """The whole job."""
    key = os.environ.get("GATEWAY_API_KEY")
    async with Client(
        options.url, options.model, options.prompt, options.dimensions, key, options.calls, progress
    ) as client:
        progress.say(f"vectors of {client.origin}")
        if is_postgres(options.source):
            await table(options, client, progress)
        elif options.source == "-":
            if options.dry_run:
                raise BackfillError("stdin can be read once: leave --dry-run out")
            pipe = Pipe(sys.stdin.buffer, sys.stdout.buffer, options.id, options.text, options.vector)
            await go(pipe, client, progress, None)
        else:
            await folder(options, client, progress)


async def go(store: Store, client: Client, progress: Progress, total: int | None) -> None:
    """Runs the flow with its bar, and tells the summary."""
    progress.begin(total)
    try:
        await run(store, client, progress)
    finally:
        progress.end()
    progress.say(progress.summary())


async def table(options: argparse.Namespace, client: Client, progress: Progress) -> None:
    """Rows of Postgres."""
    from tools.backfill.connection import connected, told  # psycopg is installed for the backfill alone
    from tools.backfill.postgres import Postgres
    from tools.backfill.table import Table

    with contextlib.ExitStack() as stack:
        reader, writer = (stack.enter_context(connected(options.source)) for _ in range(2))
        if options.dry_run:
            stack.enter_context(reader.transaction(force_rollback=True))  # of a table --into
        with told():
            found = Table.find(reader, options, client.origin.dimensions, make=True)
        if options.index:
            found.check_indexable(client.origin.dimensions)
        store = Postgres(reader, writer, found, client.origin)
        if options.dry_run:
            await asyncio.to_thread(store.look)
            rows, size, blank = await asyncio.to_thread(store.pending)
            await estimate(client, progress, rows - blank, size, await asyncio.to_thread(store.sample, SAMPLE))
            return
        counts = await asyncio.to_thread(store.begin, options.replace)
        progress.say(f"{counts.rows} rows, {counts.done} of them done before")
        if found.index:
            progress.say(
                f"{found.index} is kept in step with every vector, which costs several times the write: for more "
                "than a tenth of the rows, drop it first and add --index"
            )
        await go(store, client, progress, counts.rows - counts.done)
        store.end()
        if options.index and not found.index:
            progress.say(f"built: {await asyncio.to_thread(store.build_index)}")


async def folder(options: argparse.Namespace, client: Client, progress: Progress) -> None:
    """Files of a folder."""
    source = Path(options.source)
    store = Files(
        source,
        options.output,
        format_of(source),
        Columns(options.id, options.text, options.vector),
        options.part_rows,
        client.origin,
    )
    if options.dry_run:
        await look(store, client, progress)
        return
    total = store.rows()
    store.begin(options.replace)
    if options.engine == "ray":
        from tools.backfill import cluster  # installed for it alone

        cluster.run(store, options, progress, total)
    else:
        await go(store, client, progress, total)


async def look(store: Files, client: Client, progress: Progress) -> None:
    """What a dry run finds in a folder."""
    rows = size = 0
    sample: list[str] = []
    for part, places in store.pending():
        texts = store.texts(part, places)
        rows += len(texts)
        size += sum(len(text.encode("utf-8", "replace")) for text in texts)
        sample += texts[:: max(1, len(texts) // 64)][: SAMPLE - len(sample)]
    await estimate(client, progress, rows, size, sample)


async def estimate(client: Client, progress: Progress, rows: int, size: int, sample: Sequence[str]) -> None:
    """Embeds a sample, keeps nothing, and says what the rest would take."""
    import numpy as np

    if not rows:
        progress.say("nothing is to be done")
        return
    vectors = np.zeros((len(sample), client.origin.dimensions), np.float32)
    refused: dict[int, str] = {}
    progress.begin(None)
    await client.embed(sample, range(len(sample)), vectors, refused)
    progress.end()
    seconds = progress.seconds
    tokens = progress.tokens / max(1, progress.texts)
    hours = rows * seconds / len(sample) / 3600
    progress.say(
        f"{rows} texts of {size / rows:.0f} bytes are to be done; {len(sample)} of them took {seconds:.1f} s, "
        f"{tokens:.0f} tokens each: about {rows * tokens:.3g} tokens, {hours:.1f} hours, "
        f"{rows * client.origin.dimensions * 4 / 1e9:.2f} GB of vectors"
    )


def format_of(source: Path) -> Format:
    """By what the folder holds; raises BackfillError where it is neither or both."""
    names: Iterable[Any] = source.rglob("*") if source.is_dir() else [source]
    suffixes = {path.suffix for path in names} & {".parquet", ".jsonl"}
    if len(suffixes) != 1:
        what = "both .parquet and .jsonl" if suffixes else "neither .parquet nor .jsonl"
        raise BackfillError(f"{source} has {what}: give a folder of one kind")
    if suffixes == {".jsonl"}:
        return JsonLines()
    from tools.backfill.parquet import Parquet  # installed for the backfill alone

    return Parquet()


if __name__ == "__main__":
    sys.exit(main())
