"""Serves a model repository on this machine: real Triton and the gateway, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from aiohttp import web

from tools.shim import keys
from tools.shim.app import make_app
from tools.shim.upstream import Upstream
from tools.triton import EmbeddedTriton, Ports, ServerError, check_ports

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 120.0
DRAIN_SECONDS = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until told to stop; returns 1 with the cause when the server cannot start or dies."""
    options = parse(arguments)
    try:
        asyncio.run(serve(options, keys.load()))
    except (ServerError, keys.KeysError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.serve",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository", help="models")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["minilm", "minilm-rerank"],
        help="ensembles to serve; the first of a task answers calls that name no model",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--embed-port", type=int, default=8101, help="gateway, by convention /embed")
    parser.add_argument("--rerank-port", type=int, default=8102, help="gateway, by convention /rerank")
    parser.add_argument("--http-port", type=int, default=8200, help="Triton v2 over HTTP")
    parser.add_argument("--grpc-port", type=int, default=8201, help="Triton v2 over gRPC")
    parser.add_argument("--metrics-port", type=int, default=8202, help="Triton's metrics")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_SECONDS, help="seconds a call may take")
    parser.add_argument("--cache-mb", type=int, default=0, help="memory for the states of texts that come again")
    parser.add_argument("--work-folder", type=Path, default=ROOT / ".cache", help="log and backends")
    return parser.parse_args(arguments)


async def serve(options: argparse.Namespace, accepted: Collection[bytes]) -> None:
    """Runs Triton and the gateway, open to the `accepted` keys; raises ServerError when either cannot run."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    names = ("embed", "rerank", "http", "grpc", "metrics")
    check_models(options.repository, options.models)
    check_ports(options.host, {f"--{name}-port": getattr(options, f"{name}_port") for name in names})
    ports = Ports(options.http_port, options.grpc_port, options.metrics_port)
    triton = EmbeddedTriton(
        options.repository, options.models, options.host, ports, options.work_folder, options.cache_mb
    )
    stopped = asyncio.create_task(stop.wait())
    try:
        started = asyncio.create_task(triton.start())
        await asyncio.wait((started, stopped), return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            started.cancel()
            return
        await started
        async with Upstream(f"{options.host}:{ports.grpc}", options.models) as upstream:
            app = make_app(upstream, options.timeout, accepted)
            runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=DRAIN_SECONDS)
            await runner.setup()
            try:
                for port in (options.embed_port, options.rerank_port):
                    await web.TCPSite(runner, options.host, port).start()
                print(greeting(options, triton.log), flush=True)
                died = asyncio.create_task(triton.wait())
                await asyncio.wait((died, stopped), return_when=asyncio.FIRST_COMPLETED)
                if died.done():
                    raise ServerError(died.result())
                print("stopping: finishing what is under way", flush=True)
            finally:
                await runner.cleanup()
    finally:
        await triton.stop()
        stopped.cancel()


def check_models(repository: Path, models: Sequence[str]) -> None:
    """Raises ServerError when a model is not in the repository."""
    there = {path.parent.name for path in repository.glob("*/config.pbtxt")}
    for name in models:
        if name not in there:
            has = ", ".join(sorted(there)) or "no models"
            raise ServerError(f"no model {name!r} in {repository}, which has {has}: run `make build`")


def greeting(options: argparse.Namespace, log: Path) -> str:
    """Where things listen, and two calls that work."""
    host = "localhost" if options.host == "127.0.0.1" else options.host
    embed, rerank = f"http://{host}:{options.embed_port}", f"http://{host}:{options.rerank_port}"
    return f"""
serving {", ".join(options.models)}
  gateway   {embed}/embed  {rerank}/rerank  (also /health and /models)
  Triton    HTTP {host}:{options.http_port}  gRPC {host}:{options.grpc_port}  metrics {host}:{options.metrics_port}
  log       {log}

try:
  curl -s {embed}/embed -d '{{"texts": ["Hello, world"]}}'
  curl -s {rerank}/rerank -d '{{"query": "capital of France", "documents": ["Berlin", "Paris"]}}'

Ctrl-C stops everything"""


if __name__ == "__main__":
    sys.exit(main())
