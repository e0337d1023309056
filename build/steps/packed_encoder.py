"""An encoder and its head on one device: rows of token ids in, a result for each row out, no padding anywhere.

Rows are ordered by length, the longest first, and cut into micro-batches of at most `token_budget` tokens, end to
end; a longer row runs alone. On a GPU all are under way at once on a stream of the encoder's own: the next one is
packed into pinned memory while those before it are computed, and only [B, D] comes back. A micro-batch that finds
no memory is cut in half and run again, and so are all after it; a row that finds none alone fails alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .torch_graph import Texts, TorchGraph, to_device

Array: TypeAlias = npt.NDArray[Any]

STEP = 16
"""Tokens of a micro-batch are rounded up to a multiple of this: matrix products on a GPU want it, and code is not
compiled anew for a single row."""

TILE = 32
"""Texts that the head's matrix products take at a time."""

TRIAL = 1024
"""Tokens that tell what one takes of memory."""

SHARE = 0.8
"""Of the memory that is free behind the weights, what micro-batches may take."""


class PackedEncoder:
    """`model.onnx` and `head.onnx` of a folder."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        token_budget: int,
        compiled: bool | None = None,
        unseen_offset: int = 0,
    ) -> None:
        """Loads and, on a GPU unless told otherwise, compiles them; raises ValueError where that cannot be.

        With an `unseen_offset`, ids that come raised by it are of tokens that are seen by none, the last of a row.
        """
        self._device = device
        self._unseen_offset = unseen_offset
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        compiled = device.type == "cuda" if compiled is None else compiled
        try:
            self._encoder = TorchGraph(folder / "model.onnx", device, compiled)
            # A few small products: nothing to compile, and their bits need not depend on the number of texts.
            self._head = TorchGraph(folder / "head.onnx", device, tile=TILE)
        except torch.OutOfMemoryError:
            raise ValueError(f"the weights do not fit: {_memory(device)}") from None
        self.token_budget = token_budget
        if self._stream:
            self.token_budget = min(token_budget, self._room())

    def run(self, rows: Sequence[Array], kept: Sequence[Array] | None = None) -> list[dict[str, Array] | str]:
        """The outputs of each row by name, or a sentence that says why there are none; no row is empty.

        A head may read other ids than its encoder, as long: those that are `kept`, else -1. Raises
        torch.AcceleratorError where the device can be used no more by this process.
        """
        kept = rows if kept is None else kept
        results: list[dict[str, Array] | str] = [""] * len(rows)
        waiting = deque(self._cut(rows, range(len(rows))))
        running: list[tuple[list[int], dict[str, Tensor]]] = []
        with torch.no_grad(), torch.cuda.stream(self._stream) if self._stream else nullcontext():
            while waiting:
                batch = waiting.popleft()
                try:
                    running.append((batch, self._launch([rows[i] for i in batch], [kept[i] for i in batch])))
                    continue
                except torch.OutOfMemoryError:
                    pass  # by the next line it holds none of the memory any more
                except torch.AcceleratorError:
                    raise
                except RuntimeError as error:
                    for i in batch:
                        results[i] = " ".join(str(error).split())[-200:]
                    continue
                if self._stream:
                    self._stream.synchronize()
                    torch.cuda.empty_cache()
                if len(batch) == 1:
                    results[batch[0]] = f"{len(rows[batch[0]])} tokens do not fit: {_memory(self._device)}"
                else:
                    self.token_budget = min(self.token_budget, sum(len(rows[i]) for i in batch) // 2)
                    waiting = deque(self._cut(rows, [*batch, *(i for others in waiting for i in others)]))
            if self._stream:
                self._stream.synchronize()
        for batch, outputs in running:
            arrays = {name: values.numpy() for name, values in outputs.items()}
            for place, i in enumerate(batch):
                results[i] = {name: values[place] for name, values in arrays.items()}
        return results

    def _cut(self, rows: Sequence[Array], which: Sequence[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        tokens = 0
        for i in sorted(which, key=lambda i: -len(rows[i])):
            if batch and tokens + len(rows[i]) > self.token_budget:
                yield batch
                batch, tokens = [], 0
            batch.append(i)
            tokens += len(rows[i])
        if batch:
            yield batch

    def _launch(self, rows: Sequence[Array], kept: Sequence[Array]) -> dict[str, Tensor]:
        """Starts one micro-batch: its outputs, which are there once the stream has got to them."""
        counts = [len(row) for row in rows]
        tokens, flat, seen = sum(counts), np.concatenate(rows), counts
        if self._unseen_offset:
            seen = [int((row < self._unseen_offset).sum()) for row in rows]
            flat %= self._unseen_offset
        texts = Texts(counts, self._device, None if seen == counts else seen)
        packed = torch.zeros(3, -(-tokens // STEP) * STEP, dtype=torch.int32)
        packed[0, :tokens] = torch.from_numpy(flat)
        packed[1, :tokens] = torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int32) for n in counts]))
        packed[2, :tokens] = torch.from_numpy(np.concatenate(kept))
        ids, positions, kept_ids = to_device(packed, self._device)
        lengths = texts.ends.diff()
        feeds = {"input_ids": ids, "positions": positions, "lengths": lengths}
        states = self._encoder(feeds, texts)["last_hidden_state"]
        outputs = self._head(
            {"last_hidden_state": states[:tokens], "input_ids": kept_ids[:tokens], "lengths": lengths}
        )
        return {name: _to_host(values) for name, values in outputs.items()}

    def _room(self) -> int:
        """Tokens of a micro-batch that memory has room for, by what some of them take; compiles on the way."""
        rows = [np.zeros(TRIAL, np.int32)]
        self.run(rows)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        self.run(rows)
        taken = torch.cuda.max_memory_allocated(self._device) - before
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return max(TRIAL, int(SHARE * free / max(1, taken) * TRIAL))


def _to_host(values: Tensor) -> Tensor:
    if not values.is_cuda:
        return values
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)


def _memory(device: torch.device) -> str:
    if device.type != "cuda":
        return "there is not enough memory"
    free, total = torch.cuda.mem_get_info(device)
    return (
        f"{free / 1e9:.1f} of {total / 1e9:.1f} GB are free on {torch.cuda.get_device_name(device)}; end what "
        "else uses it, or serve a smaller model"
    )
