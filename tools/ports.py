"""The ports of a command: each its own, and free. That is seen before anything is started."""

from __future__ import annotations

import argparse
import errno
import socket
from collections.abc import Callable, Collection

from tools.command import CHAT_PORT, ServerError


def check_ports(options: argparse.Namespace, again: Callable[[str], str]) -> None:
    """Raises ServerError where two ports are the same, one cannot be listened on, or some are taken.

    It then names free ones, in the command that `again` makes of their options.
    """
    asked = {name: port for name, port in vars(options).items() if name.endswith("_port") and port is not None}
    named: dict[int, str] = {}
    for name, port in asked.items():
        if port in named:
            raise ServerError(f"{option(named[port])} and {option(name)} are both {port}: give each its own")
        named[port] = name
    taken, free = list[str](), list[str]()
    for name, port in asked.items():
        place = place_of(options, name)
        host = getattr(options, place)
        if problem := why_not(host, port):
            if problem != errno.EADDRINUSE:
                raise ServerError(unusable(problem, place, host, name, port))
            taken.append(f"{port} ({option(name)})")
            # The chat port may be asked for later.
            if other := next_free(host, port, {*named, CHAT_PORT}):
                named[other] = name
                free.append(f"{option(name)} {other}")
    if taken:
        ports = "port" if len(taken) == 1 else "ports"
        raise ServerError(
            f"something listens on {ports} {', '.join(taken)} already: stop it, or choose others: "
            + again(" ".join(free))
        )


def option(name: str) -> str:
    """As the command line has it."""
    return f"--{name.replace('_', '-')}"


def place_of(options: argparse.Namespace, name: str) -> str:
    """The option that says on which address a port is: Triton's may be on one of their own."""
    own = name in ("http_port", "grpc_port", "metrics_port") and hasattr(options, "triton_host")
    return "triton_host" if own else "host"


def why_not(host: str, port: int) -> int:
    """Why nobody may listen there, as a number of errno, or 0."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror:
            return errno.EADDRNOTAVAIL
        except OSError as error:
            return error.errno or errno.EADDRNOTAVAIL
    return 0


def unusable(problem: int, place: str, host: str, name: str, port: int) -> str:
    """The sentence for an address that is not here, or a port that is not for everybody."""
    if problem == errno.EADDRNOTAVAIL:
        return f"{host} is no IPv4 address of this machine: name another with {option(place)}"
    return f"port {port} cannot be used ({errno.errorcode[problem]}): choose another with {option(name)}"


def next_free(host: str, port: int, named: Collection[int]) -> int | None:
    """The next port that nobody has and none of the options names, if there is one."""
    others = (other for other in range(port + 1, 2**16) if other not in named and not why_not(host, other))
    return next(others, None)
