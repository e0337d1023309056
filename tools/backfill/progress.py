"""What people see of a backfill: a bar while it runs, rows that were refused, and a summary."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

SHOWN = 50
"""Refused rows that are listed at the end; a file of --refused has all."""

WAITS_SECONDS = 30.0
"""Seconds between two sentences that say what is waited for."""


@dataclass
class Progress:
    """Counts, and tells. Answers and writes are counted apart, since a killed run wastes what is not written."""

    refused_file: Path | None = None
    names: int = SHOWN
    """How many refused rows are kept."""
    rows: int = 0
    """Written."""
    refused: int = 0
    texts: int = 0
    """Answered, tokens and texts that were cut to the window beside them."""
    tokens: int = 0
    cut: int = 0
    started: float = field(default_factory=time.perf_counter)
    named: dict[str, str] = field(default_factory=dict)
    """Refused rows and why: the first of them."""
    _bar: Any = None
    _said: float = -WAITS_SECONDS

    def begin(self, total: int | None) -> None:
        """Shows the bar; `total` rows are to do, as far as that is known."""
        self.started = time.perf_counter()
        self.texts = self.tokens = self.cut = 0  # without what was sent to look around
        every = 0.5 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(total=total, unit="row", smoothing=0.05, mininterval=every)

    def wrote(self, rows: int, refused: Mapping[str, str]) -> None:
        """Some rows are in their place; others never will be, by id and reason."""
        self.rows += rows
        self.refused += len(refused)
        for row, reason in refused.items():
            if len(self.named) < self.names:
                self.named[row] = reason
            if self.refused_file is not None:
                with self.refused_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"id": row, "reason": reason}) + "\n")
        if self._bar is not None:
            self._bar.update(rows + len(refused))
            self._bar.set_postfix_str(
                f"{self.tokens} tokens, {self.texts / self.seconds:.0f} texts/s", refresh=False
            )

    def answered(self, texts: int, tokens: int, cut: int) -> None:
        """A call has come back."""
        self.texts += texts
        self.tokens += tokens
        self.cut += cut

    def waits(self, why: str) -> None:
        """A call waits for the server; what for is said once in a while."""
        now = time.monotonic()
        if now - self._said >= WAITS_SECONDS:
            self._said = now
            self.say(f"waiting for {why}")

    def say(self, sentence: str) -> None:
        """A line above the bar."""
        with suppress(BrokenPipeError):
            tqdm.write(sentence, file=sys.stderr)

    def end(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        """Seconds since the bar was shown."""
        return max(1e-9, time.perf_counter() - self.started)

    def summary(self) -> str:
        """What was done, how fast, and what was not."""
        seconds = self.seconds
        lines = [
            f"{self.rows} rows in {seconds:.1f} s: {self.texts} texts, {self.tokens} tokens, "
            f"{self.texts / seconds:.0f} texts/s, {self.tokens / seconds:.0f} tokens/s; "
            f"{self.cut} texts were cut to the model's window"
        ]
        if self.refused:
            lines += [f"{self.refused} rows were refused:"]
            lines += [f"  {row}: {reason}" for row, reason in self.named.items()]
            if self.refused > len(self.named):
                lines.append(f"  and {self.refused - len(self.named)} more (--refused FILE has all)")
        return "\n".join(lines)
