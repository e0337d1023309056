"""The end of a step whose engine can do nothing more. Triton starts no step again: what watches Triton does."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def end_process(error: Exception, what: str = "the engine") -> NoReturn:
    """Says why on stderr, since Triton's own log would come too late, and ends the process with status 1."""
    cause = " ".join(str(error).split())[:300]
    sentence = f"error: {what} failed, and nothing that it computes now would be trusted: {cause}"
    print(sentence, file=sys.stderr, flush=True)
    os._exit(1)
