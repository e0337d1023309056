"""The texts that every engine gets: real ones, of one length or mixed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer

from build.runtimes import RUNTIMES
from build.verification.texts import docstrings
from tools.bench import corpus
from tools.bench.gpu.checkpoint import WINDOW

LENGTHS = (64, 512, 2048, 8192)
MIXED = "mixed"


@dataclass(frozen=True)
class Load:
    """Distinct texts, and their token ids."""

    name: str
    texts: list[str]
    ids: list[list[int]]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [len(row) for row in self.ids]

    @property
    def tokens(self) -> int:
        """Of all."""
        return sum(self.lengths)

    @property
    def batch(self) -> int:
        """How many of the texts have the tokens of a micro-batch of ours, about."""
        return max(1, RUNTIMES["torch"].token_budget * len(self.ids) // self.tokens)


class Texts:
    """Makes loads for one tokenizer."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(WINDOW)

    def loads(self, tokens: int) -> list[Load]:
        """One of each length and one of all lengths, of so many tokens, about."""
        return [*(self._of_length(n, max(1, tokens // n)) for n in LENGTHS), self.mixed(tokens)]

    def mixed(self, tokens: int) -> Load:
        """As many queries as docstrings and chunks of documents, or what there are of them."""
        texts: list[str] = []
        for three in zip(corpus.queries(), docstrings(), corpus.chunks(), strict=False):
            texts += three
            tokens -= sum(len(one.ids) for one in self._tokenizer.encode_batch(list(three)))
            if tokens <= 0:
                break
        return self._load(MIXED, texts)

    def few(self, tokens: int) -> Load:
        """For comparing vectors: of all lengths, a letter, and one of each length that FP32 has memory for."""
        longest = chain(*(self._of_length(n, 1).texts for n in LENGTHS[:-1]))
        return self._load("few", ["a", *self.mixed(tokens).texts, *longest])

    def _of_length(self, tokens: int, count: int) -> Load:
        return self._load(f"{tokens} tokens", list(self._cut(tokens, count)))

    def _cut(self, tokens: int, count: int) -> Iterator[str]:
        """Pieces of all docstrings end to end, each from a place of its own, so that none is another."""
        whole = "\n\n".join(docstrings())
        self._tokenizer.no_truncation()
        offsets = self._tokenizer.encode(whole, add_special_tokens=False).offsets
        self._tokenizer.enable_truncation(WINDOW)
        for start in random.Random(tokens).sample(range(len(offsets) - tokens), count):
            # One less: the tokenizer puts a token behind every text.
            yield whole[offsets[start][0] : offsets[start + tokens - 2][1]]

    def _load(self, name: str, texts: list[str]) -> Load:
        return Load(name, texts, [one.ids for one in self._tokenizer.encode_batch(texts)])
