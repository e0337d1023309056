"""Starts the tritonserver of NVIDIA's image with the models whose TensorRT plans fit the machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tools import plans
from tools.command import Ports, add_triton_options, make_parser, server_arguments, switches


def main(arguments: Sequence[str] | None = None) -> int:
    """Becomes tritonserver, with the models whose plans fit; returns 1 where there are none.

    A sentence on stderr names every plan that does not fit.
    """
    parser = make_parser("tools.tritonserver", __doc__)
    add_triton_options(parser)
    options = parser.parse_args(arguments)
    folder, models = options.repository, options.models
    if isinstance(folder, Path):
        models = [name for name in models if plans.main([name, "--repository", str(folder)]) == 0]
    if not models:
        return 1
    command = server_arguments(options.repository, models, options.host, Ports.of(options), switches(options))
    return os.execvp("tritonserver", ["tritonserver", *command])  # noqa: S606


if __name__ == "__main__":
    sys.exit(main())
