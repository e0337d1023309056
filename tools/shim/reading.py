"""Reads the bodies of calls, within bounds: of each one's bytes and values, before it is parsed, and of all."""

from __future__ import annotations

from aiohttp import hdrs, web

from tools.shim.body import MAX_ITEMS
from tools.shim.errors import GatewayError, busy_reading, client_gone, too_large

MAX_BODY_BYTES = 16 * 2**20

MAX_MARKS = 2**16
"""Bytes of a body outside of its strings, white space left out: brackets, commas and numbers.

That bounds the objects that are made of it. 2048 texts, each in an object of its own, have 12,000.
"""

FREE_BYTES = 2**16
"""Bytes of each body that are read however many others are being read."""

BODIES_BYTES = 128 * 2**20
"""Bytes of all bodies being read at once, beyond the free ones: eight of the largest."""

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Bodies:
    """The bodies that are being read."""

    def __init__(self, workers: int = 1) -> None:
        """By one of so many processes that share what is set aside."""
        self._held = 0
        self._most = max(MAX_BODY_BYTES, BODIES_BYTES // workers)

    async def read(self, request: web.Request) -> bytearray:
        """The body of a call.

        Raises GatewayError 413 where it is over a limit, 503 where too much is being read, 499 where the caller is
        gone before its end.
        """
        if (request.content_length or 0) > MAX_BODY_BYTES:
            raise over_the_limit()
        if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
            await request.writer.write(CONTINUE)
            request.writer.output_size = 0  # the answer has not begun
        body, marks, held = bytearray(), MarkCounter(), 0
        try:
            while chunk := await request.content.readany():
                body += chunk
                marks.count(chunk)
                if len(body) > MAX_BODY_BYTES:
                    raise over_the_limit()
                if marks.counted > MAX_MARKS:
                    raise too_large(f"the body holds too many values: send at most {MAX_ITEMS} texts in a call")
                more = max(0, len(body) - FREE_BYTES) - held
                if more and self._held + more > self._most:
                    raise busy_reading()
                self._held += more
                held += more
        except BaseException as error:
            body.clear()  # the exception holds this frame
            if isinstance(error, ConnectionError | web.RequestPayloadError) and request.transport is None:
                raise client_gone() from None
            raise
        finally:
            self._held -= held
        return body


def over_the_limit() -> GatewayError:
    """413: the body is too long, by its header or by what came."""
    return too_large(f"the body is over the limit of {MAX_BODY_BYTES} bytes: send fewer or shorter texts a call")


async def continue_later(_: web.Request) -> None:
    """Sends no `100 Continue` yet: `Bodies.read` does, once nothing speaks against the call."""


class MarkCounter:
    """Counts the bytes of a JSON text that stand outside of its strings, as it comes in pieces."""

    def __init__(self) -> None:
        self.counted = 0
        self._in_string = False
        self._rest = b""

    def count(self, piece: bytes) -> None:
        """Counts the next piece, in time that grows with its length only."""
        bare = (self._rest + piece).replace(rb"\\", b"").replace(rb"\"", b"")
        self._rest = b"\\" if bare.endswith(b"\\") else b""  # the next piece has what it escapes
        parts = bare.split(b'"')
        outside = b"".join(parts[self._in_string :: 2])
        self.counted += len(outside.translate(None, b" \t\r\n"))
        self._in_string ^= len(parts) % 2 == 0
