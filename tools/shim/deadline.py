"""`async with deadline(seconds)`: raises TimeoutError behind so many seconds of the monotonic clock.

Calls of models have no other: gRPC's deadlines go by the wall clock, and end a call where that is set forward.
"""

from __future__ import annotations

import sys

if sys.version_info >= (3, 11):
    from asyncio import timeout as deadline
else:  # the same, which aiohttp brings along there
    from async_timeout import timeout as deadline

__all__ = ["deadline"]
