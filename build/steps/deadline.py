"""When a request's caller stops waiting: from then on the steps leave it out.

Triton 2.51 knows that the caller of an ensemble has gone, but does not tell the models that it is made of. So a
caller on the same machine may say how long it waits, in the request parameter `deadline`, which reaches every
step: the machine's boot id, a space, and seconds of its monotonic clock, which all processes of a machine share.
The parameter of a caller on another machine is passed over.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

GRACE = 0.5
"""Seconds after its deadline that a request is left out: by then its caller has an answer that says so."""


def of(request: Any) -> float:
    """The second of the monotonic clock from which a request of the Python backend is left out, or infinity."""
    parameters = request.parameters()
    if "deadline" not in parameters:
        return math.inf
    machine, _, seconds = str(json.loads(parameters).get("deadline")).partition(" ")
    try:
        return float(seconds) + GRACE if machine == BOOT_ID else math.inf
    except ValueError:
        return math.inf
