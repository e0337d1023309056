"""Runs the embedded Triton alone, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Sequence
from functools import partial

from tools.command import Ports, add_triton_options, check_encoder_settings, make_parser, run, switches
from tools.ports import check_ports
from tools.triton.embedded import EmbeddedTriton


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves, its log on stderr, until told to stop; returns 1 with the cause when it cannot or dies."""
    parser = make_parser("tools.triton", __doc__)
    add_triton_options(parser)
    return run(partial(serve, parser.parse_args(arguments)))


async def serve(options: argparse.Namespace, stop: asyncio.Event) -> None:
    """Runs Triton; raises ServerError when it cannot run."""
    check_encoder_settings()
    check_ports(options, "python -m tools.triton {}".format)
    ports = Ports.of(options)
    triton = EmbeddedTriton(
        options.repository, options.models, options.host, ports, options.work_folder, None, switches(options)
    )
    await triton.run(stop, contextlib.nullcontext())


if __name__ == "__main__":
    sys.exit(main())
