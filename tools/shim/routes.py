"""What a dialect is made of: routes, each with the type of its body and of its answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tools.shim.errors import ErrorDialect, own_error
from tools.shim.gateway import Gateway, Result
from tools.shim.generation import Generation

TIMEOUT_HEADER = "X-Request-Timeout"
"""Seconds after which the caller wants no answer."""

KEEP_ALIVE_HEADER = "X-Keep-Alive"
"""Seconds that the call's model stays loaded after it, where models are loaded by calls; 0: not at all."""


@dataclass(frozen=True)
class Reply:
    """Content of a 200, and the result that it was made from, for the headers."""

    content: object
    result: Result | None = None
    generation: Generation | None = None
    """The answer that was written for it, or is being written."""
    events: AsyncGenerator[bytes, None] | None = None
    """Server-sent events that come in place of the content."""


@dataclass(frozen=True)
class Post:
    """A route that takes a body. Where several share a path, the first that takes the body answers."""

    path: str
    body: type
    answer: Callable[[Gateway, Any], Awaitable[Reply]]
    gives: Any
    """Type of the answer."""
    key: str = ""
    """The route takes bodies that have this field. "": only where no other route of the path takes them."""
    fits: Callable[[dict[str, Any]], bool] | None = None
    """Tells whether the route takes a body, in place of `key`."""
    error: ErrorDialect = own_error
    streams: bool = False
    """Whether the OpenAPI document also offers server-sent events. The answer itself decides by `Reply.events`."""

    def takes(self, content: dict[str, Any]) -> bool:
        """Whether the route is for a body, which may still be refused."""
        return self.fits(content) if self.fits else self.key in content


@dataclass(frozen=True)
class Action:
    """A POST without a body that changes what the server holds; what is in braces in its path goes to `answer`."""

    path: str
    answer: Callable[..., Awaitable[Reply]]
    gives: Any
    error: ErrorDialect = own_error


@dataclass(frozen=True)
class Get:
    """A route without a body; what is in braces in its path is given to `answer`, too."""

    path: str
    answer: Callable[..., Awaitable[Reply]]
    gives: Any
    error: ErrorDialect = own_error
    open: bool = False
    """Whether it is answered without a key."""
    flags: tuple[str, ...] = ()
    """Query parameters, 0 or 1, that `answer` takes beside the gateway."""
