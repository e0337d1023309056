"""Checkpoints without tokenizer.json: what is made of their vocabulary is what transformers makes of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REFERENCE, TINY, rows
from test_accounts import copied, edit, graphs
from tokenizers import Tokenizer

from build import make
from build.errors import BuildError
from build.sources.checkpoint import Checkpoint
from build.sources.tokenization import check_tokenizer

FOLDER = REFERENCE / "vocabularies"
CASES: dict[str, Any] = json.loads((FOLDER / "cases.json").read_text())["cases"]
PAIRS: list[tuple[str, str]] = json.loads((TINY / "pairs.json").read_text())
BERT, XLM_ROBERTA = "vocab.txt", "sentencepiece.bpe.model"


def checkpoint(case: str, folder: Path) -> Checkpoint:
    said = CASES[case]
    shutil.copy(FOLDER / said["vocabulary"], folder)
    for name, content in said["files"].items():
        (folder / name).write_text(json.dumps(content))
    return Checkpoint(folder)


def unicode_texts() -> list[str]:
    """Every character of the first two planes, 32 in a text, each among letters."""
    characters = [chr(code) for code in range(1, 0x20000) if not 0xD800 <= code < 0xE000]
    return ["a".join(characters[i : i + 32]) for i in range(0, len(characters), 32)]


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_tokenizer_that_transformers_makes(case: str, tmp_path: Path) -> None:
    made = checkpoint(case, tmp_path)
    check_tokenizer(made)
    content = json.loads(made.tokenizer.to_str())
    del content["model"]["vocab"]
    if content["normalizer"] is not None:
        content["normalizer"].pop("precompiled_charsmap", None)
    assert content == CASES[case]["tokenizer"]


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    """Of the file that the tokenizer step reads."""
    (tmp_path / "tokenizer.json").write_text(checkpoint(case, tmp_path).tokenizer.to_str(), encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [encoding.ids for encoding in tokenizer.encode_batch(PAIRS)] == CASES[case]["ids"]
    assert ids_of(tokenizer) == CASES[case]["hash"]


def ids_of(tokenizer: Tokenizer) -> str:
    """The hash of all ids of the texts, end to end."""
    texts = [
        text
        for path in (REFERENCE / "texts.json", TINY / "texts.json", TINY / "corpus.json")
        for text in json.loads(path.read_text())
    ]
    ids = [i for encoding in tokenizer.encode_batch([*texts, *unicode_texts()]) for i in encoding.ids]
    return hashlib.sha256(np.array(ids, np.int32).tobytes()).hexdigest()


def as_vocabulary(folder: Path) -> None:
    """The folder has vocab.txt in place of tokenizer.json, as what BERT's own class wrote."""
    path = folder / "tokenizer.json"
    ids = json.loads(path.read_text())["model"]["vocab"]
    (folder / BERT).write_text("".join(f"{piece}\n" for piece in sorted(ids, key=ids.__getitem__)))
    path.unlink()
    edit(folder / "tokenizer_config.json", lambda config: config.update(tokenizer_class="BertTokenizer"))


@pytest.mark.parametrize("name", ["bert-cls", "nomic-bert"])
def test_a_family_is_built_of_it(name: str, tmp_path: Path) -> None:
    folder = copied(name, tmp_path)
    as_vocabulary(folder)
    written = graphs(folder, tmp_path / "built")
    tokenizer = Tokenizer.from_str(written["tiny-tokenizer/1/tokenizer.json"].decode())
    tokenizer.enable_truncation(64)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(json.loads((TINY / "texts.json").read_text()))]
    assert [i for row in ids for i in row] == np.load(TINY / name / "expected.npz")["token_ids"].tolist()


def test_another_vocabulary_is_another_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied("bert-cls", tmp_path)
    as_vocabulary(folder)
    command = [str(folder), "--repository", str(tmp_path / "repository")]
    assert make.main(command) == 0
    assert make.main(command) == 0
    assert "up to date" in capsys.readouterr().out
    (folder / BERT).write_text((folder / BERT).read_text().replace("##s\n", "##\u00df\n"))
    assert make.main(command) == 0
    assert "up to date" not in capsys.readouterr().out


Change = Callable[[Path], object]


def config(**values: Any) -> Change:
    return lambda folder: (folder / "tokenizer_config.json").write_text(json.dumps(values))


def vocabulary(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def appended(content: bytes) -> Change:
    """More fields of the message, which go before those of the same number."""
    return vocabulary(XLM_ROBERTA, (FOLDER / XLM_ROBERTA).read_bytes() + content)


REFUSED: dict[str, tuple[str, Change, str]] = {
    "another class": (
        "bert",
        config(tokenizer_class="MPNetTokenizer"),
        r"it has vocab.txt, of which no MPNetTokenizer is made here: write one with transformers",
    ),
    "a class in config.json": (
        "bert",
        lambda folder: edit(
            folder / "config.json", lambda said: said.update(tokenizer_class="BertJapaneseTokenizer")
        ),
        "no BertJapaneseTokenizer is made here",
    ),
    "another file of the class": ("bert", config(tokenizer_class="XLMRobertaTokenizer"), "no XLMRobertaTokenizer"),
    "a second vocabulary": (
        "bert",
        vocabulary("tokenizer.model", b""),
        "it has vocab.txt, tokenizer.model, of which",
    ),
    "merges": ("bert", vocabulary("vocab.json", b"{}"), "it has vocab.txt, vocab.json, of which"),
    "no vocabulary": ("bert", lambda folder: (folder / BERT).unlink(), r"looked in .*\): write one"),
    "bytes": ("bert", vocabulary(BERT, b"[UNK]\n\xff\xfe\n"), "vocab.txt cannot be read: .*UTF-8"),
    "no word for what it does not know": (
        "bert",
        vocabulary(BERT, b"[CLS]\n[SEP]\n[PAD]\n"),
        r"vocab.txt fails on words that are not in its vocabulary: .*Missing \[UNK\]",
    ),
    "no token around a text": (
        "bert",
        config(cls_token=None),
        "has no cls_token, and a BertTokenizer is not made",
    ),
    "a token that is none": ("bert", config(cls_token=3), "cls_token .* must be a JSON object"),
    "flags that are none": ("bert", config(do_lower_case="no"), 'do_lower_case = "no"; it must be true or false'),
    "another id": (
        "bert",
        config(added_tokens_decoder={"7": {"content": "[Q]", "special": True}}),
        r'has "\[Q\]" as token 7, tokenizer.json as 1072: they are of two tokenizers',
    ),
    "another id, as transformers 4": (
        "bert",
        lambda folder: (folder / "added_tokens.json").write_text('{"[Q]": 7}'),
        r'added_tokens.json has "\[Q\]" as token 7',
    ),
    "ids that are none": (
        "bert",
        config(added_tokens_decoder={"x": {"content": "[Q]"}}),
        "has 'x' as an id in added_tokens_dec",
    ),
    "named tokens of one's own": (
        "bert",
        config(extra_special_tokens={"query": "[Q]"}),
        "must be a list of texts",
    ),
    "no protobuf": ("xlm-roberta", vocabulary(XLM_ROBERTA, b"\xff"), "is no SentencePiece model"),
    "nothing": ("xlm-roberta", vocabulary(XLM_ROBERTA, b""), "another model than XLM-RoBERTa's"),
    "byte pairs": ("xlm-roberta", appended(b"\x12\x02\x18\x02"), "another model than XLM-RoBERTa's"),
    "bytes in place of unknown letters": ("xlm-roberta", appended(b"\x12\x03\x98\x02\x01"), "another model than"),
    "no space before the first word": ("xlm-roberta", appended(b"\x1a\x02\x18\x00"), "another model than"),
    "spaces that count": ("xlm-roberta", appended(b"\x1a\x02\x20\x00"), "another model than"),
    "a piece of the user's": ("xlm-roberta", appended(b"\x0a\x05\x0a\x01Q\x18\x04"), "another model than"),
    "a piece without a score": (
        "xlm-roberta",
        appended(b"\x0a\x08\x0a\x01Q\x15\x00\x00\xc0\x7f"),
        "has pieces with scores that are not finite",
    ),
    "a broken normalisation": ("xlm-roberta", appended(b"\x1a\x03\x12\x01Q"), "cannot be read: .*charsmap"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_converted(case: str, tmp_path: Path) -> None:
    name, change, words = REFUSED[case]
    made = checkpoint(name, tmp_path)
    check_tokenizer(made)
    change(tmp_path)
    with pytest.raises(BuildError, match=words) as refused:
        check_tokenizer(Checkpoint(tmp_path))
    assert "\n" not in str(refused.value)


def written(case: str, folder: Path, kind: str, **parts: Any) -> Checkpoint:
    """The case with the tokenizer.json that is made of it, some parts of which are others."""
    made = json.loads(checkpoint(case, folder).tokenizer.to_str())
    for name in (BERT, XLM_ROBERTA):
        (folder / name).unlink(missing_ok=True)
    made["model"] |= parts.pop("model", {})
    (folder / "tokenizer.json").write_text(json.dumps(made | parts))
    config(tokenizer_class=kind)(folder)
    return Checkpoint(folder)


METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
UNLIKE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "words by spaces": ("bert", "BertTokenizer", {"pre_tokenizer": {"type": "WhitespaceSplit"}}),
    "longer words": ("bert", "BertTokenizerFast", {"model": {"max_input_chars_per_word": 200}}),
    "no ends": ("bert", "BertTokenizer", {"post_processor": None}),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_a_class_that_does_not_go_by_the_file(case: str, tmp_path: Path) -> None:
    """transformers 5 passes over what the file says there; it keeps to it by the general class."""
    name, kind, parts = UNLIKE[case]
    check_tokenizer(written(name, tmp_path, kind))
    check_tokenizer(written(name, tmp_path, "PreTrainedTokenizerFast", **parts))
    with pytest.raises(BuildError, match=r"tokenizer_class \w+, as which transformers 5 makes other tokens of"):
        check_tokenizer(written(name, tmp_path, kind, **parts))


def test_a_class_that_goes_by_the_file_as_it_wrote_it(tmp_path: Path) -> None:
    """Llama's has other steps where it is told to be as it was before."""
    shutil.copytree(TINY / "qwen2", tmp_path / "qwen2")
    config(tokenizer_class="Qwen2Tokenizer")(tmp_path / "qwen2")
    check_tokenizer(Checkpoint(tmp_path / "qwen2"))
    folder = shutil.copytree(TINY / "llama", tmp_path / "llama")
    steps = json.loads((TINY / "mistral" / "tokenizer.json").read_text())
    steps |= {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "first", "split": False}}
    (folder / "tokenizer.json").write_text(json.dumps(steps))
    config(tokenizer_class="LlamaTokenizer")(folder)
    check_tokenizer(Checkpoint(folder))
    config(tokenizer_class="LlamaTokenizer", legacy=True)(folder)
    with pytest.raises(BuildError, match="tokenizer_class LlamaTokenizer, as which transformers 5 makes other"):
        check_tokenizer(Checkpoint(folder))


def test_a_file_that_xlm_robertas_class_does_not_go_by(tmp_path: Path) -> None:
    """As bge-m3's: transformers 5 reads the words alone, and so there are the tokens that it gives of them."""
    charsmap = json.loads(checkpoint("xlm-roberta", tmp_path).tokenizer.to_str())["normalizer"]
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": [charsmap, spaces]},
        "pre_tokenizer": METASPACE,
    }
    same = written("xlm-roberta", tmp_path, "XLMRobertaTokenizer")
    check_tokenizer(same)
    assert same.made_tokenizer is None
    made = written("xlm-roberta", tmp_path, "XLMRobertaTokenizerFast", **parts)
    check_tokenizer(made)
    assert made.made_tokenizer is not None
    (tmp_path / "made.json").write_text(made.made_tokenizer, encoding="utf-8")
    assert ids_of(Tokenizer.from_file(str(tmp_path / "made.json"))) == CASES["xlm-roberta"]["hash"]
    general = written("xlm-roberta", tmp_path, "PreTrainedTokenizerFast", **parts)
    assert general.made_tokenizer is None
    assert ids_of(general.tokenizer) != CASES["xlm-roberta"]["hash"]


def test_a_file_that_t5s_class_does_not_go_by(tmp_path: Path) -> None:
    """Words and the token behind a text are those of the class, as the reference's ids are."""
    parts = {"pre_tokenizer": METASPACE, "post_processor": None}
    folder = shutil.copytree(TINY / "t5", tmp_path / "t5")
    edit(folder / "tokenizer.json", lambda content: content.update(parts))
    made = Checkpoint(folder)
    check_tokenizer(made)
    reference, texts = np.load(TINY / "t5" / "expected.npz"), json.loads((TINY / "texts.json").read_text())
    ids = rows(reference["token_ids"], reference["token_counts"])
    assert made.made_tokenizer is not None
    assert [encoding.ids[:143] for encoding in made.tokenizer.encode_batch(texts)] == [row[:143] for row in ids]
    config(tokenizer_class="PreTrainedTokenizerFast")(folder)
    assert Checkpoint(folder).made_tokenizer is None


def test_an_unknown_word_of_another_name(tmp_path: Path) -> None:
    made = written("bert", tmp_path, "BertTokenizer")
    config(unk_token="<unk>", tokenizer_class="BertTokenizer")(tmp_path)
    edit(
        tmp_path / "tokenizer.json",
        lambda content: content["added_tokens"].append(
            {**content["added_tokens"][0], "content": "<unk>", "id": 9}
        ),
    )
    with pytest.raises(BuildError, match=r"tokenizer_config.json fails on words that are not in its vocabulary"):
        check_tokenizer(Checkpoint(made.folder))


def test_a_class_that_knows_another_kind_of_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As paraphrase-multilingual-MiniLM was saved once: transformers 5 reads nothing but unknown words."""
    check_tokenizer(written("xlm-roberta", tmp_path, "XLMRobertaTokenizer"))
    assert not capsys.readouterr().out
    check_tokenizer(written("xlm-roberta", tmp_path, "BertTokenizer"))
    assert "tokens are those of the file, as in transformers 4" in capsys.readouterr().out


def test_a_file_that_pads_and_cuts(tmp_path: Path) -> None:
    """The step pads and cuts by itself."""
    padding = {"strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    check_tokenizer(written("bert", tmp_path, "BertTokenizer", padding=padding, truncation=cut))
