"""Whether the files of a family are those that its build wrote."""

from __future__ import annotations

import json
from pathlib import Path

from build.errors import BuildError
from build.sources.files import sha256


def check_files(repository: Path, family: str) -> None:
    """Compares each file with its hash in the record of the family; raises BuildError with the first unlike one.

    The record is in the folder of the family's first ensemble, and comes last in a build.
    """
    record = repository / family / "build.json"
    if not record.exists():
        return
    try:
        outputs = json.loads(record.read_bytes())["outputs"].items()
    except (ValueError, LookupError, TypeError, AttributeError):
        raise BuildError(f"{record} is not what was built: build {family} again") from None
    for name, expected in outputs:
        file = repository / name
        if not file.is_file() or sha256(file) != expected:
            raise BuildError(f"{file} is not what was built: build {family} again")
