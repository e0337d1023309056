"""What a dialect is made of: routes, each with the type of its body and of its answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tools.shim.errors import ErrorDialect, own_error
from tools.shim.gateway import Gateway, Result

TIMEOUT_HEADER = "X-Request-Timeout"
"""Seconds after which the caller wants no answer."""


@dataclass(frozen=True)
class Reply:
    """Content of a 200, and the result that it was made from, for the headers."""

    content: object
    result: Result | None = None


@dataclass(frozen=True)
class Post:
    """A route that takes a body. Where several share a path, the one whose `key` the body has is taken."""

    path: str
    body: type
    answer: Callable[[Gateway, Any], Awaitable[Reply]]
    gives: Any
    """Type of the answer."""
    key: str = ""
    error: ErrorDialect = own_error


@dataclass(frozen=True)
class Get:
    """A route without a body."""

    path: str
    answer: Callable[..., Awaitable[Reply]]
    gives: Any
    error: ErrorDialect = own_error
    open: bool = False
    """Whether it is answered without a key."""
    flags: tuple[str, ...] = ()
    """Query parameters, 0 or 1, that `answer` takes beside the gateway."""
