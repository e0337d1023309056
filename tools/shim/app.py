"""The gateway over HTTP: each route's call is read, answered, and any failure told in the route's dialect."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import AsyncGenerator, Collection
from http import HTTPStatus
from urllib.parse import quote

import orjson
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from tools.shim import keys, openapi, tracing
from tools.shim.body import Lenient, json_object, read
from tools.shim.cors import allow, check_origin, is_preflight, preflight
from tools.shim.deadline import deadline
from tools.shim.dialects import ROUTES, error_dialect
from tools.shim.errors import (
    CLIENT_WENT_AWAY,
    MAX_ECHO,
    ErrorDialect,
    GatewayError,
    as_gateway_error,
    as_response,
    bad_request,
    client_gone,
    compressed,
    cut,
    forget,
    quoted,
    slow_body,
)
from tools.shim.gateway import Gateway, Lanes, Result
from tools.shim.metrics import Metrics
from tools.shim.pages import add_pages
from tools.shim.reading import Bodies, continue_later
from tools.shim.routes import KEEP_ALIVE_HEADER, TIMEOUT_HEADER, Action, Get, Post, Reply
from tools.shim.upstream import Upstream

NO_ROUTE = "none"
"""The route of requests for paths that there are not: what callers make up must not become a label."""

IGNORED = "X-Ignored-Fields"
"""The header that names the fields of a call that changed nothing, because the dialect does not know them."""

MAX_NAMES = 16
MAX_NAME = 64

SHOWN_SECONDS = 0.005
"""Seconds of waiting for a model to be loaded from which an answer says so."""

NOTED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.TOO_MANY_REQUESTS)
"""Statuses below 500 that the log tells of: somebody tries keys, or too much is asked of the server."""

ERROR_TYPE = web.ResponseKey("error_type", str)

log = logging.getLogger(__name__)


def make_app(
    upstream: Upstream,
    timeout: float,
    accepted: Collection[bytes],
    busy: set[asyncio.BaseProtocol],
    origins: Collection[str] = (),
    workers: int = 1,
) -> web.Application:
    """The gateway as an aiohttp application over an upstream that the caller opens and closes.

    A call may take `timeout` seconds, or fewer where it says so. Where keys are `accepted`, it needs one of them.
    Pages of the `origins` may call from a browser. The connections of calls under way are in `busy`. Each of
    several `workers` has its share of what all may have under way.
    """
    gateway = Gateway(upstream, Lanes.of(workers))
    metrics, bodies = Metrics(upstream), Bodies(workers)
    app = web.Application(middlewares=[observer(metrics, busy), errors])
    app.on_response_prepare.append(allow(origins))
    posts: dict[str, list[Post]] = {}
    for route in ROUTES:
        if isinstance(route, Post):
            posts.setdefault(route.path, []).append(route)
        elif isinstance(route, Action):
            act = action_handler(gateway, route, timeout, accepted, origins)
            for path in paths(route.path):
                app.router.add_post(path, act)
                app.router.add_get(path, takes_post)  # which else would look for a model of that name
        else:
            get = get_handler(gateway, route, accepted)
            for path in paths(route.path):
                app.router.add_get(path, get)
    for path, routes in posts.items():
        post = post_handler(gateway, bodies, timeout, routes, accepted, metrics)
        for one in paths(path):
            app.router.add_post(one, post, expect_handler=continue_later)
    document = orjson.dumps(openapi.document())
    for path in paths("/metrics"):
        app.router.add_get(path, metrics.expose)
    for path in paths("/openapi.json"):
        app.router.add_get(path, lambda _: as_json(document))
    add_pages(app)
    return app


def paths(path: str) -> list[str]:
    """A route's path as aiohttp has it, with and without a slash at its end; in braces may be slashes."""
    open_path = re.sub("{(.*?)}", r"{\1:.+}", path)
    return [path] if path == "/" else [f"{open_path}/", open_path]


def post_handler(
    gateway: Gateway,
    bodies: Bodies,
    timeout: float,
    routes: list[Post],
    accepted: Collection[bytes],
    metrics: Metrics,
) -> Handler:
    """Answers by the first of `routes` that takes the body, or by the first of all, within the call's deadline."""

    async def handle(request: web.Request) -> web.StreamResponse:
        route = routes[0]

        async def served(own: Gateway) -> web.Response | Reply:
            nonlocal route
            started = time.perf_counter()
            content = json_object(await bodies.read(request))
            route = next((one for one in routes if one.takes(content)), route)
            call: object = read(route.body, content)
            parsed = time.perf_counter()
            reply = await route.answer(own, call)
            if reply.events is not None:
                return reply
            answered = time.perf_counter()
            response = answer(reply.content)
            if isinstance(call, Lenient) and call.ignored:
                response.headers[IGNORED] = names(call.ignored)
            if reply.result is not None:
                stages = {
                    "parse": parsed - started,
                    "queue": reply.result.waited,
                    "triton": reply.result.computed,
                    "render": time.perf_counter() - answered,
                }
                add_headers(response, reply.result, stages)
                metrics.count_result(reply.result, stages)
            if reply.generation is not None:
                metrics.count_generation(reply.generation)
            return response

        try:
            if accepted:
                keys.check(accepted, request.headers.get("Authorization", ""))
            if request.headers.get("Content-Encoding", "identity") != "identity":
                raise compressed()
            seconds = seconds_of(request, timeout)
            own = gateway.within(seconds, number_of(request, KEEP_ALIVE_HEADER, above_0=False))
            async with deadline(seconds):
                found = await served(own)
                if isinstance(found, web.Response):
                    return found
                assert found.events is not None
                first = await anext(found.events)  # an error before it has a status of its own
            response = await stream(request, first, found.events, own.seconds, route.error)
            if found.generation is not None:
                metrics.count_generation(found.generation)
            return response
        except asyncio.TimeoutError as error:
            forget(error)
            late = error if request.content.is_eof() else slow_body()
            return failed(request, late, route.error)
        except Exception as error:
            return failed(request, error, route.error)

    return handle


async def stream(
    request: web.Request, first: bytes, events: AsyncGenerator[bytes, None], seconds: float, dialect: ErrorDialect
) -> web.StreamResponse:
    """Sends events as they come; a failure among them is told by the last one.

    A caller that goes away has this cancelled, and with it the events.
    """
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    try:
        async with deadline(seconds):
            await response.write(first)
            async for event in events:
                await response.write(event)
    except ConnectionError as error:
        forget(error)
        raise client_gone() from None
    except Exception as error:
        known = as_gateway_error(error)
        note(request, known, error)
        forget(error)
        response[ERROR_TYPE] = known.type
        await response.write(b"data: " + orjson.dumps(dialect(known)[1]) + b"\n\n")
    finally:
        await events.aclose()
    await response.write_eof()
    return response


def get_handler(gateway: Gateway, route: Get, accepted: Collection[bytes]) -> Handler:
    """Answers `route`."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            if accepted and not route.open:
                keys.check(accepted, request.headers.get("Authorization", ""))
            flags = {flag: read_flag(flag, request.query.get(flag, "0")) for flag in route.flags}
            return answer((await route.answer(gateway, **flags, **request.match_info)).content)
        except Exception as error:
            return failed(request, error, route.error)

    return handle


def action_handler(
    gateway: Gateway, route: Action, timeout: float, accepted: Collection[bytes], origins: Collection[str]
) -> Handler:
    """Does what `route` is for, within the call's deadline."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            check_origin(request, origins)
            if accepted:
                keys.check(accepted, request.headers.get("Authorization", ""))
            seconds = seconds_of(request, timeout)
            reply = await asyncio.wait_for(route.answer(gateway.within(seconds), **request.match_info), seconds)
            return answer(reply.content)
        except Exception as error:
            return failed(request, error, route.error)

    return handle


async def takes_post(request: web.Request) -> web.StreamResponse:
    """Refuses a GET to what changes the server."""
    raise web.HTTPMethodNotAllowed(request.method, [hdrs.METH_POST])


def read_flag(name: str, value: str) -> bool:
    """A query parameter of 0 or 1."""
    if value not in ("0", "1"):
        raise bad_request(f"{name} is 0 or 1, not {quoted(value)}")
    return value == "1"


def seconds_of(request: web.Request, timeout: float) -> float:
    """What the call may take: `timeout`, or fewer seconds where its header says so."""
    return min(number_of(request, TIMEOUT_HEADER, above_0=True) or timeout, timeout)


def number_of(request: web.Request, name: str, above_0: bool) -> float | None:
    """The seconds that a header of the call says; None where it says nothing."""
    header = request.headers.get(name)
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        seconds = -1.0
    if not (seconds > 0 if above_0 else seconds >= 0) or math.isinf(seconds):
        least = "above 0" if above_0 else "from 0"
        raise bad_request(f"{name} must be a number of seconds {least}, not {quoted(header)}")
    return seconds


def answer(content: object) -> web.Response:
    """`content` as JSON; numpy's float32 keeps exactly the digits that read back as the same float32."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return web.Response(body=body, content_type="application/json")


def names(fields: Collection[str]) -> str:
    """A caller's own words in a header: quoted as in a URL, the first ones of the first fields."""
    return ", ".join(quote(field[:MAX_NAME]) for field in list(fields)[:MAX_NAMES])


def add_headers(response: web.Response, result: Result, stages: dict[str, float]) -> None:
    """What the dialects have no field for."""
    response.headers["X-Token-Count"] = str(result.tokens)
    response.headers["X-Truncated"] = str(result.truncated)
    if result.loaded > SHOWN_SECONDS:
        response.headers["X-Load-Seconds"] = f"{result.loaded:.2f}"
    response.headers["Server-Timing"] = ", ".join(f"{name};dur={1000 * s:.2f}" for name, s in stages.items())


async def as_json(body: bytes) -> web.Response:
    """JSON that was written before."""
    return web.Response(body=body, content_type="application/json")


def observer(metrics: Metrics, busy: set[asyncio.BaseProtocol]) -> Middleware:
    """Counts every call, notes its connection, and gives it the id that its answer and Triton's traces name."""

    @web.middleware
    async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.perf_counter()
        origin = tracing.origin_of(request.headers)
        tracing.current.set(origin)
        is_call = request.method == hdrs.METH_POST
        metrics.in_flight.inc(is_call)
        busy.add(request.protocol)
        status, error = CLIENT_WENT_AWAY, None
        try:
            response = await handler(request)
            status, error = response.status, response.get(ERROR_TYPE)
        except BaseException as gone:
            forget(gone)
            raise gone
        finally:
            resource = request.match_info.route.resource
            route = (resource.canonical.rstrip("/") or "/") if resource else NO_ROUTE
            metrics.count_request(route, status)
            metrics.in_flight.dec(is_call)
            busy.discard(request.protocol)
            if is_call:
                metrics.count_call(route, time.perf_counter() - started, error)
        response.headers[tracing.REQUEST_ID] = origin.request_id
        return response

    return observe


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What no route takes becomes a row of the error table like everything else, in the dialect of its path."""
    try:
        return preflight(request) if is_preflight(request) else await handler(request)
    except Exception as error:
        return failed(request, error, error_dialect(request.path))


def failed(request: web.Request, error: Exception, dialect: ErrorDialect) -> web.Response:
    """The error's row of the table, in a dialect."""
    known = as_gateway_error(error)
    note(request, known, error)
    forget(error)
    response = as_response(known, dialect)
    if known.status != CLIENT_WENT_AWAY:
        response[ERROR_TYPE] = known.type
    return response


def note(request: web.Request, known: GatewayError, error: Exception) -> None:
    """Has the log say what an operator may have to do something about; unexpected errors come with their trace."""
    if known.status < HTTPStatus.INTERNAL_SERVER_ERROR and known.status not in NOTED:
        return
    is_ours = known.status in (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.BAD_GATEWAY)
    log.log(
        logging.ERROR if is_ours else logging.WARNING,
        "%s %s from %s: %d %s, request id %s: %s",
        request.method,
        cut(request.rel_url.raw_path, MAX_ECHO),
        request.remote,
        known.status,
        known.type,
        tracing.current.get().request_id,
        " ".join(known.message.split()),
        exc_info=error if known.status == HTTPStatus.INTERNAL_SERVER_ERROR else None,
        extra={"status": known.status},
    )
