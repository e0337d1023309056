"""Tokens as text, piece by piece: what may still change is held back.

That are bytes of UTF-8 whose character is not whole yet, and what may be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one answer. Special tokens have none."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        """Text is left out from that one of `stops` on that is the first to be whole."""
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._text = ""
        self._given = 0
        self.stopped = False
        """Whether a stop string has come, after which nothing follows."""

    def take(self, ids: Sequence[int]) -> int:
        """Adds tokens up to the one that completes a stop string; returns how many that were."""
        for count, token in enumerate(ids, 1):
            self._ids.append(token)
            if piece := self._decoder.step(self._tokenizer, token):
                self._add(piece)
                if self.stopped:
                    return count
        return len(ids)

    def end(self) -> None:
        """There are no more tokens: what was held back is text."""
        if self.stopped:
            return
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        self._add(whole[len(self._text) :])

    def give(self, is_last: bool = False) -> str:
        """The text since the last call."""
        end = len(self._text) - (0 if is_last or self.stopped else self._held())
        piece, self._given = self._text[self._given : end], max(self._given, end)
        return piece

    def _add(self, piece: str) -> None:
        # A stop string begins in what was not given yet: its beginning was held back.
        start, self._text = max(0, len(self._text) - max(map(len, self._stops), default=0)), self._text + piece
        found = [(place, stop) for stop in self._stops if (place := self._text.find(stop, start)) >= 0]
        if found:  # the one that was whole first, whatever tokens it came in
            place, _ = min(found, key=lambda one: (one[0] + len(one[1]), one[0]))
            self._text, self.stopped = self._text[:place], True

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        return max(
            (
                length
                for stop in self._stops
                for length in range(1, len(stop))
                if self._text.endswith(stop[:length])
            ),
            default=0,
        )
