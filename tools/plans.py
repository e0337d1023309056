"""Checks TensorRT plans before Triton is asked to load them: `python -m tools.plans ENSEMBLE ...`.

Prints a sentence for every plan that is missing, stale, damaged or of another machine, and ends with status 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from build.errors import BuildError
from build.plans.plan import problems

ROOT = Path(__file__).parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints every problem; returns 1 when there is one."""
    parser = argparse.ArgumentParser(prog="python -m tools.plans", description=str(__doc__).splitlines()[0])
    parser.add_argument("ensembles", nargs="+", metavar="ENSEMBLE", help="ensembles that are going to be served")
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository", help="the model repository")
    options = parser.parse_args(arguments)
    try:
        found = list(problems(options.repository, options.ensembles))
    except BuildError as error:
        found = [str(error)]
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
