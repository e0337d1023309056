"""The gateway's one table of errors: what went wrong -> status, stable word, sentence."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

import orjson
from aiohttp import web
from tritonclient.utils import InferenceServerException

from tools.command import DEAD_STEP

CLIENT_WENT_AWAY = 499
"""The status under which a call is counted that ended before its answer, as nginx has it."""

SHARED_MEMORY = re.compile(r"(key|region) '[^']*'")
"""How Triton names a segment of shared memory, which is nobody's business but its own."""

AHEAD = re.compile(r"are ahead of this call: try again in (\d+) s")
"""How a model that writes says that too much waits for it."""

MAX_ECHO = 64
"""Characters of a caller's own words that an error repeats."""

MAX_MESSAGE = 1000
"""Characters of any sentence: what Triton says may repeat what it was sent."""


@dataclass(eq=False)
class GatewayError(Exception):
    """An answer other than 200: `message` is a sentence that says what to change."""

    status: int
    type: str
    message: str
    headers: Mapping[str, str] | None = None
    """What the answer says besides."""
    details: Mapping[str, object] = field(default_factory=dict)
    """What its body has besides, in the gateway's own dialect."""

    def __post_init__(self) -> None:
        self.message = cut(self.message, MAX_MESSAGE)


ErrorDialect = Callable[[GatewayError], tuple[int, object]]
"""An error -> its status and body as a dialect has them."""


def cut(text: str, characters: int) -> str:
    """`text`, or its beginning."""
    return text if len(text) <= characters else f"{text[:characters]}…"


def quoted(words: str) -> str:
    """A caller's own words as an error repeats them."""
    return repr(cut(words, MAX_ECHO))


def bad_request(message: str) -> GatewayError:
    """400: the body is not what the contract says."""
    return GatewayError(HTTPStatus.BAD_REQUEST, "bad_request", message)


def unknown_model(message: str) -> GatewayError:
    """404: no such model."""
    return GatewayError(HTTPStatus.NOT_FOUND, "unknown_model", message)


def too_large(message: str) -> GatewayError:
    """413: the body or the number of texts is over the limit."""
    return GatewayError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", message)


def too_long(message: str) -> GatewayError:
    """422: a text is longer than the model reads, and the caller asked for none to be cut."""
    return GatewayError(HTTPStatus.UNPROCESSABLE_ENTITY, "too_long", message)


def compressed() -> GatewayError:
    """415: the body is compressed, and a small one may unpack to any size."""
    return GatewayError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "compressed", "send the body without Content-Encoding")


def unauthorized(message: str) -> GatewayError:
    """401: no key, or not one of ours."""
    return GatewayError(HTTPStatus.UNAUTHORIZED, "unauthorized", message, {"WWW-Authenticate": "Bearer"})


def forbidden(message: str) -> GatewayError:
    """403: a page of another host asks for what only this server's operators may."""
    return GatewayError(HTTPStatus.FORBIDDEN, "forbidden", message)


def overloaded(message: str, retry_after: float) -> GatewayError:
    """429: too much is queued; there is room again after `retry_after` seconds."""
    return GatewayError(
        HTTPStatus.TOO_MANY_REQUESTS, "overloaded", message, {"Retry-After": str(math.ceil(retry_after))}
    )


def not_ready(message: str, seconds: float = 1, details: Mapping[str, object] = {}) -> GatewayError:
    """503: Triton or a model is not there; it may be after so many `seconds`."""
    after = {"Retry-After": str(max(1, math.ceil(seconds)))}
    return GatewayError(HTTPStatus.SERVICE_UNAVAILABLE, "not_ready", message, after, details)


def too_big(message: str) -> GatewayError:
    """507: the model does not fit into the memory that there is for models."""
    return GatewayError(HTTPStatus.INSUFFICIENT_STORAGE, "too_big", message)


def busy_reading() -> GatewayError:
    """503: the bodies that are being read fill what is set aside for them."""
    message = "too many large bodies are being read: try again, or send fewer or shorter texts a call"
    return GatewayError(HTTPStatus.SERVICE_UNAVAILABLE, "overloaded", message, {"Retry-After": "1"})


def no_room() -> GatewayError:
    """503: as many connections as there is room for are open and busy."""
    message = "there is no room for another connection: try again, and share connections between calls"
    return GatewayError(HTTPStatus.SERVICE_UNAVAILABLE, "overloaded", message, {"Retry-After": "1"})


def client_gone() -> GatewayError:
    """499: nobody is there to read the answer."""
    return GatewayError(CLIENT_WENT_AWAY, "gone", "the caller went away in its body")


def timed_out() -> GatewayError:
    """504: the deadline passed."""
    message = (
        "the deadline passed: send fewer texts in a call, or raise X-Request-Timeout, up to the server's --timeout"
    )
    return GatewayError(HTTPStatus.GATEWAY_TIMEOUT, "timeout", message)


def slow_body() -> GatewayError:
    """408: the deadline passed before the body was there."""
    return GatewayError(HTTPStatus.REQUEST_TIMEOUT, "slow_body", "the body did not arrive before the deadline")


def as_gateway_error(error: Exception) -> GatewayError:
    """What any exception raised while a call was served means to the caller."""
    match error:
        case GatewayError():
            return error
        case web.RequestPayloadError():
            return bad_request("the body broke off or is not what its headers say")
        case web.HTTPNotFound():
            return GatewayError(
                HTTPStatus.NOT_FOUND, "not_found", "there is no such route: GET /docs lists them all"
            )
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            message = f"this route takes {allowed}, not {error.method}"
            return GatewayError(HTTPStatus.METHOD_NOT_ALLOWED, "method_not_allowed", message, {"Allow": allowed})
        case asyncio.TimeoutError():
            return timed_out()
        case InferenceServerException():
            return _from_triton(error)
    return GatewayError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "the gateway failed; see its log")


def _from_triton(error: InferenceServerException) -> GatewayError:
    # A step's exception comes with its Python trace, which is no answer.
    message, _, _ = re.sub(r"^(\[[^]]*] )?(in ensemble '[^']*', )?", "", error.message() or "").partition(
        "\n\nAt:"
    )
    match (error.status() or "").removeprefix("StatusCode."):
        case "INVALID_ARGUMENT":
            return bad_request(message)
        case "UNAVAILABLE" if ahead := AHEAD.search(message):
            return overloaded(message, float(ahead[1]))
        case "DEADLINE_EXCEEDED":
            return timed_out()
        case _ if has_gone(error):
            return not_ready(f"Triton cannot answer now: {message}")
        case "INTERNAL" if is_dead_step(error):
            return not_ready(f"Triton cannot answer until it is started again: {message}")
    unnamed = SHARED_MEMORY.sub(r"\1", message)
    return GatewayError(HTTPStatus.BAD_GATEWAY, "upstream", f"Triton failed: {unnamed}")


def has_gone(error: InferenceServerException) -> bool:
    """Whether a Triton went away, is about to, or says while it stops that it has no models any more."""
    return (error.status() or "").removeprefix("StatusCode.") in ("UNAVAILABLE", "NOT_FOUND", "CANCELLED")


def is_dead_step(error: InferenceServerException) -> bool:
    """Whether Triton says that the process of a step has died, which it says until it is started again."""
    return DEAD_STEP in (error.message() or "")


def forget(error: BaseException) -> None:
    """Lets go of the frames that an exception went through, and of the body that one of them holds.

    Frames and exceptions hold each other; the garbage collector would end that, but it counts objects, not bytes.
    """
    chain: list[BaseException | None] = [error]
    while chain:
        if (one := chain.pop()) is not None:
            chain += (one.__cause__, one.__context__)
            one.__traceback__ = one.__cause__ = one.__context__ = None


def own_error(error: GatewayError) -> tuple[int, object]:
    """Status and body of an error in the gateway's own dialect."""
    return error.status, {"error": error.message, "type": error.type, **error.details}


def as_response(error: GatewayError, dialect: ErrorDialect = own_error) -> web.Response:
    """The error as JSON of a dialect."""
    status, body = dialect(error)
    return web.Response(
        status=status,
        body=orjson.dumps(body),
        content_type="application/json",
        headers=error.headers,
    )
