"""Fills the model repository: `python -m build.make [MODEL ...]`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from build import catalog, family
from build.errors import BuildError

ROOT = Path(__file__).parent.parent
MODEL_REPOSITORY = ROOT / "model_repository"
CACHE = ROOT / ".cache"
DEFAULT_MODEL = "minilm"


def main(arguments: list[str] | None = None) -> int:
    """Builds the models named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m build.make", description=__doc__)
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        default=[DEFAULT_MODEL],
        help=f"catalog names, of: {', '.join(catalog.names())} (default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--repository",
        type=Path,
        default=MODEL_REPOSITORY,
        help="the model repository to fill (default: model_repository/)",
    )
    options = parser.parse_args(arguments)
    try:
        for name in options.models:
            build_one(name, options.repository)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def build_one(name: str, repository: Path) -> None:
    """Builds one catalog entry and says what came of it."""
    started = time.monotonic()
    if family.build(catalog.load(name), repository, CACHE):
        print(f"{name}: built into {repository} in {time.monotonic() - started:.1f} s", flush=True)
    else:
        print(f"{name}: up to date, nothing to do", flush=True)


if __name__ == "__main__":
    sys.exit(main())
