"""A long text's beginning gives the row that tokenizing all of it gives, after a bounded amount of work."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from build.steps import long_text
from build.steps.long_text import LongTexts, UnsettledError

NAMES = sorted(path.parent.name for path in TINY.glob("*/tokenizer.json"))

KINDS = {
    "spaces": " ",
    "white space": " \t\n\u3000\u00a0",
    "one letter": "a",
    "letters": "abcdefghijklmnopqrstuvwxyz",
    "words": "the cat sat on a mat, and so did I. ",
    "marks": "\u0301",
    "unlike marks": "\u0301\u0323\u0e38",
    "spacing marks": "\u0903",
    "emoji": "\U0001f600",
    "a family": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "Chinese": "\u4e00\u4e8c\u4e09\u56db",
    "Korean": "\uac00\uac01\ub098",
    "jamo": "\u1100\u1161\u11a8",
    "half-width": "\uff76\uff9e",
    "control characters": "\x01\x1f\x7f",
    "NUL": "\0",
    "lines": "\r\n",
    "punctuation": "!",
    "digits": "7",
    "one that becomes many": "\ufdfa",
    "special tokens": "[SEP]<|endoftext|></s><mask>",
    "unassigned": "\U000e1000",
    "beyond": "\U00012000",
}


def tokenizer(name: str, tokens: int) -> Tokenizer:
    loaded = Tokenizer.from_file(str(TINY / name / "tokenizer.json"))
    loaded.no_padding()
    loaded.enable_truncation(tokens)
    return loaded


def row(of: Tokenizer, *texts: str) -> tuple[list[int], bool]:
    """The ids of one text or pair, and whether it was cut."""
    encoding = of.encode(*texts)
    return encoding.ids, bool(encoding.overflowing)


@pytest.fixture
def refuses_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "MOST", 0)


def texts(parts: int, *counts: int, without: str = "") -> st.SearchStrategy[str]:
    """Texts of parts of one kind, each of so many characters."""
    kinds = [characters for kind, characters in KINDS.items() if kind != without]

    def part(kind: str, count: int, is_shuffled: bool) -> str:
        return "".join(random.Random(count).choices(kind, k=count)) if is_shuffled else (kind * count)[:count]

    one = st.builds(part, st.sampled_from(kinds), st.sampled_from(counts), st.booleans())
    return st.lists(one, min_size=1, max_size=parts).map("".join)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("refuses_early")
def test_the_row_is_that_of_the_whole(name: str) -> None:
    own = {tokens: tokenizer(name, tokens) for tokens in (5, 16)}
    long_texts = {tokens: LongTexts(one, tokens) for tokens, one in own.items()}
    cut = []

    @given(texts(8, 1, 2, 63, 64, 127, 128, 129, 200, 1000), st.sampled_from(sorted(own)))
    @settings(max_examples=200, deadline=None)
    def holds(text: str, tokens: int) -> None:
        try:
            (beginning,) = long_texts[tokens].row(text)
        except UnsettledError:
            return
        cut.append(len(beginning.text) < len(text))
        assert row(own[tokens], beginning.text) == row(own[tokens], text)
        # The places of its tokens, which callers may ask for.
        found, whole = own[tokens].encode(beginning.text), own[tokens].encode(text)
        for (start, stop), expected, special in zip(
            found.offsets, whole.offsets, whole.special_tokens_mask, strict=True
        ):
            if not special:
                assert (beginning.place(start), beginning.place(stop - 1) + 1) == expected

    holds()
    assert sum(cut) > 100


@pytest.mark.parametrize("tokens", [20, 21])
@pytest.mark.parametrize("name", ["bert-cross-encoder", "cross-encoder"])
@pytest.mark.usefixtures("refuses_early")
def test_the_row_of_a_pair(name: str, tokens: int) -> None:
    """Of two texts that are both too long, the one of more tokens keeps one more, where the row is odd."""
    own = tokenizer(name, tokens)
    long_texts = LongTexts(own, tokens)
    refused = []
    some = texts(
        3, 1, 20, 60, 160, without="one that becomes many"
    )  # of all that two have too many, tokenizing the whole makes every pair

    @given(some, some)
    @settings(max_examples=150, deadline=None)
    def holds(first: str, second: str) -> None:
        try:
            found = long_texts.row(first, second)
        except UnsettledError:
            refused.append(first)
        else:
            assert row(own, *(one.text for one in found)) == row(own, first, second)

    holds()
    assert len(refused) < 100
    # Of the shorter one's beginning there are more tokens than of the longer one's.
    for first, second in (("a " * 300, "!" * 170), ("!" * 170, "a " * 300)):
        found = long_texts.row(first, second)
        assert row(own, *(one.text for one in found)) == row(own, first, second)


LETTERS = "ab"


@st.composite
def byte_pairs(draw: st.DrawFn) -> Any:
    """A byte-pair encoding of two letters, by random merges."""
    vocabulary, merges = list(LETTERS), []
    for _ in range(draw(st.integers(1, 12))):
        pair = draw(st.sampled_from(vocabulary)), draw(st.sampled_from(vocabulary))
        if pair not in merges and len("".join(pair)) <= 12:
            merges.append(pair)
            if "".join(pair) not in vocabulary:
                vocabulary.append("".join(pair))
    return models.BPE({token: i for i, token in enumerate(vocabulary)}, merges)


@st.composite
def unigrams(draw: st.DrawFn) -> Any:
    """A unigram model of two letters, with random pieces; scores are often equal, so that ties are too."""
    pieces = draw(st.sets(st.text(LETTERS, min_size=2, max_size=8), max_size=10)) | set(LETTERS)
    scores = st.sampled_from([-1.0, -2.0, -3.0]) | st.floats(-5, -0.5)
    return models.Unigram([("?", 0.0), *((piece, draw(scores)) for piece in sorted(pieces))], 0)


@given(
    byte_pairs() | unigrams(),
    st.text(LETTERS, min_size=1, max_size=12),
    st.text(LETTERS, max_size=300),
    st.sampled_from([5, 20, 60]),
)
@settings(max_examples=400, deadline=None)
def test_a_word_of_any_vocabulary(model: Any, period: str, end: str, tokens: int) -> None:
    """Where a text is one word, the first tokens may depend on its last letter: then more of it is read."""
    own = Tokenizer(model)
    own.enable_truncation(tokens)
    text = (period * 6000)[:6000] + end
    (beginning,) = LongTexts(own, tokens).row(text)
    assert row(own, beginning.text) == row(own, text)


def test_what_its_end_decides_is_read_to_the_end_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four letters are a token: where the number of letters is no multiple, the first token is the odd one out."""
    own = Tokenizer(models.Unigram([("?", 0.0), ("a", -9.0), ("aa", -3.0), ("aaa", -3.0), ("aaaa", -3.0)], 0))
    own.enable_truncation(16)
    long_texts = LongTexts(own, 16)
    rows = [row(own, "a" * length) for length in range(8000, 8004)]
    assert len({tuple(ids) for ids, _ in rows}) > 1
    assert [row(own, long_texts.row("a" * length)[0].text) for length in range(8000, 8004)] == rows
    monkeypatch.setattr(long_text, "MOST", 0)
    with pytest.raises(
        UnsettledError, match="8000 characters is too long: its first 4096 do not settle its 16 tok"
    ):
        LongTexts(own, 16).row("a" * 8000)


def test_what_follows_unknown_characters_in_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of scores are rounded: of two splits of "aab" that are alike, what stands before decides."""
    monkeypatch.setattr(long_text, "MOST", 0)
    scores = [("?", 0.0), ("a", -5.09), ("b", -4.24), ("aa", -4.28), ("ab", -3.43)]
    own = Tokenizer(models.Unigram(scores, 0))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own.enable_truncation(16)
    long_texts = LongTexts(own, 16)
    unknown = [f"{chr(0x4E00) * count}aab" for count in (100, 300, 1000)]
    assert len({tuple(row(own, text)[0]) for text in unknown}) > 1
    for text in (*unknown, *(f"{text} aab" for text in unknown), f"{chr(0x4E00) * 3000} aab"):
        assert row(own, long_texts.row(text)[0].text) == row(own, text)


class Counting:
    """A tokenizer that counts the characters that it is given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.characters = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self._tokenizer.encode(text, **options)


def megabytes(name: str) -> Iterator[tuple[str, str]]:
    for kind, characters in KINDS.items():
        if not (name == "xlm-roberta" and kind == "one that becomes many"):  # quick here, but not its whole
            yield kind, (characters * 3_000_000)[:3_000_000] + " b"


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("bert-cls", {"spacing marks", "jamo", "half-width", "unassigned"}),
        ("xlm-roberta", {"marks", "unlike marks", "spacing marks", "jamo", "half-width", "unassigned"}),
        ("gemma3", set()),
        ("qwen3-embedding", {"marks", "unlike marks", "spacing marks", "unassigned"}),
    ],
)
def test_little_of_megabytes_is_tokenized(name: str, refused: set[str]) -> None:
    """What they are made of does not matter, but a million marks on a letter are refused: marks are ordered."""
    counting = Counting(tokenizer(name, 512))
    found = set()
    for kind, text in megabytes(name):
        counting.characters = 0
        try:
            LongTexts(counting, 512).row(text)
        except UnsettledError:
            found.add(kind)
            assert counting.characters < 2 * long_text.MOST
        else:
            assert counting.characters < 50_000
    assert found == refused
