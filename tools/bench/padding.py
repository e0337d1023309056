"""Padding in the encoder, from the rule by which its step cuts a batch into micro-batches.

The linear layers run on packed tokens, their number rounded up; attention runs on rows as wide as the longest.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from build.graphs.ragged import STEP
from build.rendering.repository import SPREAD
from build.runtimes import RUNTIMES


def padding(lengths: list[int], batch: int) -> dict[str, float]:
    """Slots without a token, as shares of all, when texts so long arrive `batch` at a time in this order."""
    # Only Triton can give the step's module what it imports, and the rule needs nothing of it.
    sys.modules.setdefault("triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    step = importlib.import_module("build.steps.streams")
    linear = attention = 0
    for start in range(0, len(lengths), batch):
        items = [step.Item({}, length) for length in lengths[start : start + batch]]
        for cut in step.micro_batches(items, RUNTIMES["openvino"].token_budget, SPREAD):
            linear += _rounded(sum(item.length for item in cut))
            attention += len(cut) * _rounded(max(item.length for item in cut))
    tokens = sum(lengths)
    return {"linear": 1 - tokens / linear, "attention": 1 - tokens / attention}


def _rounded(length: int) -> int:
    return -(-length // STEP) * STEP
