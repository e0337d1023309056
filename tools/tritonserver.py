"""Starts the tritonserver of NVIDIA's image with the models whose TensorRT plans fit the machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tools import access
from tools.check_plans import fits
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
        models = [name for name in models if fits(folder, [name])]
    if not models:
        return 1
    ports = Ports.of(options)
    secret = access.make_secret(access.secret_file(options.work_folder, ports.http))
    command = server_arguments(folder, models, options.host, ports, switches(options), secret)
    environment = access.passed_on(os.environ, with_object_store=not isinstance(folder, Path))
    return os.execvpe("tritonserver", ["tritonserver", *command], environment)  # noqa: S606


if __name__ == "__main__":
    sys.exit(main())
