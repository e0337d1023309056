"""Ranges of the steps in Nsight Systems, where the nvtx package is installed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

annotate: Callable[[str], AbstractContextManager[Any]] = nullcontext
"""Makes a range of a name, in the domain `steps`."""

with suppress(ImportError):
    import nvtx

    annotate = partial(nvtx.annotate, domain="steps")
