"""Real text at no download: the docstrings of Python's standard library, whole, cut and joined."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from build.verification.texts import docstrings, shuffled

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@cache
def queries() -> list[str]:
    """What a person types into a search box: distinct first sentences of at most twelve words."""
    sentences = (re.split(r"[.:;\n]", text, maxsplit=1)[0].strip() for text in docstrings())
    return shuffled(dict.fromkeys(text for text in sentences if 2 <= len(text.split()) <= 12))


@cache
def chunks() -> list[str]:
    """What a splitter leaves of long documents: docstrings end to end, 2000 characters (some 500 tokens) each."""
    return list(_cut(2000))


def repeats(share: float = 0.5) -> list[str]:
    """Docstrings of which `share` have come before, most of them a few texts earlier."""
    chance, fresh = random.Random(0), iter(docstrings())
    texts = [next(fresh)]
    for text in fresh:
        while chance.random() < share:
            texts.append(chance.choice(texts[-4:]))
        texts.append(text)
    return texts


def of_length(tokens: int, count: int, tokenizer: Tokenizer) -> list[str]:
    """At most `count` pieces of real text cut to so many tokens, special ones included."""
    texts: list[str] = []
    for text in _cut(12 * tokens):
        if len(texts) == count:
            break
        encoding = tokenizer.encode(text)
        if len(encoding.ids) >= tokens:
            texts.append(text[: encoding.offsets[tokens - 2][1]])
    return texts


def _cut(characters: int) -> Iterator[str]:
    whole = "\n\n".join(docstrings())
    for start in range(0, len(whole) - characters, characters):
        yield whole[start : start + characters].strip()
