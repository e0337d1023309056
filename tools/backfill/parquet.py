"""Parquet files: vectors are a column of fixed_size_list<float>[D], their origin is metadata of the schema."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tools.backfill.errors import BackfillError
from tools.backfill.origin import Origin

METADATA = b"embedding_origin"

READ_ROWS = 256
"""Rows that are read at once: long texts must not come by thousands before they are counted."""


class Parquet:
    """As `Format` has it; the rows of a part are a pyarrow Table."""

    suffix, what = ".parquet", "Parquet"

    def count(self, path: Path) -> int:
        """Rows of a file."""
        return int(opened(path).metadata.num_rows)

    def parts(self, path: Path, rows: int, wanted: Collection[int] | None) -> Iterator[tuple[int, Any]]:
        """A file, so many rows at a time. Row groups that have nothing of what is wanted are not read."""
        file = opened(path)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        for number in range(-(-file.metadata.num_rows // rows)) if wanted is None else sorted(wanted):
            first, last = number * rows, min((number + 1) * rows, file.metadata.num_rows)
            groups = [i for i in range(len(sizes)) if starts[i] < last and starts[i + 1] > first]
            if groups:
                part = read_rows(file, groups, first - int(starts[groups[0]]), last - first)
                yield number, part

    def column(self, part: Any, name: str) -> list[Any] | None:
        """Values of a column; None where there is no such column."""
        found: list[Any] | None = part.column(name).to_pylist() if name in part.column_names else None
        return found

    def write(self, file: IO[bytes], part: Any, name: str, vectors: Sequence[Any], origin: Origin) -> None:
        """Rows, their vectors, and the origin in the metadata."""
        size = origin.dimensions
        there = np.array([vector is not None for vector in vectors], bool)
        numbers = np.zeros((len(vectors), size), np.float32)
        for i, vector in enumerate(vectors):
            if vector is not None:
                numbers[i] = vector
        column = pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), size, mask=pa.array(~there))
        table = part.append_column(name, column)
        metadata = {**(part.schema.metadata or {}), METADATA: origin.json().encode()}
        # Vectors have no repeated values that a dictionary would help with.
        pq.write_table(table.replace_schema_metadata(metadata), file, use_dictionary=part.column_names)

    def split(self, path: Path, name: str) -> tuple[Any, list[Any]]:
        """The rows, and the vectors under a `name`."""
        table = opened(path).read()
        if name not in table.column_names:
            raise BackfillError(f"{path} has no column {name!r}: name it with --vector, or remove the file")
        column = table.column(name).combine_chunks()
        size = column.type.list_size
        numbers = np.asarray(column.values, np.float32).reshape(-1, size) if len(column) else np.zeros((0, size))
        there = column.is_valid().to_pylist()
        vectors = [row if valid else None for row, valid in zip(numbers, there, strict=True)]
        return table.drop_columns([name]), vectors

    def equal(self, part: Any, other: Any) -> bool:
        """Whether two parts have the same rows. To pyarrow a NaN equals nothing, so the same bytes are enough."""
        return bool(part.equals(other) or content(part) == content(other))


def content(part: Any) -> bytes:
    """Its rows and types, as Arrow writes them."""
    table = part.replace_schema_metadata(None).combine_chunks()
    file = pa.BufferOutputStream()
    with pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return bytes(file.getvalue())


def opened(path: Path) -> Any:
    """A file; raises BackfillError where it is none of Parquet."""
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise BackfillError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def read_rows(file: Any, groups: list[int], skip: int, count: int) -> Any:
    """So many rows of some row groups, after those that are skipped; one batch in memory beside them."""
    batches, seen = [], 0
    for batch in file.iter_batches(READ_ROWS, row_groups=groups):
        low, high = max(0, skip - seen), min(batch.num_rows, skip + count - seen)
        if low < high:
            batches.append(batch.slice(low, high - low))
        seen += batch.num_rows
        if seen >= skip + count:
            break
    return pa.Table.from_batches(batches, file.schema_arrow)
