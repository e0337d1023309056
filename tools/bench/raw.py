"""The limit: a plain loop on the same graph and engine, texts ordered by length and cut by a token budget."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import openvino as ov
from tokenizers import Tokenizer

MAX_TOKENS = 256
TOKEN_BUDGET = 512

Ids: TypeAlias = npt.NDArray[np.int32]


class RawEngine:
    """OpenVINO on the encoder's model.onnx, with token ids made beforehand and nothing around it."""

    def __init__(self, repository: Path, family: str, texts: list[str], precision: str) -> None:
        tokenizer = Tokenizer.from_file(str(repository / f"{family}-tokenizer" / "1" / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(MAX_TOKENS)
        rows = sorted((np.array(e.ids, np.int32) for e in tokenizer.encode_batch_fast(texts)), key=len)
        self.tokens = sum(map(len, rows))
        self._batches: list[tuple[Ids, Ids]] = []
        batch: list[Ids] = []
        for row in rows:
            if batch and sum(map(len, batch)) + len(row) > TOKEN_BUDGET:
                self._add(batch)
                batch = []
            batch.append(row)
        self._add(batch)
        hints = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(precision, precision),
            "PERFORMANCE_HINT": "THROUGHPUT",
        }
        model = repository / f"{family}-encoder" / "1" / "model.onnx"
        self._queue = ov.AsyncInferQueue(ov.Core().compile_model(model, "CPU", hints))

    def run(self) -> tuple[float, float]:
        """All texts once: (seconds of wall time, seconds of CPU time)."""
        wall, cpu = time.perf_counter(), time.process_time()
        for ids, lengths in reversed(self._batches):
            self._queue.start_async({"input_ids": ids, "lengths": lengths}, share_inputs=True)
        self._queue.wait_all()
        return time.perf_counter() - wall, time.process_time() - cpu

    def _add(self, rows: list[Ids]) -> None:
        self._batches.append((np.concatenate(rows), np.array([len(row) for row in rows], np.int32)))
