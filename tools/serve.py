"""Serves a model repository on this machine: real Triton and the gateway, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import sys
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from build.catalog import served_name
from build.tasks import DOCUMENT_TASKS, Task
from tools.access import secret_file
from tools.command import (
    CHAT_PORT,
    LOOPBACK,
    Ports,
    ServerError,
    add_gateway_options,
    add_residency_options,
    add_triton_options,
    aliases,
    check_encoder_settings,
    make_parser,
    run,
    switches,
)
from tools.direct import is_local
from tools.ports import check_ports
from tools.shim import keys
from tools.shim.residency.control import Control
from tools.shim.residency.plan import Plan, defaults, task_in
from tools.shim.served_model import Absent
from tools.shim.server import GatewaySettings
from tools.shim.workers import serving
from tools.triton.embedded import EmbeddedTriton


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until told to stop; returns 1 with the cause when the server cannot start or dies."""
    parser = make_parser("tools.serve", __doc__, models=None)
    parser.add_argument("--triton-host", default=LOOPBACK, help="address for Triton's ports, which know no keys")
    parser.add_argument("--check", action="store_true", help="see whether the ports are free, and serve nothing")
    add_triton_options(parser)
    add_gateway_options(parser)
    add_residency_options(parser)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    kept = shlex.join(word for word in given if word != "--check")
    typed = f"{os.environ['TYPED']} " if os.environ.get("TYPED") else ""  # by make
    return run(partial(serve, options, lambda more: f'make serve {typed}ARGS="{f"{kept} {more}".strip()}"'))


async def serve(options: argparse.Namespace, again: Callable[[str], str], stop: asyncio.Event) -> None:
    """Runs Triton and the gateway, or names what would do `again`; raises ServerError when either cannot run."""
    check_encoder_settings()
    if options.check:
        check_ports(options, again)
        return
    accepted = keys.load()
    plan, start = None, options.models
    if isinstance(options.repository, Path):
        # As in `make serve MODEL=`, which is what they were built from.
        options.preload, options.pin = ([*map(served_name, names)] for names in (options.preload, options.pin))
        plan = Plan.of(options, options.repository)
        plan.check_memory()
        start, options.models = plan.start, plan.models if options.workers == 1 else plan.staying()
        options.chat_port = options.chat_port or (CHAT_PORT if plan.writes else None)
    elif options.models is None:
        raise ServerError(f"name the models of {options.repository} with --models: only Triton can look into it")
    aliases(options)
    check_ports(options, again)
    ports = Ports.of(options)
    if not is_local(f"{options.triton_host}:{ports.http}"):
        logging.getLogger(__name__).warning(
            "Triton's ports %d, %d and %d are open on %s, and know no keys: whoever reaches %d can end Triton",
            *(ports.http, ports.grpc, ports.metrics, options.triton_host, ports.http),
        )
    log = options.work_folder / f"triton-{ports.http}.log"
    triton = EmbeddedTriton(
        options.repository, start, options.triton_host, ports, options.work_folder, log, switches(options)
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
    address = f"{options.triton_host}:{options.grpc_port}"
    left_out, residency = triton.left_out, None
    absent = {n: Absent(cause, task_in(plan.repository, n) if plan else None) for n, cause in left_out.items()}
    if plan is not None and options.workers == 1:
        secret = secret_file(options.work_folder, options.http_port)
        control = Control(address, f"{options.triton_host}:{options.metrics_port}", secret)
        residency = plan.residency(control, left_out, triton.cause, triton.lost)
    settings = GatewaySettings(
        address,
        options.models,
        options.timeout,
        accepted,
        absent,
        aliases(options),
        options.allow_origin,
        options.drain_delay,
    )
    async with serving(settings, options, residency):
        loaded = [name for name in (options.models if plan is None else plan.start) if name not in left_out]
        others = [name for name in options.models if name not in loaded and name not in left_out]
        unnamed = {}
        if plan is not None:  # the gateway does not see the calls of the others
            others = [name for name in others if task_in(plan.repository, name) not in DOCUMENT_TASKS]
            unnamed = defaults(plan.repository, options.models)
        told = {residency.computes_in(name) for name in loaded} if residency else set()
        print(greeting(options, loaded, others, unnamed, sorted(filter(None, told)), log), flush=True)
        yield


def greeting(
    options: argparse.Namespace,
    loaded: Sequence[str],
    others: Sequence[str],
    unnamed: Mapping[Task, str],
    precisions: Sequence[str],
    log: Path,
) -> str:
    """What is served and in which precision, what answers calls without a name, where things listen, and calls."""
    host, triton = ("localhost" if one == LOOPBACK else one for one in (options.host, options.triton_host))
    embed, rerank = f"http://{host}:{options.embed_port}", f"http://{host}:{options.rerank_port}"
    chat = f"http://{host}:{options.chat_port}/v1/chat/completions" if options.chat_port else ""
    ask = '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    calls: dict[Task, str] = {
        "embed": f"""{embed}/embed -d '{{"texts": ["Hello, world"]}}'""",
        "rerank": f"""{rerank}/rerank -d '{{"query": "capital of France", "documents": ["Berlin", "Paris"]}}'""",
        "generate": f"{chat} -d '{ask}'",
    }
    tries = [call for task, call in calls.items() if unnamed.get(task) in loaded] or [f"{embed}/models"]
    lines = [f"serving {', '.join(loaded)}"]
    if others:
        lines += [f"  at their first call  {', '.join(others)}"]
    if unnamed:
        lines += [f"  without a name       {', '.join(f'{task}: {name}' for task, name in unnamed.items())}"]
    if precisions:
        lines += [
            f"  computed in          {' and '.join(precisions)} (ENCODER_PRECISION, fp32, bf16 or auto, decides)"
        ]
    gateway = "  ".join(filter(None, (f"{embed}/embed", f"{rerank}/rerank", chat)))
    ports = f"HTTP {triton}:{options.http_port}  gRPC {triton}:{options.grpc_port}"
    lines += [
        f"  gateway   {gateway}  (also /health, /models and /metrics)",
        f"  Triton    {ports}  metrics {triton}:{options.metrics_port}",
        f"  log       {log}",
        "\ntry:",
        *(f"  curl -s {call}" for call in tries),
        "\nCtrl-C stops everything",
    ]
    return "\n".join(["", *lines])


if __name__ == "__main__":
    sys.exit(main())
