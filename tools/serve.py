"""Serves a model repository on this machine: real Triton and the gateway, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from build.catalog import served_name
from tools.access import secret_file
from tools.command import (
    CHAT_PORT,
    Ports,
    ServerError,
    add_gateway_options,
    add_residency_options,
    add_triton_options,
    aliases,
    check_ports,
    make_parser,
    run,
    switches,
)
from tools.shim import keys
from tools.shim.residency.control import Control
from tools.shim.residency.families import DOCUMENTS
from tools.shim.residency.plan import Plan, task_in
from tools.shim.server import GatewaySettings
from tools.shim.upstream import Absent
from tools.shim.workers import serving
from tools.triton.embedded import EmbeddedTriton


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until told to stop; returns 1 with the cause when the server cannot start or dies."""
    parser = make_parser("tools.serve", __doc__, models=None)
    add_triton_options(parser)
    add_gateway_options(parser)
    add_residency_options(parser)
    return run(partial(serve, parser.parse_args(arguments)))


async def serve(options: argparse.Namespace, stop: asyncio.Event) -> None:
    """Runs Triton and the gateway; raises ServerError when either cannot run."""
    accepted = keys.load()
    plan, start = None, options.models
    if isinstance(options.repository, Path):
        # As in `make serve MODEL=`, which is what they were built from.
        options.preload, options.pin = ([*map(served_name, names)] for names in (options.preload, options.pin))
        plan = Plan.of(options, options.repository)
        start, options.models = plan.start, plan.models if options.workers == 1 else plan.staying()
        options.chat_port = options.chat_port or (CHAT_PORT if plan.writes else None)
    elif options.models is None:
        raise ServerError(f"name the models of {options.repository} with --models: only Triton can look into it")
    aliases(options)
    check_ports(options)
    ports = Ports.of(options)
    log = options.work_folder / f"triton-{ports.http}.log"
    triton = EmbeddedTriton(
        options.repository, start, options.host, ports, options.work_folder, log, switches(options)
    )
    await triton.run(stop, gateway(options, accepted, triton, log, plan))


@asynccontextmanager
async def gateway(
    options: argparse.Namespace,
    accepted: Collection[bytes],
    triton: EmbeddedTriton,
    log: Path,
    plan: Plan | None,
) -> AsyncIterator[None]:
    """The gateway in front of the Triton beside it, and what the terminal says of it."""
    address = f"{options.host}:{options.grpc_port}"
    left_out, residency = triton.left_out, None
    absent = {n: Absent(cause, task_in(plan.repository, n) if plan else None) for n, cause in left_out.items()}
    if plan is not None and options.workers == 1:
        secret = secret_file(options.work_folder, options.http_port)
        control = Control(address, f"{options.host}:{options.metrics_port}", secret)
        residency = plan.residency(control, left_out, triton.cause, triton.lost)
    settings = GatewaySettings(
        address, options.models, options.timeout, accepted, absent, aliases(options), options.allow_origin
    )
    async with serving(settings, options, residency):
        loaded = [name for name in (options.models if plan is None else plan.start) if name not in left_out]
        others = [name for name in options.models if name not in loaded and name not in left_out]
        if plan is not None:  # the gateway does not see the calls of the others
            others = [name for name in others if task_in(plan.repository, name) not in DOCUMENTS]
        print(greeting(options, loaded, others, log), flush=True)
        yield
        print("stopping: finishing what is under way", flush=True)


def greeting(options: argparse.Namespace, loaded: Sequence[str], others: Sequence[str], log: Path) -> str:
    """What is served, where things listen, and two calls that work."""
    host = "localhost" if options.host == "127.0.0.1" else options.host
    embed, rerank = f"http://{host}:{options.embed_port}", f"http://{host}:{options.rerank_port}"
    chat = f"http://{host}:{options.chat_port}/v1/chat/completions" if options.chat_port else ""
    ask = '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    try_chat = f"\n  curl -s {chat} -d '{ask}'" if chat else ""
    gateway = "  ".join(filter(None, (f"{embed}/embed", f"{rerank}/rerank", chat)))
    later = f"\n  at their first call  {', '.join(others)}" if others else ""
    return f"""
serving {", ".join(loaded)}{later}
  gateway   {gateway}  (also /health, /models and /metrics)
  Triton    HTTP {host}:{options.http_port}  gRPC {host}:{options.grpc_port}  metrics {host}:{options.metrics_port}
  log       {log}

try:
  curl -s {embed}/embed -d '{{"texts": ["Hello, world"]}}'
  curl -s {rerank}/rerank -d '{{"query": "capital of France", "documents": ["Berlin", "Paris"]}}'{try_chat}

Ctrl-C stops everything"""


if __name__ == "__main__":
    sys.exit(main())
