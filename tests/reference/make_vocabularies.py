"""Write vocabularies/: what transformers makes of checkpoints that have a vocabulary and no tokenizer.json.

It needs requirements.txt, which nothing else in this repository may need. To run it:

    python tests/reference/make_vocabularies.py

vocab.txt and sentencepiece.bpe.model come of tiny/corpus.json; the second is trained by sentencepiece with the
normalisation that XLM-RoBERTa's has. cases.json has, for each case, what lies beside the vocabulary, `tokenizer`,
which is transformers' own tokenizer.json without its vocabulary, `ids` of tiny's pairs, and `hash`, the sha256 of
the int32 ids, end to end, of texts.json, tiny's texts and corpus, and `unicode_texts`.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import transformers

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "vocabularies"
CORPUS: list[str] = json.loads((HERE / "tiny" / "corpus.json").read_text(encoding="utf-8"))
NAMES = ("texts.json", "tiny/texts.json", "tiny/corpus.json")
PAIRS = json.loads((HERE / "tiny" / "pairs.json").read_text(encoding="utf-8"))
BERT, XLM_ROBERTA = {"model_type": "bert"}, {"model_type": "xlm-roberta"}
CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NAMED = {f"{name.lower()}_token": f"[{name}]" for name in ("CLS", "MASK", "PAD", "SEP", "UNK")}


def token(content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    """A token as transformers 4 writes it."""
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": special}
    return {"content": content, **plain, **flags}


def without_special(token: dict[str, Any]) -> dict[str, Any]:
    """As special_tokens_map.json has it."""
    return {name: value for name, value in token.items() if name != "special"}


def as_object(content: str, **flags: bool) -> dict[str, Any]:
    return {"__type": "AddedToken", **token(content, **flags)}


MASK = as_object("<mask>", lstrip=True)
CASES: dict[str, dict[str, Any]] = {
    "bert": {"config.json": BERT},
    "bert, as its own files say": {"config.json": BERT, CONFIG: {"do_lower_case": True, "model_max_length": 512}},
    "nomic": {"config.json": {"model_type": "nomic_bert"}},
    "cased": {"config.json": BERT, CONFIG: {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}},
    "accents are kept": {"config.json": BERT, CONFIG: {"strip_accents": False}},
    "cased without accents": {"config.json": BERT, CONFIG: {"strip_accents": True, "do_lower_case": False}},
    "no characters": {"config.json": BERT, CONFIG: {"tokenize_chinese_chars": False}},
    "a slow one": {"config.json": BERT, CONFIG: {"do_basic_tokenize": False, "never_split": ["the"]}},
    "special tokens as transformers 4": {
        "config.json": BERT,
        CONFIG: {"tokenizer_class": "BertTokenizer", **NAMED, "strip_accents": None},
        SPECIAL: {name: without_special(token(content)) for name, content in NAMED.items()},
        ADDED: {},
    },
    "a list of added tokens": {
        "config.json": BERT,
        CONFIG: {
            "tokenizer_class": "BertTokenizerFast",
            **NAMED,
            "added_tokens_decoder": {"0": token("[PAD]"), "1": token("[UNK]"), "4": token("[MASK]")},
            "extra_special_tokens": {},
        },
        SPECIAL: {"cls_token": "[NONE]"},
    },
    "other names": {"config.json": BERT, CONFIG: {"cls_token": "[SEP]", "sep_token": "[CLS]"}},
    "tokens of one's own": {
        "config.json": BERT,
        CONFIG: {"additional_special_tokens": ["[Q]", "[D]"]},
        SPECIAL: {"additional_special_tokens": ["[Q]", "[D]"]},
    },
    "words of one's own": {"config.json": BERT},
    "xlm-roberta": {"config.json": XLM_ROBERTA},
    "xlm-roberta, as its own files say": {
        "config.json": XLM_ROBERTA,
        CONFIG: {"tokenizer_class": "XLMRobertaTokenizer", "mask_token": MASK, "bos_token": "<s>"},
        SPECIAL: {"mask_token": without_special(token("<mask>", lstrip=True)), "bos_token": "<s>"},
    },
    "a bert": {"config.json": BERT, CONFIG: {"tokenizer_class": "XLMRobertaTokenizerFast"}},
    "no space before": {"config.json": XLM_ROBERTA, CONFIG: {"add_prefix_space": False}},
}


def word_pieces() -> list[str]:
    """Letters of the corpus, common pieces and whole words, cased and not, and odd lines."""
    words = Counter(word for text in CORPUS for word in (*text.split(), *text.lower().split()))
    letters = sorted({letter for word in words for letter in word})
    parts = Counter(
        word[start:end] for word in words for start in range(len(word)) for end in range(start + 2, start + 5)
    )
    whole = [word for word, _ in words.most_common(300)]
    inside = [f"##{piece}" for piece, _ in parts.most_common(300)]
    odd = ["\u4e2d", "\u00e9", "caf\u00e9", "embed\u3000", "\u0130", "##\u0307", "\u3000"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return list(dict.fromkeys([*special, *letters, *(f"##{one}" for one in letters), *whole, *inside, *odd]))


def sentence_pieces() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=500,
        character_coverage=0.999,
        normalization_rule_name="nmt_nfkc",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def unicode_texts() -> list[str]:
    """Every character of the first two planes, 32 in a text, each among letters."""
    characters = [chr(code) for code in range(1, 0x20000) if not 0xD800 <= code < 0xE000]
    return ["a".join(characters[i : i + 32]) for i in range(0, len(characters), 32)]


def texts() -> list[str]:
    return [text for name in NAMES for text in json.loads((HERE / name).read_text(encoding="utf-8"))]


def main() -> None:
    """Writes the folder beside this file."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "vocab.txt").write_text("".join(f"{piece}\n" for piece in word_pieces()), encoding="utf-8")
    (FOLDER / "sentencepiece.bpe.model").write_bytes(sentence_pieces())
    first = len(word_pieces())
    CASES["words of one's own"][ADDED] = {"Embedding": first, "green plants": first + 1}
    cases = {}
    for i, (case, files) in enumerate(CASES.items()):
        with tempfile.TemporaryDirectory() as folder:
            name = files.get(CONFIG, {}).get("tokenizer_class", "")
            is_bert = "XLM" not in name and files["config.json"]["model_type"] != "xlm-roberta"
            vocabulary = "vocab.txt" if is_bert else "sentencepiece.bpe.model"
            Path(folder, vocabulary).write_bytes((FOLDER / vocabulary).read_bytes())
            for path, content in files.items():
                Path(folder, path).write_text(json.dumps(content))
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
            written = json.loads(tokenizer.backend_tokenizer.to_str())
        del written["model"]["vocab"]
        if (normaliser := written["normalizer"]) is not None:
            normaliser.pop("precompiled_charsmap", None)
        ids = [i for row in tokenizer([*texts(), *unicode_texts()])["input_ids"] for i in row]
        cases[case] = {
            "vocabulary": vocabulary,
            "files": files,
            "tokenizer": written,
            "ids": [tokenizer(*pair)["input_ids"] for pair in PAIRS],
            "hash": hashlib.sha256(np.array(ids, np.int32).tobytes()).hexdigest(),
        }
    versions = {name: version(name) for name in ("transformers", "tokenizers", "sentencepiece", "protobuf")}
    text = ",\n".join(f"  {json.dumps(case)}: {json.dumps(content)}" for case, content in cases.items())
    (FOLDER / "cases.json").write_text(f'{{"versions": {json.dumps(versions)}, "cases": {{\n{text}\n}}}}\n')


if __name__ == "__main__":
    main()
