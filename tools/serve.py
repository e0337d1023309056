"""Serves a model repository on this machine: real Triton and the gateway, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from build.config import read_config
from build.errors import BuildError
from tools.command import (
    Ports,
    add_gateway_options,
    add_triton_options,
    aliases,
    check_ports,
    make_parser,
    run,
    switches,
)
from tools.shim import keys
from tools.shim.server import listening
from tools.shim.upstream import Absent, Task
from tools.triton import EmbeddedTriton


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until told to stop; returns 1 with the cause when the server cannot start or dies."""
    parser = make_parser("tools.serve", __doc__)
    add_triton_options(parser)
    add_gateway_options(parser)
    return run(partial(serve, parser.parse_args(arguments)))


async def serve(options: argparse.Namespace, stop: asyncio.Event) -> None:
    """Runs Triton and the gateway; raises ServerError when either cannot run."""
    accepted = keys.load()
    check_ports(options)
    aliases(options)
    ports = Ports.of(options)
    log = options.work_folder / f"triton-{ports.http}.log"
    triton = EmbeddedTriton(
        options.repository, options.models, options.host, ports, options.work_folder, log, switches(options)
    )
    await triton.run(stop, gateway(options, accepted, triton.left_out, log))


@asynccontextmanager
async def gateway(
    options: argparse.Namespace, accepted: Collection[bytes], left_out: Mapping[str, str], log: Path
) -> AsyncIterator[None]:
    """The gateway in front of the Triton beside it, and what the terminal says of it."""
    address, ports = f"{options.host}:{options.grpc_port}", (options.embed_port, options.rerank_port)
    absent = {name: Absent(cause, task_of(options.repository, name)) for name, cause in left_out.items()}
    async with listening(
        address,
        options.models,
        options.host,
        ports,
        options.timeout,
        accepted,
        absent,
        aliases(options),
        options.allow_origin,
    ):
        served = [name for name in options.models if name not in left_out]
        print(greeting(options, served, log), flush=True)
        yield
        print("stopping: finishing what is under way", flush=True)


def task_of(repository: Path | str, model: str) -> Task | None:
    """What an ensemble is for, where its configuration can be read."""
    if isinstance(repository, Path):
        with suppress(BuildError):
            outputs = {output.name for output in read_config(repository, model).output}
            return "embed" if "embeddings" in outputs else "rerank"
    return None


def greeting(options: argparse.Namespace, served: Sequence[str], log: Path) -> str:
    """Where things listen, and two calls that work."""
    host = "localhost" if options.host == "127.0.0.1" else options.host
    embed, rerank = f"http://{host}:{options.embed_port}", f"http://{host}:{options.rerank_port}"
    return f"""
serving {", ".join(served)}
  gateway   {embed}/embed  {rerank}/rerank  (also /health, /models and /metrics)
  Triton    HTTP {host}:{options.http_port}  gRPC {host}:{options.grpc_port}  metrics {host}:{options.metrics_port}
  log       {log}

try:
  curl -s {embed}/embed -d '{{"texts": ["Hello, world"]}}'
  curl -s {rerank}/rerank -d '{{"query": "capital of France", "documents": ["Berlin", "Paris"]}}'

Ctrl-C stops everything"""


if __name__ == "__main__":
    sys.exit(main())
