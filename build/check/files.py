"""Whether the files of a family are those that its build wrote."""

from __future__ import annotations

import json
from pathlib import Path

from build.config import RECORD
from build.errors import BuildError
from build.sources.files import sha256


def check_files(repository: Path, family: str) -> None:
    """Compares each file with its hash in the record of the family; raises BuildError with the first unlike one.

    The record is in the folder of the family's first ensemble, of which others may have been built with it. It
    comes last in a build.
    """
    for record in sorted(repository.glob(f"*/{RECORD}"), key=lambda path: path.parent.name != family):
        try:
            outputs = dict[str, str](json.loads(record.read_bytes())["outputs"])
        except (ValueError, LookupError, TypeError):
            if record.parent.name == family:
                raise BuildError(f"{record} is not what was built: build {family} again") from None
            continue
        if f"{family}/config.pbtxt" in outputs:
            break
    else:
        return
    for name, expected in outputs.items():
        file = repository / name
        if not file.is_file() or sha256(file) != expected:
            raise BuildError(f"{file} is not what was built: build {record.parent.name} again")
