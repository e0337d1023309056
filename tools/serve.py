"""Serves a model repository on this machine: real Triton and the gateway, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from build import gpu
from build.catalog import TASKS, served_name
from build.config import read_config
from build.errors import BuildError
from build.memory import free_memory
from tools.access import secret_file
from tools.command import (
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
from tools.shim.control import Control
from tools.shim.families import Family, Task, ensembles, families, hint
from tools.shim.families import task_of as families_task_of
from tools.shim.residency import Residency
from tools.shim.server import listening
from tools.shim.upstream import Absent
from tools.triton import EmbeddedTriton, check_models

SHARE = 0.9
"""Of the memory that is free at the start, for models."""


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
    check_ports(options)
    plan = Plan.of(options) if isinstance(options.repository, Path) else None
    start = options.models if plan is None else plan.start
    aliases(options)
    ports = Ports.of(options)
    log = options.work_folder / f"triton-{ports.http}.log"
    triton = EmbeddedTriton(
        options.repository, start, options.host, ports, options.work_folder, log, switches(options)
    )
    await triton.run(stop, gateway(options, accepted, triton, log, plan))


@dataclass(frozen=True)
class Plan:
    """What is loaded when."""

    start: list[str]
    """At once."""
    families: list[Family]
    preload: list[str]
    budget: int

    @classmethod
    def of(cls, options: argparse.Namespace) -> Plan:
        """What the options say, which get the names of all models; raises ServerError where there is none."""
        repository = options.repository
        first = [served_name(name) for name in (*options.pin, *options.preload)]
        if options.models is None:
            there = ensembles(repository)
            if not there:
                raise ServerError(f"there is no model in {repository}: run `make build`")
            of_tasks = ([name for name in there if task_of(repository, name) == task] for task in TASKS)
            preload = first or [names[0] for names in of_tasks if names]
            named = [*dict.fromkeys(name for name in (*preload, *there) if name in there)]
            options.models = [name for family in families(repository, named) for name in family.ensembles]
        else:
            preload = first or options.models
        check_models(repository, [*options.models, *preload])
        found = families(repository, options.models)
        on_gpu = any(family.on_gpu for family in found)
        free = gpu.room(gpu.cards()) if on_gpu else free_memory()
        budget = options.memory or int(SHARE * (free or free_memory()))
        start: list[str] = []
        left = budget
        for family in found:
            size = hint(repository, family) or family.estimate
            if not set(preload).isdisjoint(family.ensembles) and size <= left:
                left -= size
                start += family.ensembles
        return cls(start or list(found[0].ensembles), found, preload, budget)


@asynccontextmanager
async def gateway(
    options: argparse.Namespace,
    accepted: Collection[bytes],
    triton: EmbeddedTriton,
    log: Path,
    plan: Plan | None,
) -> AsyncIterator[None]:
    """The gateway in front of the Triton beside it, and what the terminal says of it."""
    address, ports = f"{options.host}:{options.grpc_port}", (options.embed_port, options.rerank_port)
    left_out = triton.left_out
    absent = {name: Absent(cause, task_of(options.repository, name)) for name, cause in left_out.items()}
    residency = None
    if plan is not None:
        secret = secret_file(options.work_folder, options.http_port)
        residency = Residency(
            Control(address, f"{options.host}:{options.metrics_port}", secret),
            options.repository,
            plan.families,
            plan.budget,
            plan.preload,
            options.pin,
            options.keep_alive,
            left_out,
            triton.cause,
            triton.lost,
        )
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
        residency,
    ):
        loaded = [name for name in (options.models if plan is None else plan.start) if name not in left_out]
        others = [name for name in options.models if name not in loaded and name not in left_out]
        print(greeting(options, loaded, others, log), flush=True)
        yield
        print("stopping: finishing what is under way", flush=True)


def task_of(repository: Path | str, model: str) -> Task | None:
    """What an ensemble is for, where its configuration can be read."""
    if isinstance(repository, Path):
        with suppress(BuildError):
            return families_task_of(read_config(repository, model))
    return None


def greeting(options: argparse.Namespace, loaded: Sequence[str], others: Sequence[str], log: Path) -> str:
    """What is served, where things listen, and two calls that work."""
    host = "localhost" if options.host == "127.0.0.1" else options.host
    embed, rerank = f"http://{host}:{options.embed_port}", f"http://{host}:{options.rerank_port}"
    later = f"\n  at their first call  {', '.join(others)}" if others else ""
    return f"""
serving {", ".join(loaded)}{later}
  gateway   {embed}/embed  {rerank}/rerank  (also /health, /models and /metrics)
  Triton    HTTP {host}:{options.http_port}  gRPC {host}:{options.grpc_port}  metrics {host}:{options.metrics_port}
  log       {log}

try:
  curl -s {embed}/embed -d '{{"texts": ["Hello, world"]}}'
  curl -s {rerank}/rerank -d '{{"query": "capital of France", "documents": ["Berlin", "Paris"]}}'

Ctrl-C stops everything"""


if __name__ == "__main__":
    sys.exit(main())
