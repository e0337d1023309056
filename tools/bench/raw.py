"""The limit: a plain loop on the same graph and engine, texts ordered by length and cut by a token budget."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import openvino as ov
from tokenizers import Tokenizer

MAX_TOKENS = 256
TOKEN_BUDGET = 512

Ids: TypeAlias = npt.NDArray[np.int32]
Batch: TypeAlias = tuple[Ids, Ids]
"""Token ids end to end, and the length of each text."""


@dataclass(frozen=True)
class Prepared:
    """Texts as token ids, in batches by length."""

    batches: list[Batch]

    def part(self, index: int, parts: int) -> Prepared:
        """Every `parts`-th batch, so that each part has texts of all lengths."""
        return Prepared(self.batches[index::parts])

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(len(ids) for ids, _ in self.batches)

    @property
    def texts(self) -> int:
        """Texts."""
        return sum(len(lengths) for _, lengths in self.batches)


class RawEngine:
    """OpenVINO on the encoder's model.onnx, with token ids made beforehand and nothing around it."""

    def __init__(self, repository: Path, family: str, precision: str) -> None:
        self.tokenizer = Tokenizer.from_file(str(repository / f"{family}-tokenizer" / "1" / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MAX_TOKENS)
        hints = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(precision, precision),
            "PERFORMANCE_HINT": "THROUGHPUT",
        }
        model = repository / f"{family}-encoder" / "1" / "model.onnx"
        self._queue = ov.AsyncInferQueue(ov.Core().compile_model(model, "CPU", hints))

    def prepare(self, texts: list[str]) -> Prepared:
        """Tokenizes, orders and cuts `texts`."""
        batches: list[list[Ids]] = []
        room = 0
        for row in sorted(self._rows(texts), key=len):
            if len(row) > room:
                batches.append([])
                room = TOKEN_BUDGET
            batches[-1].append(row)
            room -= len(row)
        return Prepared([_batch(rows) for rows in batches])

    def run(self, texts: Prepared) -> tuple[float, float]:
        """All texts once, the longest first: (seconds of wall time, seconds of CPU time)."""
        wall, cpu = time.perf_counter(), time.process_time()
        for ids, lengths in reversed(texts.batches):
            self._queue.start_async({"input_ids": ids, "lengths": lengths}, share_inputs=True)
        self._queue.wait_all()
        return time.perf_counter() - wall, time.process_time() - cpu

    def run_singly(self, texts: list[str]) -> list[float]:
        """Each text alone, one after the other: milliseconds of each."""
        milliseconds = []
        for ids, lengths in [_batch([row]) for row in self._rows(texts)]:
            start = time.perf_counter()
            self._queue.start_async({"input_ids": ids, "lengths": lengths}, share_inputs=True)
            self._queue.wait_all()
            milliseconds.append(1000 * (time.perf_counter() - start))
        return milliseconds

    def _rows(self, texts: list[str]) -> list[Ids]:
        return [np.array(encoding.ids, np.int32) for encoding in self.tokenizer.encode_batch_fast(texts)]


def _batch(rows: list[Ids]) -> Batch:
    return np.concatenate(rows), np.array([len(row) for row in rows], np.int32)
