"""The tokenizer of a checkpoint without `tokenizer.json`, made of its vocabulary as transformers 5 makes it.

WordPiece of BERT's `vocab.txt` and Unigram of XLM-RoBERTa's `sentencepiece.bpe.model`; no other class is written.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, text_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from build.errors import BuildError
from build.sources.files import is_listed, own_file
from build.sources.settings import LARGEST, Settings, read_json

BERT, XLM_ROBERTA = "BertTokenizer", "XLMRobertaTokenizer"
CAMEMBERT, DEBERTA, ROBERTA = "CamembertTokenizer", "DebertaV2Tokenizer", "RobertaTokenizer"
LLAMA, QWEN2, T5 = "LlamaTokenizer", "Qwen2Tokenizer", "T5Tokenizer"
CLASSES = {
    "bert": BERT,
    "camembert": CAMEMBERT,
    "deberta-v2": DEBERTA,
    "distilbert": BERT,
    "electra": BERT,
    "gte": XLM_ROBERTA,
    "mpnet": "MPNetTokenizer",
    "nomic_bert": BERT,
    "qwen2": QWEN2,
    "qwen3": QWEN2,
    "roberta": ROBERTA,
    "t5": T5,
    "xlm-roberta": XLM_ROBERTA,
}
"""`model_type` -> transformers' tokenizer, where no file names a class."""

VOCABULARIES = {BERT: "vocab.txt", XLM_ROBERTA: "sentencepiece.bpe.model"}
OTHERS = ("spiece.model", "tokenizer.model", "vocab.json", "tiktoken.model", "tekken.json")
"""Vocabularies that nothing is made of; some of them transformers prefers to the class's own."""

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
"""What transformers 4 wrote; 5 reads them where TOKENIZER_CONFIG has no `added_tokens_decoder`."""

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULTS = {
    BERT: dict(zip(NAMED[2:], ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"), strict=True)),
    DEBERTA: dict(zip(NAMED, ("[CLS]", "[SEP]", "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"), strict=True)),
    T5: {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    XLM_ROBERTA: dict(zip(NAMED, ("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>"), strict=True)),
}
"""The classes' own special tokens."""

UNIGRAM, NORMAL, UNKNOWN, CONTROL = 1, 1, 2, 3
SENTENCEPIECE = """
name: "sentencepiece_model.proto" package: "sentencepiece" syntax: "proto2"
message_type {
  name: "Piece"
  field { name: "piece" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "score" number: 2 label: LABEL_OPTIONAL type: TYPE_FLOAT }
  field { name: "type" number: 3 label: LABEL_OPTIONAL type: TYPE_INT32 default_value: "1" }
}
message_type {
  name: "Trainer"
  field { name: "model_type" number: 3 label: LABEL_OPTIONAL type: TYPE_INT32 default_value: "1" }
  field { name: "byte_fallback" number: 35 label: LABEL_OPTIONAL type: TYPE_BOOL }
}
message_type {
  name: "Normalizer"
  field { name: "precompiled_charsmap" number: 2 label: LABEL_OPTIONAL type: TYPE_BYTES }
  field { name: "add_dummy_prefix" number: 3 label: LABEL_OPTIONAL type: TYPE_BOOL default_value: "true" }
  field { name: "remove_extra_whitespaces" number: 4 label: LABEL_OPTIONAL type: TYPE_BOOL default_value: "true" }
  field { name: "escape_whitespaces" number: 5 label: LABEL_OPTIONAL type: TYPE_BOOL default_value: "true" }
}
message_type {
  name: "Model"
  field { name: "pieces" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".sentencepiece.Piece" }
  field { name: "trainer_spec" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE
          type_name: ".sentencepiece.Trainer" }
  field { name: "normalizer_spec" number: 3 label: LABEL_OPTIONAL type: TYPE_MESSAGE
          type_name: ".sentencepiece.Normalizer" }
}
"""
"""What is read of google/sentencepiece's own sentencepiece_model.proto."""


def convert(folder: Path, checkpoint: Path, kind: str) -> Tokenizer:
    """The tokenizer of transformers' class `kind`, of what lies in a folder of the `checkpoint`'s.

    Raises BuildError for another class, and for a vocabulary that is not like the class's own.
    """
    there = [name for name in (*VOCABULARIES.values(), *OTHERS) if is_listed(folder / name)]
    if kind not in VOCABULARIES or there != [VOCABULARIES[kind]]:
        instead = f"; it has {', '.join(there)}, of which no {kind or 'tokenizer'} is made here" if there else ""
        raise BuildError(
            f"the checkpoint has no tokenizer.json (looked in {folder}){instead}: write one with transformers, "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    path = own_file(folder / VOCABULARIES[kind], checkpoint)
    if (size := path.stat().st_size) > LARGEST:
        raise BuildError(f"{path} has {size >> 20} MB: no vocabulary is larger than {LARGEST >> 20} MB")
    said = _said(folder, checkpoint, kind)
    named = _named(said)
    words = {name: token.content for name, token in named.items()}
    listed = said.inner("added_tokens_decoder")
    added = [token(listed, i) for i in _in_order(listed)] if listed is not None else []
    extra = said.words("extra_special_tokens", default=[])
    try:
        tokenizer = _word_piece_of(path, said, words) if kind == BERT else _unigram_of(path, said, words)
        tokens = [*added, *named.values(), *(AddedToken(content, special=True) for content in extra)]
        for one in tokens:
            one.special = one.special or one.content in words.values()
        tokenizer.add_tokens(tokens)
        tokenizer.post_processor = _ends(tokenizer, kind, words)
    except BuildError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise BuildError(f"{path} cannot be read: {error}") from None
    check_unknown(tokenizer, path)
    return tokenizer


def of_class(tokenizer: Tokenizer, charsmap: bytes, folder: Path, checkpoint: Path, kind: str) -> Tokenizer:
    """What the class `kind` makes of a `tokenizer.json`, of which it takes the words and does the rest itself.

    `charsmap` is that of the file's Precompiled normalizer.
    """
    said = _said(folder, checkpoint, kind)
    named = {name: token.content for name, token in _named(said).items()}
    if kind == BERT:
        words = tokenizer.get_vocab(with_added_tokens=False)
        made = _word_piece(models.WordPiece(words, unk_token=named["unk_token"]), said)
    elif kind == DEBERTA:
        made = _deberta(tokenizer.model, said)
    else:
        made = _unigram(tokenizer.model, charsmap, said)
    made.add_tokens([token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())])
    made.post_processor = _ends(made, kind, named)
    check_unknown(made, said.path)
    return made


def of_pairs(tokenizer: Tokenizer, kind: str, said: Settings) -> Tokenizer:
    """What LLAMA or QWEN2 makes of a `tokenizer.json`, of which it takes words, merges and ends alone."""
    content = json.loads(tokenizer.to_str())
    is_llama = kind == LLAMA
    content["model"] |= {
        "unk_token": None,
        "fuse_unk": is_llama,
        "byte_fallback": is_llama,
        "ignore_merges": False,
    }
    made = Tokenizer.from_str(json.dumps(content))
    has_space = said.flag("add_prefix_space", default=is_llama)
    if is_llama:
        scheme = "never" if not has_space else "always" if said.flag("legacy", default=False) else "first"
        made.normalizer, made.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    else:
        made.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=has_space, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    return made


QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PROBES = (
    "Plants make sugar, don't they? ",
    "  two  spaces, a\ttab,\na line\u3000and\u00a0more",
    "Ca\u0301f\u00e9 \u0130 \u00df \u4e2d\u6587\u3002 \ufb01 \u00bd \uff21 \U0001f600\u200d x\u200by\x07z",
    "1234.5 a-b_c [MASK] <mask> <s>x </s>",
    "w" * 150,
)
"""What tokenizers differ in: spaces, letters in several forms, signs, numbers, special tokens, a long word."""


def difference(tokenizer: Tokenizer, other: Tokenizer) -> str | None:
    """A text of which the two make different tokens, alone or in a pair."""
    for probe in PROBES:
        first, second = ([one.encode(probe), one.encode(probe, "b")] for one in (tokenizer, other))
        if [(one.ids, one.type_ids) for one in first] != [(one.ids, one.type_ids) for one in second]:
            return probe
    return None


def check_unknown(tokenizer: Tokenizer, path: Path) -> None:
    """Raises BuildError where a tokenizer of a file fails on letters that it does not know."""
    try:
        tokenizer.encode("\U00013000")  # a hieroglyph
    except Exception as error:  # tokenizers raises nothing narrower
        raise BuildError(f"{path} fails on words that are not in its vocabulary: {error}") from None


def _said(folder: Path, checkpoint: Path, kind: str) -> Settings:
    """What the class is told, all that is said of tokens in the spelling of transformers 5."""

    def values(name: str) -> dict[str, Any]:
        path = folder / name
        found = read_json(own_file(path, checkpoint)) if is_listed(path) else {}
        Settings(path, found)  # raises BuildError for what is no object
        return dict(found)

    said = values(TOKENIZER_CONFIG)
    if "additional_special_tokens" in said and not said.get("extra_special_tokens"):
        said["extra_special_tokens"] = said.pop("additional_special_tokens")
    if "added_tokens_decoder" not in said:
        older = values(SPECIAL_TOKENS)
        more = older.pop("additional_special_tokens", [])
        said = {"extra_special_tokens": more} | said
        said |= {
            name: token | {"special": True} if isinstance(token, dict) else token for name, token in older.items()
        }
        special = [token.get("content") if isinstance(token, dict) else token for token in map(said.get, NAMED)]
        if said["extra_special_tokens"]:
            special += Settings(folder / TOKENIZER_CONFIG, said).words("extra_special_tokens")
        said["added_tokens_decoder"] = {
            str(i): {"content": content, "special": content in special}
            for content, i in values(ADDED_TOKENS).items()
        }
    said["extra_special_tokens"] = said.get("extra_special_tokens") or []  # an empty object, too, is none
    if missing := [name for name in DEFAULTS[kind] if name in said and said[name] is None]:
        raise BuildError(f"{folder / TOKENIZER_CONFIG} has no {missing[0]}, and a {kind} is not made without")
    return Settings(folder / TOKENIZER_CONFIG, DEFAULTS[kind] | said)


def _in_order(listed: Settings) -> list[str]:
    """The ids in `added_tokens_decoder`, which are keys and so texts."""
    if wrong := [i for i in listed if not (i.isascii() and i.isdecimal())]:
        raise BuildError(f"{listed.path} has {wrong[0]!r} as an id in added_tokens_decoder")
    return sorted(listed, key=int)


def token(said: Settings, name: str) -> AddedToken:
    """A token, which is written as it is or as an object; BuildError where there is none."""
    if isinstance(content := said.find(name), str):
        return AddedToken(content, special=True)
    if (flags := said.inner(name)) is None:
        raise BuildError(f"{said.path} has no token {name}")
    special = flags.flag("special", default=False)
    return AddedToken(
        flags.word("content"),
        special=special,
        single_word=flags.flag("single_word", default=False),
        lstrip=flags.flag("lstrip", default=False),
        rstrip=flags.flag("rstrip", default=False),
        normalized=flags.flag("normalized", default=not special),
    )


def _named(said: Settings) -> dict[str, AddedToken]:
    return {name: token(said, name) for name in NAMED if name in said}


def _word_piece_of(path: Path, said: Settings, words: dict[str, str]) -> Tokenizer:
    return _word_piece(models.WordPiece.from_file(str(path), unk_token=words["unk_token"]), said)


def _word_piece(model: models.Model, said: Settings) -> Tokenizer:
    """`BertTokenizer`."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=said.flag("tokenize_chinese_chars", default=True),
        strip_accents=said.flag("strip_accents") if "strip_accents" in said else None,
        lowercase=said.flag("do_lower_case", default=True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _unigram_of(path: Path, said: Settings, words: dict[str, str]) -> Tokenizer:
    """Of which the first four ids are fairseq's and not SentencePiece's."""
    file = _sentencepiece(path)
    first = [(words[f"{name}_token"], 0.0) for name in ("bos", "pad", "eos", "unk")]
    pieces = [(piece.piece, piece.score) for piece in file.pieces[3:]]
    model = models.Unigram([*first, *pieces, (words["mask_token"], 0.0)], 3, byte_fallback=False)
    return _unigram(model, file.normalizer_spec.precompiled_charsmap, said)


def _unigram(model: models.Model, charsmap: bytes, said: Settings) -> Tokenizer:
    """`XLMRobertaTokenizer`."""
    tokenizer = Tokenizer(model)
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    prepend = "always" if said.flag("add_prefix_space", default=True) else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme=prepend)]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    return tokenizer


def _deberta(model: models.Model, said: Settings) -> Tokenizer:
    """`DebertaV2Tokenizer`, which passes over a file's own normalisation."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [
            *([normalizers.Lowercase()] if said.flag("do_lower_case", default=False) else []),
            normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " "),
            normalizers.NFC(),
            normalizers.Strip(left=False, right=True),
        ]
    )
    prepend = "always" if said.flag("add_prefix_space", default=True) else "first"
    punctuation = [pre_tokenizers.Punctuation()] if said.flag("split_by_punct", default=False) else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*punctuation, pre_tokenizers.Metaspace(prepend_scheme=prepend)]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    return tokenizer


def _sentencepiece(path: Path) -> Any:
    """The `Model` in a file; BuildError where transformers and SentencePiece would read it in different ways."""
    pool = DescriptorPool()
    pool.Add(text_format.Parse(SENTENCEPIECE, descriptor_pb2.FileDescriptorProto()))
    model = GetMessageClass(pool.FindMessageTypeByName("sentencepiece.Model"))()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise BuildError(f"{path} is no SentencePiece model: {error}") from None
    if not all(math.isfinite(piece.score) for piece in model.pieces):
        raise BuildError(f"{path} has pieces with scores that are not finite: download it again")
    first = [(piece.piece, piece.type) for piece in model.pieces[:3]]
    rule = model.normalizer_spec
    plain = rule.add_dummy_prefix and rule.remove_extra_whitespaces and rule.escape_whitespaces
    if (
        first != [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
        or any(piece.type != NORMAL for piece in model.pieces[3:])
        or model.trainer_spec.model_type != UNIGRAM
        or model.trainer_spec.byte_fallback
        or not plain
    ):
        raise BuildError(
            f"{path} is another model than XLM-RoBERTa's: unigrams, normal pieces behind <unk>, <s> and </s>"
        )
    return model


def _ends(tokenizer: Tokenizer, kind: str, words: dict[str, str]) -> processors.TemplateProcessing:
    """What stands around a text, and around a pair."""
    if kind in (BERT, DEBERTA):
        first, last = words["cls_token"], words["sep_token"]
        single, pair = [first, "$A", last], [first, "$A", last, "$B:1", f"{last}:1"]
    elif kind == T5:
        first = last = words["eos_token"]
        single, pair = ["$A", last], ["$A", last, "$B", last]
    else:
        first, last = words["bos_token"], words["eos_token"]
        single, pair = [first, "$A", last], [first, "$A", last, last, "$B", last]
    return processors.TemplateProcessing(
        single, pair, [(end, tokenizer.token_to_id(end)) for end in (first, last)]
    )
