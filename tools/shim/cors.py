"""Cross-origin resource sharing: which pages of other hosts may call from a browser. Off unless switched on.

A browser asks beforehand (the preflight, answered without a key), and hides an answer whose headers do not let the
page's origin read it. See the Fetch standard, "HTTP-CORS protocol".
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from http import HTTPStatus
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from tools.shim.errors import forbidden, quoted

ANY = "*"

READABLE = "X-Token-Count, X-Truncated, X-Ignored-Fields, X-Load-Seconds, X-Request-Id, Server-Timing, Retry-After"
"""Headers of an answer that a page may read besides the usual ones."""

SECONDS = "600"
"""How long a browser may keep the answer to a preflight."""


def is_preflight(request: web.Request) -> bool:
    """Whether a browser asks beforehand."""
    return request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers


def preflight(request: web.Request) -> web.Response:
    """Nothing but headers, which `allow` adds for origins that may call; without them the browser does not."""
    if request.match_info.http_exception and request.match_info.http_exception.status == HTTPStatus.NOT_FOUND:
        raise request.match_info.http_exception
    return web.Response(status=HTTPStatus.NO_CONTENT)


def check_origin(request: web.Request, origins: Collection[str]) -> None:
    """Raises GatewayError 403 for a page that may not call, whose POST a browser sends all the same."""
    origin = request.headers.get(hdrs.ORIGIN)
    own = {f"{scheme}://{request.host}" for scheme in ("http", "https") if is_ours(request.host)}
    if origin is not None and ANY not in origins and origin not in {*origins, *own}:
        raise forbidden(f"pages of {quoted(origin)} may not do this: allow them with --allow-origin")


def is_ours(host: str) -> bool:
    """Whether a request's Host, with or without a port, can only mean this server: anybody's name may lead to it.

    A page of such a name would be of the same origin as its own calls (DNS rebinding).
    """
    with suppress(ValueError):
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    return False


def allow(origins: Collection[str]) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """What adds the headers for `origins`, such as `https://app.example.com`, or `*` for all, to an answer."""

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        if not origins:
            return
        if ANY not in origins:
            response.headers.add(hdrs.VARY, hdrs.ORIGIN)
        origin = request.headers.get(hdrs.ORIGIN, "")
        if ANY not in origins and origin not in origins:
            return
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = ANY if ANY in origins else origin
        response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = READABLE
        if is_preflight(request):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = "GET, POST"
            asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS)
            if asked:
                response.headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = asked
            response.headers[hdrs.ACCESS_CONTROL_MAX_AGE] = SECONDS

    return add
