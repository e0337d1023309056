"""Long texts by their beginning: as much of a text as decides its row of tokens, found in bounded time.

A row holds the first tokens of a text. They are settled once nothing that may follow can change them:

- A tokenizer's normaliser and pre-tokenizer look a few characters ahead. So the last words of a beginning, WORDS
  of them, are open, and the tokens of all others settled.
- A word may be megabytes, and some tokenizers see a whole text as one. In byte-pair encoding and in a unigram
  model the tokens left of a token's edge are those of the text left of it, whatever lies right of it: no merge has
  crossed the edge, and a part of the best split is itself the best. Some token has its edge in every string that
  is as long as the vocabulary's longest. So tokens that stay the same wherever in such a string the word is cut
  are settled.
- WordPiece makes one token of a word of more than so many characters, some characters leave no token at all, and a
  unigram model makes one of all that it does not know. Runs of them are squeezed.

What is not settled after a million characters is refused. No word of a language is like that. "aaaa..." may be,
where a unigram model's first tokens depend on the number of letters, and so is a letter with a million marks,
which a normal form puts into an order.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from typing import Any

from tokenizers import Token, Tokenizer
from tokenizers.models import BPE, Unigram, WordPiece

FEW = 8
"""Characters for each token of a row that are looked at first: mostly they settle it."""

MORE = 4
"""Times as many are looked at next."""

MOST = 1 << 20
"""Characters that a row may need, or 256 for each of its tokens if that is more."""

WORDS = 16
"""Words at the end of a beginning that what follows may change: one of the added tokens may begin in them."""

EDGE = 64
"""Characters at the end of a word that what follows may change before the word is split into tokens."""

RUN = 128
"""Characters from which a run is squeezed; more than any WordPiece vocabulary's longest word, which is 100."""

DISTINCT = 1 << 14
"""Kinds of characters of one text that are asked for."""

KINDS = ("space", "nothing", "letter", "unknown")
"""White space that only parts words; what leaves no token; letters of words; what the vocabulary lacks."""


class UnsettledError(ValueError):
    """No beginning that is looked at settles the row; the message says so."""


@dataclass(frozen=True)
class Beginning:
    """What is tokenized in place of a text."""

    text: str
    is_whole: bool
    """Whether nothing was cut off its end."""
    kept: tuple[tuple[int, int], ...] = ((0, 0),)
    """(place in `text`, place in the whole) of every part between those that were squeezed."""

    def place(self, index: int) -> int:
        """The place in the whole of one in `text`."""
        own, whole = self.kept[bisect_right(self.kept, index, key=lambda part: part[0]) - 1]
        return whole + index - own


class _Runs:
    """Runs of RUN or more of the characters of a text that leave few tokens."""

    def __init__(self, space: str, nothing: str, letter: str, unknown: str) -> None:
        classes = {"gap": space + nothing, "word": letter + nothing if letter else "", "unknown": unknown}
        self.any = re.compile(
            "|".join(f"(?P<{name}>[{some}]{{{RUN},}})" for name, some in classes.items() if some)
        )
        self._space, self._letter = (re.compile(f"[{some}]" if some else "(?!)") for some in (space, letter))

    def squeezed(self, text: str, run: re.Match[str]) -> Iterator[tuple[int, int]]:
        """The parts of a run that give the same tokens as all of it."""
        start, stop = run.span()
        if run.lastgroup == "gap":
            # The last space: some tokenizers count it as the beginning of the next token.
            space = self._space.search(text[start:stop][::-1])
            last = stop - 1 - (space.start() if space else 0)
            yield (last, last + 1)
        elif run.lastgroup == "unknown":
            # Together they are one token. What follows it in its word would be split from another sum of scores.
            is_end = stop == len(text) or self._space.match(text, stop)
            yield from ((start, start + 1), (stop - 1, stop)) if is_end else ((start, stop),)
        else:
            done = start
            for letter in islice(self._letter.finditer(text, start, stop), RUN):
                # What leaves no token may still keep two parts of an added token apart.
                yield (done, done + (done < letter.start()))
                yield letter.span()
                done = letter.end()
            if done < stop:
                ending = self._letter.search(text[done:stop][::-1])
                last = stop - 1 - (ending.start() if ending else 0)
                yield (last, last + 1)
                yield (max(last + 1, stop - 1), stop)


class LongTexts:
    """Finds the beginnings of texts for one tokenizer, whose truncation is set to the row."""

    def __init__(self, tokenizer: Tokenizer, tokens: int) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._most = max(MOST, 256 * tokens)
        marked = "a\u0301\u0323"  # other normal forms have them the other way round
        self._joins = tokenizer.normalizer is not None and tokenizer.normalizer.normalize_str(marked) != marked
        added = tokenizer.get_added_tokens_decoder().values()
        self._strips_left = any(token.lstrip for token in added)
        # A run may hold, or when squeezed become, a token that was added in words or with white space in it.
        self._kinds: dict[str, str] = {}
        self._squeezes = not any(token.content.isalnum() or re.search(r"\s", token.content) for token in added)

    def row(self, *texts: str) -> list[Beginning]:
        """As much of a text, or of two that share a row, as decides the row; raises UnsettledError.

        Of two, the longer is cut first. Where both are longer than a row of an odd number of tokens, the one of
        more tokens has one more in it, so they are counted.
        """
        found = [self.beginning(text) for text in texts]
        if len(texts) == 2:
            found = [self._without_excess(one) for one in found]
        room = self._tokens - self._tokenizer.num_special_tokens_to_add(True)
        if len(texts) == 1 or room % 2 == 0 or all(one.is_whole for one in found):
            return found
        less, more = (0, 1) if self._is_as_long(*texts) else (1, 0)
        if not found[more].is_whole:
            found[more] = self.beginning(texts[more], max(self._tokens, self._count(found[less].text)))
        if found[more].is_whole:
            found[less] = Beginning(texts[less], True)
        return found

    def _without_excess(self, beginning: Beginning) -> Beginning:
        """Less of a beginning of many tokens: a row is made of every pair of what two texts have too many."""
        text, ample = beginning.text, 2 * self._tokens + EDGE
        if text.isascii():
            return beginning  # no more tokens than characters
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        places = [place for part in (encoding, *encoding.overflowing) for place, _ in part.offsets]
        if len(places) <= 2 * ample or (settled := self._settled(text, places[ample], self._tokens)) is None:
            return beginning
        return Beginning(settled, False, beginning.kept)

    def _is_as_long(self, first: str, second: str) -> bool:
        """Whether the second text has at least as many tokens."""
        short, long = sorted((first, second), key=len)
        if len(short) > self._most:
            raise UnsettledError(
                f"two texts of {len(first)} and {len(second)} characters are too long for one row: "
                f"shorten one of them to {self._most}"
            )
        count = self._count(short)
        beginning = self.beginning(long, count)
        more = self._count(beginning.text) if beginning.is_whole else count + 1
        return count <= more if short is first else more <= count

    def _count(self, text: str) -> int:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return sum(len(part) for part in (encoding, *encoding.overflowing))

    def beginning(self, text: str, tokens: int | None = None) -> Beginning:
        """As much of a text as settles the first `tokens` tokens, a row's if None, and that there are more.

        Raises UnsettledError.
        """
        tokens = self._tokens if tokens is None else tokens
        size = FEW * tokens
        if len(text) <= size:
            return Beginning(text, True)
        if (settled := self._settled(text, size, tokens)) is not None:
            return Beginning(settled, False)
        kept, ended = self._squeeze(text)
        squeezed = "".join(text[start:stop] for start, stop in kept)
        sizes = [stop - start for start, stop in kept]
        places = tuple(
            (own - size, start) for own, size, (start, _) in zip(accumulate(sizes), sizes, kept, strict=True)
        )
        while (size := MORE * size) < min(len(squeezed), self._most):
            if (settled := self._settled(squeezed, size, tokens)) is not None:
                return Beginning(settled, False, places)
        if ended and len(squeezed) <= self._most:
            return Beginning(squeezed, True, places)
        raise UnsettledError(
            f"a text of {len(text)} characters is too long: its first {self._most} do not settle its "
            f"{tokens} tokens; shorten it, or break its long words by spaces"
        )

    def _settled(self, text: str, size: int, tokens: int) -> str | None:
        """The beginning of about `size` characters, if it settles the tokens and one more."""
        for stop in range(size, max(size - EDGE, 0), -1):
            if (_is_apart(text[stop]) or not self._joins) and not (self._strips_left and text[stop - 1].isspace()):
                break
        else:
            return None
        start = text[:stop]
        encoding = self._tokenizer.encode(start, add_special_tokens=False)
        parts = [encoding, *encoding.overflowing]
        words = [-1 if word is None else word for part in parts for word in part.word_ids]
        if len(words) <= tokens:
            return None
        places = [place for part in parts for place, _ in part.offsets]
        ample = 2 * tokens + EDGE
        if len(words) > 2 * ample and (shorter := self._settled(text, places[ample], tokens)) is not None:
            return shorter
        word = words[tokens]
        if word <= words[-1] - WORDS:
            return start
        first = words.index(word)
        ids = [i for part in parts for i in part.ids]
        own = ids[first : len(words) - words[::-1].index(word)]
        return start if self._settled_in_word(start[places[first] :], own, tokens + 1 - first) else None

    def _settled_in_word(self, text: str, ids: list[int], tokens: int) -> bool:
        """Whether the first `tokens` of a word's `ids` stay wherever the word ends; the word begins `text`."""
        model = self._tokenizer.model
        if not _keeps_edges(model):
            return False
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        normal = normalizer.normalize_str(text) if normalizer else text
        word = splitter.pre_tokenize_str(normal)[0][0] if splitter else normal
        found = model.tokenize(word)
        if [token.id for token in found] != ids:
            return False  # a text that begins with the word is split otherwise
        raw = word.encode()
        end = len(raw) - 4 * EDGE
        for count in (tokens + more for more in (0, 1, 2, 3, 7, 63) if tokens + more < len(found)):
            edge = found[count].offsets[0]
            if raw[edge] & 0xC0 == 0x80:
                continue  # within a character
            begin, expected = 0, [token.id for token in found[:count]]
            if isinstance(model, BPE):
                # Two tokens that stand side by side once do so wherever both are tokens.
                begin, expected = edge, [found[count].id]
            beside = raw[edge:end].decode(errors="ignore")[: 4 * self._longest]
            if len(beside) < 2 * self._longest or any(_is_unknown(model, t) for t in model.tokenize(beside)):
                continue
            part = raw[begin:edge].decode() + beside
            cuts = range(len(part) - self._longest, len(part))
            if all([t.id for t in model.tokenize(part[:cut])][: len(expected)] == expected for cut in cuts):
                return True
        return False

    @cached_property
    def _longest(self) -> int:
        """Characters of the vocabulary's longest token."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=False)))

    def _squeeze(self, text: str) -> tuple[list[tuple[int, int]], bool]:
        """Parts (start, stop) that give the tokens of a text, or of its beginning; and whether of all of it."""
        runs = self._runs(frozenset(text)) if self._squeezes else None
        kept: list[tuple[int, int]] = []
        size = done = place = 0
        while runs and place < len(text):
            if size + place - done > self._most:
                return [*kept, (done, place)], False
            # Not through all of the text at once, where short runs would be tried from each of their characters.
            if (found := runs.any.search(text, place, place + self._most)) is None:
                place += self._most - RUN
                continue
            run = runs.any.match(text, found.start()) or found
            parts = list(runs.squeezed(text, run))
            kept += [(done, run.start()), *parts]
            size += run.start() - done + sum(stop - start for start, stop in parts)
            done = place = run.end()
        return [*kept, (done, len(text))], True

    def _runs(self, characters: frozenset[str]) -> _Runs | None:
        if len(self._kinds) > 4 * DISTINCT:
            self._kinds.clear()
        for character in sorted(characters - self._kinds.keys())[:DISTINCT]:
            self._kinds[character] = self._kind(character)
        of_kind = {kind: "".join(re.escape(c) for c in characters if self._kinds.get(c) == kind) for kind in KINDS}
        return _Runs(**of_kind) if any(of_kind.values()) else None

    def _kind(self, character: str) -> str:
        """What becomes of a character between others: one of KINDS, "" of none."""
        normalizer, splitter, model = (
            getattr(self._tokenizer, n) for n in ("normalizer", "pre_tokenizer", "model")
        )
        normal = normalizer.normalize_str(character) if normalizer else character
        # White space alone may be stripped off an end only.
        if not normal and len(normalizer.normalize_str(f"a{character}a")) == 2:
            return "nothing"
        if character.isspace():
            around = (character, 2 * character, f" {character}", f"{character} ", f"{character} {character}")
            ids = [self._ids(f"a{gap}a") for gap in (" ", *around)]
            if all(one == ids[0] for one in ids):
                return "space"
        if (
            not normal
            or not _is_apart(character)
            or not splitter
            or len(splitter.pre_tokenize_str(f"a{normal}a")) > 1
        ):
            return ""
        if isinstance(model, WordPiece):
            return "letter" if model.max_input_chars_per_word < RUN else ""
        is_alone = isinstance(model, Unigram) and normal == character and character not in self._alphabet
        return "unknown" if is_alone and len(model.tokenize(2 * character)) == 1 else ""

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _alphabet(self) -> frozenset[str]:
        """Every character within the vocabulary."""
        return frozenset("".join(self._tokenizer.get_vocab(with_added_tokens=False)))


def _is_apart(character: str) -> bool:
    """Whether a character never joins those before it in a normal form, as marks and the ends of syllables do."""
    first = unicodedata.normalize("NFKD", character)[0]
    category = unicodedata.category(first)
    return (category[0] in "LNPSZ" or category in ("Cc", "Cf", "Co")) and not "\u1160" <= first <= "\u11ff"


def _keeps_edges(model: Any) -> bool:
    """Whether a model's tokens left of an edge are those of the text left of it."""
    if isinstance(model, Unigram):
        return not (model.alpha or model.nbest_size)
    return isinstance(model, BPE) and not (
        model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix
    )


def _is_unknown(model: Any, token: Token) -> bool:
    """Whether a token stands for characters that the vocabulary lacks: it may be of any length."""
    return token.value == model.unk_token if isinstance(model, BPE) else model.id_to_token(token.id) != token.value
