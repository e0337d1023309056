"""Runs the gateway alone, in front of a Triton that runs elsewhere, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tools.command import (
    DEFAULT_MODELS,
    Ports,
    ServerError,
    add_gateway_options,
    add_residency_options,
    aliases,
    make_parser,
    run,
)
from tools.ports import check_ports
from tools.shim import keys
from tools.shim.residency.control import Control
from tools.shim.residency.plan import Plan
from tools.shim.server import GatewaySettings
from tools.shim.workers import serving


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until told to stop; returns 1 with the cause when it cannot."""
    parser = make_parser("tools.shim", __doc__, models=None)
    add_gateway_options(parser)
    add_residency_options(parser)
    parser.add_argument("--triton", default=f"127.0.0.1:{Ports.grpc}", help="host:port of Triton's gRPC")
    parser.add_argument(
        "--repository",
        type=Path,
        help="Triton's model repository: its models are loaded at their first call (default: none; Triton has "
        "loaded those of --models)",
    )
    parser.add_argument(
        "--secret-file",
        type=Path,
        help="file with the secret of Triton's start; --repository needs it (default: none)",
    )
    parser.add_argument(
        "--metrics",
        default="",
        help=f"host:port of Triton's metrics (default: port {Ports.metrics} of the host of --triton)",
    )
    return run(partial(serve, parser.parse_args(arguments)))


async def serve(options: argparse.Namespace, stop: asyncio.Event) -> None:
    """Answers 503 for as long as Triton does not: it may come later, and go and come back."""
    accepted = keys.load()
    check_ports(options, "python -m tools.shim {}".format)
    residency = None
    if options.repository is not None:
        if options.secret_file is None:
            raise ServerError("--repository needs --secret-file: Triton's secret is what models are loaded with")
        plan = Plan.of(options, options.repository)
        options.models = plan.models
        if options.workers > 1:
            options.models = plan.staying()
        else:
            metrics = options.metrics or f"{options.triton.rpartition(':')[0]}:{Ports.metrics}"
            residency = plan.residency(Control(options.triton, metrics, options.secret_file))
    elif options.models is None:
        options.models = DEFAULT_MODELS
    settings = GatewaySettings(
        options.triton,
        options.models,
        options.timeout,
        accepted,
        aliases=aliases(options),
        origins=options.allow_origin,
        drain_delay=options.drain_delay,
    )
    async with serving(settings, options, residency):
        ports = f"{options.host}:{options.embed_port} and :{options.rerank_port}"
        print(f"gateway on {ports}, Triton at {options.triton}", flush=True)
        await stop.wait()


if __name__ == "__main__":
    sys.exit(main())
