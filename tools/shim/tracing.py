"""What a call carries through the gateway to Triton: its id, and the W3C trace context that it came with."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

REQUEST_ID = "X-Request-Id"

VALID_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
"""Ids of callers that are passed on: nothing that could break a line of a log."""

VALID_TRACE = {
    "traceparent": re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"),
    "tracestate": re.compile(r"[ -~]{1,512}"),
}
"""Header -> what it must look like to be passed on; gRPC takes printable ASCII only."""


@dataclass(frozen=True)
class Origin:
    """Where the work under way comes from."""

    request_id: str = ""
    trace: Mapping[str, str] = field(default_factory=dict)
    """`traceparent` and `tracestate`, where the call came with them."""


NO_CALL = Origin()

current: ContextVar[Origin] = ContextVar("origin", default=NO_CALL)
"""Origin of the call that a task works for; tasks that it starts inherit it."""


def origin_of(headers: Mapping[str, str]) -> Origin:
    """The origin that a call's headers name; without an id of its own, or with none that is valid, a new one."""
    own = headers.get(REQUEST_ID, "")
    request_id = own if VALID_ID.fullmatch(own) else secrets.token_hex(16)
    trace = {name: headers.get(name, "") for name in VALID_TRACE}
    valid = {name: value for name, value in trace.items() if VALID_TRACE[name].fullmatch(value)}
    return Origin(request_id, valid if "traceparent" in valid else {})
