"""Calls to this machine itself, past any proxy that the environment names."""

from __future__ import annotations

import urllib.request
from contextlib import suppress
from ipaddress import ip_address

open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
"""As urllib.request.urlopen."""


def channel_options(address: str) -> list[tuple[str, int]]:
    """What a gRPC channel to host:port wants: a proxy only where that is another machine."""
    return [("grpc.enable_http_proxy", 0)] if is_local(address) else []


def is_local(address: str) -> bool:
    """Whether host:port is of this machine."""
    host = address.rpartition(":")[0].strip("[]")
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"
