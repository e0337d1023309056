"""The encoder of a built family without Triton: answers the questions of `worker.py`.

It runs in the Python that serves: `python -m tools.bench.gpu.encoder FOLDER`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from build.runtimes import RUNTIMES
from build.steps.packed_encoder import PackedEncoder
from tools.bench.gpu.worker import answer, take_stdout

GEMM = {"cuda": (8192, 30), "cpu": (512, 3)}
"""Rows and columns of both matrices, and how often they are multiplied."""


def main() -> None:
    """Answers until stdin ends."""
    answers = take_stdout()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    peak = measured_peak(device)
    encoder = PackedEncoder(Path(sys.argv[1]), device, RUNTIMES["torch"].token_budget)

    def prepare(rows: list[list[int]], _: int) -> Callable[[], list[Any]]:
        arrays = [np.array(row, np.int32) for row in rows]

        def encode() -> list[Any]:
            found = encoder.run(arrays)
            for one in found:
                if isinstance(one, str):
                    raise RuntimeError(one)
            return [one["embeddings"] for one in found if not isinstance(one, str)]

        return encode

    answer(answers, {"peak": peak, "version": torch.__version__}, prepare)


def measured_peak(device: torch.device) -> float:
    """Operations a second of a large product of bf16 matrices: the best of three goes."""
    size, times = GEMM[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(times):
            product = a @ b
        product[0, 0].item()  # waits for it
        best = max(best, 2 * size**3 * times / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    main()
