"""Runs the gateway alone, in front of a Triton that runs elsewhere, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from functools import partial

from tools.command import Ports, add_gateway_options, aliases, check_ports, make_parser, run
from tools.shim import keys
from tools.shim.server import listening


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until told to stop; returns 1 with the cause when it cannot."""
    parser = make_parser("tools.shim", __doc__)
    add_gateway_options(parser)
    parser.add_argument("--triton", default=f"127.0.0.1:{Ports.grpc}", help="host:port of Triton's gRPC")
    return run(partial(serve, parser.parse_args(arguments)))


async def serve(options: argparse.Namespace, stop: asyncio.Event) -> None:
    """Answers 503 for as long as Triton does not: it may come later, and go and come back."""
    accepted = keys.load()
    check_ports(options)
    ports = (options.embed_port, options.rerank_port)
    async with listening(
        options.triton,
        options.models,
        options.host,
        ports,
        options.timeout,
        accepted,
        aliases=aliases(options),
        origins=options.allow_origin,
    ):
        print(f"gateway on {options.host}:{ports[0]} and :{ports[1]}, Triton at {options.triton}", flush=True)
        await stop.wait()
        print("stopping: finishing what is under way", flush=True)


if __name__ == "__main__":
    sys.exit(main())
