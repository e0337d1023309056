"""What the serving commands share: how they are stopped, how they fail, and the options of more than one."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.access import restrictions
from tools.option_types import alias, delay, port, repository, seconds, size, trace_url, workers

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 120.0
TRITON_DRAIN_SECONDS = 10
"""How long Triton may finish its direct callers' requests when it is told to stop; the gateway has drained."""


LOOPBACK = "127.0.0.1"
PR_SET_PDEATHSIG = 1

DEAD_STEP = "is not healthy"
"""What Triton says of a Python backend's process that has died."""

DEFAULT_MODELS = ["minilm", "minilm-rerank"]

EMBED_PORT, RERANK_PORT, CHAT_PORT = 8101, 8102, 8103
"""Where the gateway listens, by convention for one route each."""


ENCODER_PRECISIONS = ("fp32", "bf16")
"""What `build/steps/onnx_runner.py` can be told to compute in."""

log = logging.getLogger(__name__)


class ServerError(Exception):
    """The server cannot start or has died; the message says why and what to change."""


@dataclass(frozen=True)
class Ports:
    """Where Triton listens."""

    http: int = 8200
    grpc: int = 8201
    metrics: int = 8202

    @classmethod
    def of(cls, options: argparse.Namespace) -> Ports:
        """The ports that the command line names."""
        return cls(options.http_port, options.grpc_port, options.metrics_port)


def run(serve: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> int:
    """Runs `serve` with the event that Ctrl-C and SIGTERM set, and cancels it at a second Ctrl-C.

    Returns 1 then, and where `serve` raises a ServerError, whose cause it prints.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z"
    )

    async def main() -> None:
        stop, serving = asyncio.Event(), asyncio.current_task()
        assert serving is not None

        def interrupt() -> None:
            if stop.is_set():
                serving.cancel()
            stop.set()

        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)
        # A supervisor may send this one twice: to all processes, and to each by its parent.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await serve(stop)

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        log.warning("stopped at once, as a second Ctrl-C asks for")
        return 1
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def die_with_parent() -> None:
    """Has a process end with the one that starts it, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def ending(status: int) -> str:
    """How a process ended, by its status as `subprocess` has it."""
    if status >= 0:
        return f"exited with status {status}"
    known = [number.name for number in signal.Signals if number == -status]
    memory = "; dmesg says whether memory ran out" if -status == signal.SIGKILL else ""
    return f"was killed ({known[0] if known else f'signal {-status}'}{memory})"


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default of each option, but for those whose help tells it in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if "(default:" in (action.help or "") else super()._get_help_string(action)


def make_parser(
    module: str, description: str | None, models: Sequence[str] | None = DEFAULT_MODELS
) -> argparse.ArgumentParser:
    """A parser with the options that every serving command has; without `models` it serves all that are there."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=_Help,
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=models,
        metavar="MODEL",
        help=f"models to serve (default: {' '.join(models) if models else 'all in the repository'})",
    )
    parser.add_argument("--host", default=LOOPBACK, help="address to listen on")
    return parser


def add_gateway_options(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that run the gateway."""
    parser.epilog = (
        "The first model of a task answers calls that name none: of --models, or else of --pin, --preload and the "
        "repository, in this order."
    )
    parser.add_argument(
        "--embed-port", type=port, metavar="PORT", default=EMBED_PORT, help="gateway, by convention for /embed"
    )
    parser.add_argument(
        "--rerank-port", type=port, metavar="PORT", default=RERANK_PORT, help="gateway, by convention for /rerank"
    )
    parser.add_argument(
        "--chat-port",
        type=port,
        default=os.environ.get("GATEWAY_CHAT_PORT"),
        metavar="PORT",
        help="gateway, by convention for /v1/chat/completions (default: that in GATEWAY_CHAT_PORT; else none, but "
        f"{CHAT_PORT} where tools.serve loads a model that writes at the start)",
    )
    parser.add_argument(
        "--timeout", type=seconds, metavar="SECONDS", default=TIMEOUT_SECONDS, help="how long a call may take"
    )
    parser.add_argument(
        "--drain-delay",
        type=delay,
        metavar="SECONDS",
        default=0.0,
        help="when told to stop, go on for so long with /health 503, until load balancers have seen that",
    )
    parser.add_argument(
        "--workers",
        type=workers,
        default=1,
        metavar="N",
        help="processes of the gateway, for hosts of many cores; several load and unload nothing after the start",
    )
    parser.add_argument(
        "--alias",
        nargs="+",
        type=alias,
        default=os.environ.get("GATEWAY_ALIASES", "").split(),
        metavar="NAME=MODEL",
        help="other names of models, such as text-embedding-3-small=minilm (default: those in GATEWAY_ALIASES, "
        "separated by spaces)",
    )
    parser.add_argument(
        "--allow-origin",
        nargs="+",
        default=os.environ.get("GATEWAY_ALLOW_ORIGIN", "").split(),
        metavar="ORIGIN",
        help="origins whose pages may call from a browser, such as https://app.example.com, or * for all "
        "(default: those in GATEWAY_ALLOW_ORIGIN, separated by spaces)",
    )


def add_residency_options(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that load models as they are called."""
    parser.add_argument(
        "--preload",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="models to load at the start (default: those of --models, else the first of each task)",
    )
    parser.add_argument(
        "--pin",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="models to load at the start and never to unload (default: none)",
    )
    parser.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="memory for all loaded models, such as 12GB: a GPU's where they run on one (default: nine tenths of "
        "what is free at the start)",
    )
    parser.add_argument(
        "--keep-alive",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="unload a model that nobody has called for so long (default: never, while there is room)",
    )


def aliases(options: argparse.Namespace) -> dict[str, str]:
    """Names that callers may give to models; raises ServerError where the model is not served."""
    found = {}
    for pair in options.alias:
        try:
            name, _, model = alias(pair).rpartition("=")
        except argparse.ArgumentTypeError as error:
            raise ServerError(f"GATEWAY_ALIASES: {error}") from None
        if model not in options.models:
            raise ServerError(f"the alias {pair} names no model of --models: {', '.join(options.models)}")
        found[name] = model
    return found


def add_triton_options(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that run Triton."""
    parser.add_argument(
        "--repository",
        type=repository,
        default=ROOT / "model_repository",
        help="folder of the models, or where Triton finds them in an object store: s3://, gs:// or as://",
    )
    parser.add_argument(
        "--http-port", type=port, metavar="PORT", default=Ports.http, help="Triton's own protocol over HTTP"
    )
    parser.add_argument(
        "--grpc-port", type=port, metavar="PORT", default=Ports.grpc, help="Triton's own protocol over gRPC"
    )
    parser.add_argument(
        "--metrics-port", type=port, metavar="PORT", default=Ports.metrics, help="Triton's metrics"
    )
    parser.add_argument(
        "--connection-seconds",
        type=int,
        metavar="SECONDS",
        default=0,
        help="close a gRPC connection at this age, so that its client looks Triton up again and finds replicas; "
        "0: never",
    )
    parser.add_argument(
        "--cache-mb",
        type=int,
        metavar="MB",
        default=0,
        help="memory that keeps hidden states of texts, for when they come again",
    )
    parser.add_argument(
        "--trace-url",
        type=trace_url,
        metavar="URL",
        default="",
        help="collector of OTLP over HTTP that gets the spans of every step (default: none)",
    )
    parser.add_argument(
        "--trace-rate",
        type=int,
        metavar="N",
        default=0,
        help="trace every Nth request too; 0: only calls with a traceparent",
    )
    parser.add_argument(
        "--work-folder",
        type=Path,
        metavar="FOLDER",
        default=ROOT / ".cache",
        help="folder of log, secret and backends",
    )


def switches(options: argparse.Namespace) -> list[str]:
    """What the command line switches on in tritonserver: response cache, tracing, the age of connections."""
    cache = [f"--cache-config=local,size={options.cache_mb << 20}"] if options.cache_mb else []
    settings = (
        "mode=opentelemetry",
        "level=TIMESTAMPS",
        f"rate={options.trace_rate}",
        f"opentelemetry,url={options.trace_url}",
        "opentelemetry,resource=service.name=triton",
    )
    age = [f"--grpc-max-connection-age={options.connection_seconds * 1000}"] if options.connection_seconds else []
    return cache + age + [f"--trace-config={setting}" for setting in settings if options.trace_url]


def server_arguments(
    repository: Path | str, models: Sequence[str], host: str, ports: Ports, switched_on: Sequence[str], secret: str
) -> list[str]:
    """What any tritonserver is started with, the wheel's and NVIDIA's own alike.

    Whoever sends `secret` may load models, map shared memory and change logging and tracing; nobody else may.
    """
    return [
        f"--model-repository={repository}",
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in models),
        "--disable-auto-complete-config",
        # A model that cannot be loaded takes no other along, and a server that has any is ready.
        "--exit-on-error=false",
        "--strict-readiness=false",
        f"--exit-timeout-secs={TRITON_DRAIN_SECONDS}",
        f"--http-address={host}",
        f"--http-port={ports.http}",
        f"--grpc-address={host}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-address={host}",
        f"--metrics-port={ports.metrics}",
        *restrictions(secret),
        *switched_on,
    ]


def check_encoder_settings() -> None:
    """Raises ServerError for a setting that every encoder would refuse while it is loaded."""
    precision, threads = (os.environ.get(f"ENCODER_{name}", "auto") for name in ("PRECISION", "THREADS"))
    if precision not in (*ENCODER_PRECISIONS, "auto"):
        raise ServerError(f"ENCODER_PRECISION is {precision!r}: choose {', '.join(ENCODER_PRECISIONS)} or auto")
    if threads != "auto" and not (threads.isascii() and threads.isdecimal() and int(threads)):
        raise ServerError(f"ENCODER_THREADS is {threads!r}: choose a number from 1 or auto")
