"""Starts the tritonserver of NVIDIA's image, once every TensorRT plan that it would load fits the machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tools import plans
from tools.command import Ports, add_triton_options, make_parser, server_arguments, switches


def main(arguments: Sequence[str] | None = None) -> int:
    """Becomes tritonserver; returns 1 with a sentence for every plan that does not fit."""
    parser = make_parser("tools.tritonserver", __doc__)
    add_triton_options(parser)
    options = parser.parse_args(arguments)
    folder = options.repository
    if isinstance(folder, Path) and (status := plans.main([*options.models, "--repository", str(folder)])):
        return status
    command = server_arguments(
        options.repository, options.models, options.host, Ports.of(options), switches(options)
    )
    return os.execvp("tritonserver", ["tritonserver", *command])  # noqa: S606


if __name__ == "__main__":
    sys.exit(main())
