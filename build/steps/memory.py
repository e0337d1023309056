"""`model_memory_bytes` on Triton's metrics port: what the process of a step holds, as it sees itself.

Whoever decides what stays loaded may run elsewhere, and Triton knows nothing of the memory of its Python models.
A page of a library or file that several processes map is shared out among them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import triton_python_backend_utils as pb_utils

ROLLUP = Path("/proc/self/smaps_rollup")

SECONDS = 1.0
"""Seconds between two looks, at least."""

SHARE = 0.01
"""Share of the process's time that looking may take: the kernel walks through every page."""

CUDA_CONTEXT = 600 << 20
"""Bytes of a card that CUDA and its kernels take in a process, about."""


class Memory:
    """The memory of this process, which runs one instance of a model, and of its GPU if it has one."""

    def __init__(self, model: str, on_gpu: Callable[[], int] | None = None) -> None:
        """Registers the metric and measures once; `on_gpu` returns the bytes of GPU memory of the process."""
        self._family = pb_utils.MetricFamily(
            name="model_memory_bytes",
            description="Memory of the process that runs a model",
            kind=pb_utils.MetricFamily.GAUGE,
        )
        self._of_process, self._of_gpu = (
            self._family.Metric(labels={"model": model, "memory": memory}) for memory in ("process", "gpu")
        )
        self._on_gpu = on_gpu
        self._next = 0.0
        self.measure()

    def measure(self) -> None:
        """Looks again, unless it has just done so."""
        started = time.monotonic()
        if started < self._next:
            return
        line = next(line for line in ROLLUP.read_text().splitlines() if line.startswith("Pss:"))
        self._of_process.set(int(line.split()[1]) * 1024)
        if self._on_gpu is not None:
            self._of_gpu.set(self._on_gpu())
        now = time.monotonic()
        self._next = now + max(SECONDS, (now - started) / SHARE)
