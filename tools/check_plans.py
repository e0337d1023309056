"""Checks TensorRT plans before Triton is asked to load them: `python -m tools.check_plans ENSEMBLE ...`.

Prints a sentence for every plan that is missing, stale, damaged or of another machine, and ends with status 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from build.config import REPOSITORY
from build.errors import BuildError
from build.plans.plan import problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints every problem; returns 1 when there is one."""
    parser = argparse.ArgumentParser(prog="python -m tools.check_plans", description=str(__doc__).splitlines()[0])
    parser.add_argument("ensembles", nargs="+", metavar="ENSEMBLE", help="ensembles that are going to be served")
    parser.add_argument(
        "--repository", type=Path, default=REPOSITORY, help="the model repository (default: model_repository)"
    )
    options = parser.parse_args(arguments)
    return 0 if fits(options.repository, options.ensembles) else 1


def fits(repository: Path, ensembles: Sequence[str]) -> bool:
    """Whether the plans of some ensembles fit this machine; a sentence on stderr for every one that does not."""
    try:
        found = list(problems(repository, ensembles))
    except BuildError as error:
        found = [str(error)]
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return not found


if __name__ == "__main__":
    sys.exit(main())
