"""Compares the files of a family with what was built, and runs its graphs: `python -m build.check FAMILY ...`.

It runs them on this machine's CPU, in the engine that its runtime uses there. Graphs for a GPU and for TensorRT
are not run. What cannot run, gives numbers that are not finite, or gives a text another result beside other texts
than alone, ends a build with a sentence and never reaches a server. Each graph is fed as its runtime feeds it, by
its config.pbtxt: one token; a text as long as the window, or as BUDGET allows; texts of unlike lengths together.

A build runs this as a process of its own: a graph is data of somebody else's, and an engine may die of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from build.check.families import check
from build.check.files import check_files
from build.config import REPOSITORY
from build.errors import BuildError


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was not checked; returns 1 with the cause when a family cannot be served."""
    parser = argparse.ArgumentParser(prog="python -m build.check", description=str(__doc__).splitlines()[0])
    parser.add_argument("families", nargs="+", metavar="FAMILY", help="ensembles to check")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="the model repository")
    options = parser.parse_args(arguments)
    done: set[str] = set()
    # Whatever a graph asks for, no other process is to go for it.
    Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        for name in options.families:
            check_files(options.repository, name)
            for note in check(options.repository, name, done):
                print(note, flush=True)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
