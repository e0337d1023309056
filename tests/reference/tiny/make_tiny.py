"""Write tiny checkpoints with random weights, one or more of each architecture, and what they must answer.

It reads texts.json, pairs.json and corpus.json beside it, and writes a folder per model there: all, or those that
are named. It needs ../requirements.txt, which nothing else in this repository may need. To run it:

    python tests/reference/tiny/make_tiny.py [NAME ...]

The tokenizers' vocabularies come of corpus.json, which stays as it is when texts and pairs are added.

Each text or pair is run alone, so nothing is padded, in float32 on one thread of the CPU. The same versions of
the packages write the same bytes again. A folder holds the checkpoint, the versions and hashes in expected.json,
and expected.npz. For an embedding model that has these, for the texts as they are, and again under names that
start with query_ for the texts behind the model's prompt for queries:

    embeddings       float32 [texts, dimension], as the checkpoint's own modules pool, project and normalise them
    TASK             (jina-v3-adapters, no prompt) the same with the adapter of each task, by its name
    half_embeddings  (qwen3-embedding, no prompt) the same, but cut to half the dimension before normalising
    token_ids        int32, the ids that the model is fed, truncated and with special tokens, text after text
    token_counts     int32 [texts], how many of token_ids belong to each text
    truncated        bool [texts], whether the text was longer than the window

and for a reranker token_ids, token_counts and truncated of the pairs, and:

    token_type_ids   (bert-cross-encoder, electra-cross-encoder, jina-reranker,
                     new-reranker) int32, one for each of token_ids
    logits           float32 [pairs], for qwen3-reranker the logit of "yes" less that of "no"
    scores           float32 [pairs], the sigmoid of logits, and so for qwen3-reranker the softmax's share of "yes"

A sparse model has token_ids, token_counts and truncated of the texts, and what is not zero in their vectors:

    indices          int32, text after text, ascending in each
    values           float32, one for each of indices
    value_counts     int32 [texts], how many of indices belong to each text

and the same under names that start with blank_ for the texts of ../blank.json.

A multi-vector model has, under names that start with query_, document_ and nothing, for texts as queries, as
documents and without a word on it, and under pair_ for the queries and passages of pairs:

    token_ids        int32, the ids that the model is fed, expanded and truncated, text after text
    token_counts     int32 [texts]
    vectors          float32 [all, dimension], those that count, text after text
    vector_counts    int32 [texts]
    maxsim           (pair_ only) float32 [pairs]

expected.json also has `bf16`, for whether a bound for bfloat16 means something: how far the reference itself is
from these when its weights and activations are bfloat16, as the lowest cosine or the largest difference of scores;
`sparse_bf16` is that of the sparse vectors of a model that has both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import re
import shutil
import string
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers as hf
from model2vec import StaticModel
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding
from sentence_transformers.sparse_encoder.modules import SpladePooling
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "sentence-transformers", "tokenizers", "safetensors", "numpy")
MODEL2VEC = (*PACKAGES, "model2vec")
TEXTS: list[str] = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))
PAIRS: list[tuple[str, str]] = [(q, p) for q, p in json.loads((HERE / "pairs.json").read_text(encoding="utf-8"))]
BLANK: list[str] = json.loads((HERE.parent / "blank.json").read_text(encoding="utf-8"))["texts"]
WINDOW = 64
RERANKER_WINDOW = 192
WIDE = 144
"""Of a model whose biases are alike from 91 places on."""
HIDDEN = 48
SIZES: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_attention_heads": 4}
Arrays = dict[str, Any]
LOAD: dict[str, Any] = {"device": "cpu", "local_files_only": True, "model_kwargs": {"dtype": torch.float32}}
BF16 = LOAD | {"model_kwargs": {"dtype": torch.bfloat16}}

TASK = "Given a web search query, retrieve relevant passages that answer the query"
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
BODY = "<Instruct>: {}\n<Query>: {}\n<Document>: {}"
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
QWEN_WORDS += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
JINA_TASKS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
    "text-matching": "",
}
PROMPTS = {  # the one for queries comes first
    "bert-cls": {"query": "query: ", "document": ""},
    "xlm-roberta": {"query": "query: ", "document": "passage: "},
    "deberta": {"query": "query: ", "document": ""},
    "distilbert": {"query": "query: ", "document": ""},
    "electra": {"query": "query: ", "document": ""},
    "mpnet": {"query": "query: ", "document": ""},
    "roberta": {"query": "", "document": ""},
    "camembert": {"query": "query: ", "document": "passage: "},
    "nomic-bert": {"search_query": "search_query: ", "search_document": "search_document: "},
    "nomic-bert-moe": {"query": "search_query: ", "passage": "search_document: "},
    "qwen3-embedding": {"query": f"Instruct: {TASK}\nQuery:", "document": ""},
    "gte": {"query": "query: ", "document": ""},
    "jina-bert": {"query": "query: ", "document": ""},
    "jina-bert-code": {"query": "query: ", "document": ""},
    "new": {"query": "query: ", "document": ""},
    "qwen2": {"query": f"Instruct: {TASK}\nQuery: ", "document": ""},
    "mistral": {"query": f"Instruct: {TASK}\nQuery: ", "document": ""},
    "jina-v3": {"query": "query: ", "document": ""},
    "jina-v3-adapters": JINA_TASKS,
    "llama": {"query": "query: ", "document": "passage: "},
    "gemma3": {"query": "task: search result | query: ", "document": "title: none | text: "},
    "bert-colbert": {"query": "[Q] ", "document": "[D] "},
    "modernbert": {"query": "search_query: ", "document": "search_document: "},
    "static": {"query": "query: ", "document": ""},
    "t5": {"query": "query: ", "document": ""},
    "t5-gated": {"query": "", "document": ""},
    "voyage": {"query": "query: ", "document": "passage: "},
}
CORPUS: list[str] = json.loads((HERE / "corpus.json").read_text(encoding="utf-8"))


def common_pieces(tokenizer: Tokenizer, inside: str = "") -> Counter[str]:
    """How often pieces of the corpus's words occur: letters seen twice, and the most useful longer pieces.

    The library's own trainers of WordPiece and Unigram give another vocabulary on every run.
    """
    counts: Counter[str] = Counter()
    for text in CORPUS:
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)):
            for start in range(len(word)):
                for end in range(start + 1, min(start + 10, len(word)) + 1):
                    counts[(inside if start else "") + word[start:end]] += 1

    def usefulness(piece: str) -> tuple[int, str]:
        return -counts[piece] * (len(piece.removeprefix(inside)) - 1), piece

    letters = sorted(p for p in counts if len(p.removeprefix(inside)) == 1 and counts[p] > 1)
    longer = sorted((p for p in counts if len(p.removeprefix(inside)) > 1), key=usefulness)[:360]
    return Counter({piece: counts[piece] for piece in letters + longer})


def wrap(tokenizer: Tokenizer, window: int = WINDOW, types: bool = False, **options: Any) -> Any:
    """The tokenizer as transformers saves it."""
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    fast: Any = hf.PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, model_max_length=window, model_input_names=names, **options)


def wordpiece(unused: int = 0) -> Any:
    tokenizer = Tokenizer(models.WordPiece({}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special: dict[str, Any] = {f"{s.lower()}_token": f"[{s}]" for s in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    spare = [f"[unused{i}]" for i in range(unused)]
    ids = {piece: i for i, piece in enumerate([*special.values(), *spare, *common_pieces(tokenizer, "##")])}
    tokenizer.model = models.WordPiece(ids, unk_token="[UNK]")
    ends = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    return wrap(tokenizer, types=True, **special)


def distilberts() -> Any:
    """The same words as its own class has them."""
    model = json.loads(wordpiece().backend_tokenizer.to_str())["model"]
    return hf.DistilBertTokenizer(vocab=model["vocab"], model_max_length=WINDOW)


def mpnets() -> Any:
    """The same words as its own class has them, behind RoBERTa's special tokens."""
    words = json.loads(wordpiece().backend_tokenizer.to_str())["model"]["vocab"]
    pieces = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>", *list(words)[5:]]
    return hf.MPNetTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=WIDE)


def unigram() -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    marks = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marks])
    pieces = common_pieces(tokenizer)
    scored = [(piece, math.log(count / pieces.total())) for piece, count in pieces.items()]
    special = [(piece, 0.0) for piece in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")]
    tokenizer.model = models.Unigram([*special[:4], *scored, special[4]], unk_id=3, byte_fallback=False)
    ends = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", ends)
    options: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    options |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": AddedToken("<mask>", lstrip=True)}
    return wrap(tokenizer, **options)


def camembert_pieces() -> Any:
    """The same words as its own class has them, which keeps places for three tokens that are none."""
    model = json.loads(unigram().backend_tokenizer.to_str())["model"]
    pieces: Any = [(piece, score) for piece, score in model["vocab"]]
    return hf.CamembertTokenizer(vocab=pieces, model_max_length=WINDOW)


def t5_pieces() -> Any:
    """The same words as its own class has them."""
    model = json.loads(unigram().backend_tokenizer.to_str())["model"]
    pieces: Any = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *map(tuple, model["vocab"][4:-1])]
    return hf.T5Tokenizer(vocab=pieces, extra_ids=2, model_max_length=WIDE)


def deberta_pieces() -> Any:
    """The same words as its own class has them."""
    model = json.loads(unigram().backend_tokenizer.to_str())["model"]
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    words = model["vocab"][4:-1]
    pieces: Any = [
        *((token, 0.0) for token in special),
        *((piece, score) for piece, score in words),
        ("[MASK]", 0.0),
    ]
    return hf.DebertaV2Tokenizer(vocab=pieces, model_max_length=WIDE)


def byte_pairs() -> Any:
    """GPT-2's, with RoBERTa's special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=620, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges: Any = [(left, right) for left, right in model["merges"]]
    return hf.RobertaTokenizer(vocab=model["vocab"], merges=merges, model_max_length=WINDOW)


def qwen(window: int, closing: str = "") -> Any:
    """Byte-level BPE; closing is the special token that the tokenizer puts after each text, if any."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    trainer = trainers.BpeTrainer(vocab_size=620, initial_alphabet=as_bytes.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if closing:
        ids = [(closing, tokenizer.token_to_id(closing))]
        template = processors.TemplateProcessing(f"$A {closing}", special_tokens=ids)
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, template])
    return wrap(tokenizer, window, padding_side="left", eos_token="<|im_end|>", pad_token="<|endoftext|>")


def modern() -> Any:
    """Byte-level BPE between [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = as_bytes
    trainer = trainers.BpeTrainer(vocab_size=620, initial_alphabet=as_bytes.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    special: dict[str, Any] = {f"{s.lower()}_token": f"[{s}]" for s in ("PAD", "UNK", "CLS", "SEP")}
    special["mask_token"] = AddedToken("[MASK]", lstrip=True)
    tokenizer.add_special_tokens(list(special.values()))
    ends = [(end, tokenizer.token_to_id(end)) for end in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ends)
    return wrap(tokenizer, **special)


def spaced_pairs(names: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary behind special tokens of `names`, and its merges, with spaces as ▁, trained word by word.

    Bytes stand for rare letters.
    """
    letters = Counter("".join(CORPUS))
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=560, show_progress=False)
    trained.train_from_iterator(("".join(c for c in text if letters[c] > 2) for text in CORPUS), trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = [*names, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    ids = {piece: i for i, piece in enumerate(pieces)}
    return ids, [(left, right) for left, right in model["merges"]]


def gemma() -> Any:
    """BPE over the whole text."""
    special: dict[str, Any] = {f"{s}_token": f"<{s}>" for s in ("pad", "eos", "bos", "unk", "mask")}
    ids, merges = spaced_pairs(special.values())
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    ends = [("<eos>", 1), ("<bos>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=ends)
    return wrap(tokenizer, **special)


def llamas(names: tuple[str, ...] = ("<unk>", "<s>", "</s>")) -> Tokenizer:
    """The first Llama's BPE over the whole text, with a ▁ before it, as files of transformers 4 have it."""
    ids, merges = spaced_pairs(names)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def mistrals() -> Any:
    """Llama's, with an end behind each text."""
    tokenizer = llamas()
    ends = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> <s> $B </s>", ends)
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return wrap(tokenizer, padding_side="left", **options)


LLAMA_WORDS = QWEN_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|")


def llama3s(window: int = WINDOW) -> Any:
    """Byte-level BPE that takes a whole word from the vocabulary first, with one token before each text."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA_WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    trainer = trainers.BpeTrainer(vocab_size=620, initial_alphabet=as_bytes.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    begin, end = special = ["<|begin_of_text|>", "<|end_of_text|>"]
    tokenizer.add_special_tokens(special)
    ids = [(begin, tokenizer.token_to_id(begin))]
    template = processors.TemplateProcessing(f"{begin} $A", f"{begin} $A {begin} $B:1", ids)
    as_bytes_after = processors.ByteLevel(trim_offsets=True)
    tokenizer.post_processor = processors.Sequence([as_bytes_after, template])
    return wrap(tokenizer, window, padding_side="left", bos_token=begin, eos_token=end, pad_token=end)


def rows(tokenizer: Any) -> int:
    """Rows of the table of embeddings: more than there are tokens, as in many published checkpoints."""
    return len(tokenizer) // 16 * 16 + 16


def randomise(model: Any, seed: int, norm: float = 1.0) -> Any:
    """The model with random weights: norms around norm, biases around 0, matrices that keep the scale."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            values = 0.15 * values + (norm if "norm" in name.lower() and name.endswith("weight") else 0.0)
        elif "embed" in name:
            values *= 0.15 if "position" in name or "type" in name else 0.3
        else:
            values *= 1.5 / math.sqrt(parameter.shape[1])
        parameter.data.copy_(values)
    return model


def save(folder: str | Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def lowest_cosine(found: Any, expected: Any) -> float:
    a, b = (np.asarray(one, np.float64) for one in (found, expected))
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def largest_difference(found: Any, expected: Any) -> float:
    return float(np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max())


def write_expected(name: str, arrays: Arrays, bf16: float, packages: Iterable[str] = PACKAGES) -> None:
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError(f"{name}: a result is not finite")
    folder = HERE / name
    np.savez_compressed(folder / "expected.npz", **arrays)
    weights = sorted(folder.rglob("*.safetensors"))
    hashes = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in weights}
    versions = {"python": platform.python_version()} | {p: version(p) for p in packages}
    made_with = {"versions": versions, "sha256": hashes, "bf16": round(bf16, 6)}
    (folder / "expected.json").write_text(json.dumps(made_with, indent=2) + "\n", encoding="utf-8")


def flat(lists: Iterable[list[int]]) -> NDArray[np.int32]:
    return np.asarray([number for numbers in lists for number in numbers], dtype=np.int32)


def tokens(name: str, inputs: list[Any], fed: list[list[int]], window: int) -> Arrays:
    """What the model was fed for the inputs, which tokenizer.json alone must give too."""
    tokenizer = Tokenizer.from_file(str(HERE / name / "tokenizer.json"))
    truncated = np.asarray([len(encoding.ids) > window for encoding in tokenizer.encode_batch(inputs)])
    tokenizer.enable_truncation(window)
    if [encoding.ids for encoding in tokenizer.encode_batch(inputs)] != fed:
        raise ValueError(f"{name}: the model is fed other ids than tokenizer.json gives")
    return {"token_ids": flat(fed), "token_counts": flat([len(ids)] for ids in fed), "truncated": truncated}


def embedder(name: str, network: Any, tokenizer: Any, *after: torch.nn.Module, window: int = WINDOW) -> None:
    save_embedder(name, network, tokenizer, *after)
    expect_embeddings(name, window)


def save_embedder(name: str, network: Any, tokenizer: Any, *after: torch.nn.Module) -> None:
    folder = str(HERE / name)
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as plain:
        save(plain, network, tokenizer)
        modules = [Transformer(plain, model_kwargs={"dtype": "auto"}), *after, Normalize()]
        whole = SentenceTransformer(modules=modules, prompts=PROMPTS[name], device="cpu")
        whole.save(folder, create_model_card=False)


def expect_embeddings(name: str, window: int = WINDOW) -> None:
    folder = str(HERE / name)
    load = LOADERS.get(name, SentenceTransformer)
    model = load(folder, **LOAD)
    arrays: Arrays = {}
    for start, prompt in (("", ""), ("query_", next(iter(PROMPTS[name].values())))):
        inputs = [prompt + text for text in TEXTS]
        fed = [model.preprocess([text])["input_ids"][0].tolist() for text in inputs]
        found = tokens(name, inputs, fed, window)
        found["embeddings"] = np.stack([model.encode(text, prompt=prompt) for text in TEXTS])
        arrays |= {start + key: array for key, array in found.items()}
    if name == "qwen3-embedding":
        half = SentenceTransformer(folder, truncate_dim=HIDDEN // 2, **LOAD)
        arrays["half_embeddings"] = np.stack([half.encode(text, normalize_embeddings=True) for text in TEXTS])
    short = load(folder, **BF16)
    write_expected(name, arrays, lowest_cosine([short.encode(text) for text in TEXTS], arrays["embeddings"]))


def cross_encoder(name: str, network: Any, tokenizer: Any, window: int = WINDOW) -> None:
    """One is saved by transformers, as most published ones are, and one by sentence-transformers."""
    folder = str(HERE / name)
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        plain = scratch if name == "bert-cross-encoder" else folder
        save(plain, network, tokenizer)
        if plain != folder:
            CrossEncoder(plain, device="cpu").save(folder, create_model_card=False)
    expect_scores(name, window)


def expect_scores(name: str, window: int = WINDOW) -> None:
    folder = str(HERE / name)
    load = LOADERS.get(name, CrossEncoder)
    model = load(folder, **LOAD)
    features = [model.preprocess([pair]) for pair in PAIRS]
    arrays = tokens(name, PAIRS, [item["input_ids"][0].tolist() for item in features], window)
    for key, activation in (("logits", torch.nn.Identity()), ("scores", torch.nn.Sigmoid())):
        arrays[key] = np.concatenate([model.predict([pair], activation_fn=activation) for pair in PAIRS])
    if "token_type_ids" in features[0] and model.config.type_vocab_size:
        arrays["token_type_ids"] = flat(item["token_type_ids"][0].tolist() for item in features)
    short = load(folder, **BF16)
    scores = np.concatenate([short.predict([pair], activation_fn=torch.nn.Sigmoid()) for pair in PAIRS])
    write_expected(name, arrays, largest_difference(scores, arrays["scores"]))


def multi_vector_encoder(name: str, network: Any, tokenizer: Any, *after: torch.nn.Module, **options: Any) -> None:
    folder = str(HERE / name)
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as plain:
        save(plain, network, tokenizer)
        modules = [Transformer(plain, model_kwargs={"dtype": "auto"}, **options), *after]
        MultiVectorEncoder(modules=modules, prompts=PROMPTS[name], device="cpu").save(
            folder, create_model_card=False
        )
    vectors_expected(name)


def vectors_expected(name: str) -> None:
    folder = str(HERE / name)
    load = LOADERS.get(name, MultiVectorEncoder)
    model = load(folder, **LOAD)
    kinds: dict[str, Callable[[Any, str], Any]] = {
        "": lambda encoder, text: encoder.encode(text),
        "query_": lambda encoder, text: encoder.encode_query(text),
        "document_": lambda encoder, text: encoder.encode_document(text),
    }
    arrays: Arrays = {}
    for start, encode in kinds.items():
        task = start.removesuffix("_") or None
        prompt = model.prompts.get(task or "", "")
        fed = [model.preprocess([text], prompt=prompt, task=task)["input_ids"][0].tolist() for text in TEXTS]
        vectors = [np.asarray(encode(model, text)) for text in TEXTS]
        arrays |= {f"{start}token_ids": flat(fed), f"{start}token_counts": flat([len(ids)] for ids in fed)}
        arrays |= {f"{start}vectors": np.concatenate(vectors)}
        arrays |= {f"{start}vector_counts": flat([len(one)] for one in vectors)}
    scores = [model.similarity(model.encode_query(q), model.encode_document(p)).item() for q, p in PAIRS]
    arrays["pair_maxsim"] = np.asarray(scores, np.float32)
    short = load(folder, **BF16)
    rounded = np.concatenate([np.asarray(torch.as_tensor(short.encode(text)).float()) for text in TEXTS])
    write_expected(name, arrays, lowest_cosine(rounded, arrays["vectors"]))


def sparse_arrays(start: str, dense: NDArray[np.float32]) -> Arrays:
    """What is not zero."""
    row, column = dense.nonzero()
    counts = np.bincount(row, minlength=len(dense)).astype(np.int32)
    found = {"indices": column.astype(np.int32), "values": dense[row, column], "value_counts": counts}
    return {start + name: array for name, array in found.items()}


def sparse_encoder(
    name: str, network: Any, tokenizer: Any, strategy: Literal["max", "sum"], less: float = 3
) -> None:
    """With biases that leave few tokens above zero, as training does."""
    folder = str(HERE / name)
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as plain:
        network.get_output_embeddings().bias.data -= less
        save(plain, network, tokenizer)
        masked = Transformer(plain, transformer_task="fill-mask", model_kwargs={"dtype": "auto"})
        modules = [masked, SpladePooling(strategy)]
        SparseEncoder(modules=modules, device="cpu").save(folder, create_model_card=False)
    model = SparseEncoder(folder, **LOAD)
    fed = [model.preprocess([text])["input_ids"][0].tolist() for text in TEXTS]
    arrays = tokens(name, TEXTS, fed, WINDOW)

    def vectors(encoder: Any, texts: list[str]) -> Any:
        found = [encoder.encode(text, convert_to_sparse_tensor=False) for text in texts]
        return torch.stack(found).float().numpy()

    for start, texts in (("", TEXTS), ("blank_", BLANK)):
        arrays |= sparse_arrays(start, vectors(model, texts))
    short = SparseEncoder(folder, **BF16)
    write_expected(name, arrays, lowest_cosine(vectors(short, TEXTS), vectors(model, TEXTS)))


@torch.inference_mode()
def qwen_reranker(name: str, network: Any, tokenizer: Any) -> None:
    """Scored as the sample for transformers on the model card of Qwen3-Reranker does, or by a classifier."""
    shutil.rmtree(HERE / name, ignore_errors=True)
    save(HERE / name, network, tokenizer)
    kind: Any = type(network)
    model = kind.from_pretrained(HERE / name, dtype=torch.float32)
    tokenizer = hf.AutoTokenizer.from_pretrained(HERE / name)
    prefix, suffix = (tokenizer.encode(text, add_special_tokens=False) for text in (PREFIX, SUFFIX))
    room = RERANKER_WINDOW - len(prefix) - len(suffix)
    bodies = [BODY.format(TASK, query, passage) for query, passage in PAIRS]
    cut = tokenizer(bodies, truncation=True, max_length=room)["input_ids"]
    fed = [prefix + ids + suffix for ids in cut]
    arrays = tokens(name, bodies, cut, room)
    arrays |= {"token_ids": flat(fed), "token_counts": flat([len(ids)] for ids in fed)}
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])

    def answers(model: Any) -> Any:
        """The logits of "yes" and "no"; a classifier's only one stands for how far they are apart."""
        found = [model(torch.tensor([ids])).logits[0] for ids in fed]
        return torch.stack([one[-1, [yes, no]] if one.ndim == 2 else functional.pad(one, (0, 1)) for one in found])

    last = answers(model)
    arrays |= {"logits": (last[:, 0] - last[:, 1]).numpy(), "scores": last.softmax(dim=1)[:, 0].numpy()}
    short = kind.from_pretrained(HERE / name, dtype=torch.bfloat16)
    scores = answers(short).float().softmax(dim=1)[:, 0].numpy()
    write_expected(name, arrays, largest_difference(scores, arrays["scores"]))


MXBAI_PREFIX = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n"
)
MXBAI_TASK = (
    "You are a search relevance expert who evaluates how well documents match search queries. For each "
    "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
    "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
)
MXBAI_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
MXBAI_WINDOW = 384


@torch.inference_mode()
def mxbai_logits(
    folder: Path, pairs: list[tuple[str, str]], dtype: torch.dtype = torch.float32, instruction: str = ""
) -> tuple[Any, list[list[int]], list[bool]]:
    """What the package mxbai-rerank computes: logits, the ids that are fed, and whether they were cut.

    Its parts are tokenized apart; the query has three quarters of what the words around it leave.
    """
    words = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def ids(text: str) -> list[int]:
        return list(words(text, add_special_tokens=False)["input_ids"])

    between = ids("\n")
    ends = ids(MXBAI_PREFIX), [*between, *ids(MXBAI_TASK), *ids(MXBAI_SUFFIX)]
    room = MXBAI_WINDOW - sum(map(len, ends))
    fed, cut = [], []
    for query, passage in pairs:
        asked = ids((f"instruction: {instruction}\n" if instruction else "") + f"query: {query}")
        about = [*between, *ids(f"document: {passage}")]
        first = asked[: room * 3 // 4]
        second = about[: room - len(first)]
        fed.append(ends[0] + first + second + ends[1])
        cut.append(len(first + second) < len(asked + about))
    last = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in fed]).float()
    return last[:, ids("1")[0]] - last[:, ids("0")[0]], fed, cut


def mxbai_reranker(name: str) -> None:
    folder, words = HERE / name, qwen(MXBAI_WINDOW)
    shutil.rmtree(folder, ignore_errors=True)
    sizes = decoder_sizes(words) | {"max_position_embeddings": MXBAI_WINDOW, "tie_word_embeddings": True}
    model: Any = hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes))
    save(folder, randomise(model, 32, norm=0.5), words)
    logits, fed, cut = mxbai_logits(folder, PAIRS)
    instructed, _, _ = mxbai_logits(folder, PAIRS, instruction="Find the answer?")
    arrays = {
        "token_ids": flat(fed),
        "token_counts": flat([len(ids)] for ids in fed),
        "truncated": np.asarray(cut),
    }
    arrays |= {"logits": logits.numpy(), "scores": logits.sigmoid().numpy(), "instructed": instructed.numpy()}
    short, _, _ = mxbai_logits(folder, PAIRS, torch.bfloat16)
    write_expected(name, arrays, largest_difference(short.sigmoid(), arrays["scores"]))


NEMOTRON_BODY = "question:{} \n \n passage:{}"


def nemotron_logits(folder: Path, texts: list[str], dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """What NVIDIA's code gives, of which transformers has no class, and the ids that it is fed.

    A Llama whose tokens see the whole text, a classifier over their mean, and its temperature.
    """
    config = hf.LlamaConfig.from_pretrained(folder)
    config.is_causal = False
    model = hf.LlamaForSequenceClassification.from_pretrained(folder, config=config, dtype=dtype)
    words = hf.PreTrainedTokenizerFast.from_pretrained(folder)
    fed = words(texts, truncation=True, max_length=RERANKER_WINDOW)["input_ids"]
    means = [model.model(torch.tensor([ids])).last_hidden_state.mean(dim=1) for ids in fed]
    temperature = json.loads((folder / "config.json").read_text())["temperature"]
    return torch.cat([model.score(mean)[0] for mean in means]).float() / temperature, fed


@torch.inference_mode()
def nemotron_reranker(name: str) -> None:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    words = llama3s(RERANKER_WINDOW)
    sizes = decoder_sizes(words) | {"max_position_embeddings": RERANKER_WINDOW}
    model: Any = hf.LlamaForSequenceClassification(hf.LlamaConfig(**sizes, **ONE))
    save(folder, randomise(model, 25, norm=0.5), words)
    code = {kind: f"llama_bidirectional_model.LlamaBidirectional{end}" for kind, end in NEMOTRON_CODE.items()}
    own = {"model_type": "llama_bidirec", "auto_map": code, "pooling": "avg", "temperature": 0.5}
    own["architectures"] = ["LlamaBidirectionalForSequenceClassification"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | own, indent=2, sort_keys=True) + "\n")
    bodies = [NEMOTRON_BODY.format(query, passage) for query, passage in PAIRS]
    logits, fed = nemotron_logits(folder, bodies)
    arrays = tokens(name, bodies, fed, RERANKER_WINDOW)
    arrays |= {"logits": logits.numpy(), "scores": logits.sigmoid().numpy()}
    short, _ = nemotron_logits(folder, bodies, torch.bfloat16)
    write_expected(name, arrays, largest_difference(short.sigmoid(), arrays["scores"]))


NEMOTRON_CODE = {"AutoConfig": "Config", "AutoModelForSequenceClassification": "ForSequenceClassification"}
ONE: dict[str, Any] = {"num_labels": 1}


def bert_sizes(words: Any) -> dict[str, Any]:
    return {**SIZES, "vocab_size": rows(words), "num_hidden_layers": 2, "max_position_embeddings": WINDOW}


def bert_cls(name: str) -> None:
    words = wordpiece()
    model = randomise(hf.BertModel(hf.BertConfig(**bert_sizes(words))), 1)
    embedder(name, model, words, Pooling(HIDDEN, "cls"))


def bert_cross_encoder(name: str) -> None:
    words = wordpiece()
    classifier: Any = hf.BertForSequenceClassification(hf.BertConfig(**bert_sizes(words), **ONE))
    cross_encoder(name, randomise(classifier, 2), words)


def distilbert_sizes(words: Any) -> dict[str, Any]:
    sizes = {"dim": HIDDEN, "hidden_dim": 96, "n_heads": 4, "n_layers": 2}
    return {**sizes, "vocab_size": rows(words), "max_position_embeddings": WINDOW}


def distilbert(name: str) -> None:
    words = distilberts()
    model = randomise(hf.DistilBertModel(hf.DistilBertConfig(**distilbert_sizes(words))), 14)
    dense = randomise(Dense(HIDDEN, HIDDEN), 15)
    embedder(name, model, words, Pooling(HIDDEN, "mean"), dense)


def distilbert_cross_encoder(name: str) -> None:
    words = distilberts()
    config = hf.DistilBertConfig(**distilbert_sizes(words), **ONE)
    classifier: Any = hf.DistilBertForSequenceClassification(config)
    cross_encoder(name, randomise(classifier, 16), words)


def mpnet(name: str) -> None:
    words = mpnets()
    sizes = bert_sizes(words) | {"max_position_embeddings": WIDE + 2, "layer_norm_eps": 1e-5}
    model = randomise(hf.MPNetModel(hf.MPNetConfig(**sizes)), 17)
    embedder(name, model, words, Pooling(HIDDEN, "mean"), window=WIDE)


def mpnet_cross_encoder(name: str) -> None:
    words = mpnets()
    sizes = bert_sizes(words) | {"max_position_embeddings": WIDE + 2, "layer_norm_eps": 1e-5}
    classifier: Any = hf.MPNetForSequenceClassification(hf.MPNetConfig(**sizes, **ONE))
    cross_encoder(name, randomise(classifier, 18), words, WIDE)


def electra_sizes(words: Any) -> dict[str, Any]:
    return {**bert_sizes(words), "embedding_size": 32}


def electra(name: str) -> None:
    words = wordpiece()
    model = randomise(hf.ElectraModel(hf.ElectraConfig(**electra_sizes(words))), 19)
    embedder(name, model, words, Pooling(HIDDEN, "mean"))


def electra_cross_encoder(name: str) -> None:
    words = wordpiece()
    classifier: Any = hf.ElectraForSequenceClassification(hf.ElectraConfig(**electra_sizes(words), **ONE))
    cross_encoder(name, randomise(classifier, 20), words)


def t5_model(name: str, seed: int, kind: str, *after: torch.nn.Module) -> None:
    """Of heads whose widths together are not that of the hidden states."""
    pieces = t5_pieces()
    sizes = {"d_model": HIDDEN, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4}
    config = hf.T5Config(**sizes, vocab_size=rows(pieces), feed_forward_proj=kind)
    model: Any = randomise(hf.T5EncoderModel(config), seed)
    for block in model.encoder.block:
        # Nothing scales the scores, so that random weights would see a single token each.
        block.layer[0].SelfAttention.q.weight.data *= 0.125
    embedder(name, model, pieces, Pooling(HIDDEN, "mean"), *after, window=WIDE)


def t5(name: str) -> None:
    t5_model(name, 28, "relu", randomise(Dense(HIDDEN, HIDDEN, bias=False, activation_function=None), 29))


def t5_gated(name: str) -> None:
    t5_model(name, 30, "gated-gelu")


def deberta_sizes(pieces: Any) -> dict[str, Any]:
    """Distances of up to 8 places have vectors of their own, those of 99 and more share one."""
    sizes = {**SIZES, "vocab_size": rows(pieces), "num_hidden_layers": 2, "max_position_embeddings": WIDE}
    sizes |= {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
    return sizes | {"position_buckets": 16, "max_relative_positions": 100}


def deberta(name: str) -> None:
    pieces = deberta_pieces()
    config = hf.DebertaV2Config(**deberta_sizes(pieces), share_att_key=True, norm_rel_ebd="layer_norm")
    embedder(name, randomise(hf.DebertaV2Model(config), 21), pieces, Pooling(HIDDEN, "mean"), window=WIDE)


def deberta_cross_encoder(name: str) -> None:
    pieces = deberta_pieces()
    config = hf.DebertaV2Config(**deberta_sizes(pieces), **ONE)
    classifier: Any = hf.DebertaV2ForSequenceClassification(config)
    cross_encoder(name, randomise(classifier, 22), pieces, WIDE)


def nomic_bert(name: str) -> None:
    words = wordpiece()
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}
    model: Any = randomise(hf.NomicBertModel(hf.NomicBertConfig(**bert_sizes(words), **rope)), 3)
    embedder(name, model, words, Pooling(HIDDEN, "mean"))


class Experts(torch.nn.Module):
    """The published code's mixture of experts, of which transformers has none.

    A token goes through the two experts that its softmax puts first, each weighed by its share as it is. Their
    matrices lie one under the other, and one bias is added behind their sum.
    """

    def __init__(self, count: int, inner: int) -> None:
        super().__init__()
        self.router = torch.nn.Linear(HIDDEN, count, bias=False)
        self.w1, self.w2 = (torch.nn.Parameter(torch.empty(count * inner, HIDDEN)) for _ in range(2))
        self.bias = torch.nn.Parameter(torch.empty(HIDDEN))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        rows = states.reshape(-1, HIDDEN)
        found = torch.zeros_like(rows)
        for row, share in enumerate(self.router(rows).softmax(dim=-1, dtype=torch.float32)):
            for expert in share.topk(2).indices.tolist():
                w1, w2 = (matrix.chunk(len(share))[expert] for matrix in (self.w1, self.w2))
                found[row] += share[expert].to(rows.dtype) * (functional.gelu(rows[row] @ w1.T) @ w2)
        return (found + self.bias).reshape(states.shape)


class Plain(torch.nn.Module):
    """A feed-forward layer that is not gated."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(HIDDEN, inner), torch.nn.Linear(inner, HIDDEN)

    def forward(self, states: torch.Tensor) -> Any:
        return self.fc2(functional.gelu(self.fc1(states)))


def with_experts(model: Any) -> Any:
    """A NomicBertModel as its second version has it: biases, and experts in every second layer."""
    for i, layer in enumerate(model.layers):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, part, torch.nn.Linear(HIDDEN, HIDDEN))
        layer.mlp = Experts(4, SIZES["intermediate_size"]) if i % 2 else Plain(SIZES["intermediate_size"])
    return model


NOMIC_MOE: dict[str, Any] = {
    **{"n_embd": HIDDEN, "n_head": 4, "n_layer": 3, "n_inner": 96, "n_positions": WINDOW},
    **{"layer_norm_epsilon": 1e-5, "activation_function": "gelu", "pad_token_id": 1, "type_vocab_size": 1},
    **dict.fromkeys(("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"), True),
    **{"num_experts": 4, "moe_top_k": 2, "moe_every_n_layers": 2, "moe_normalize_expert_weights": False},
    **{"num_shared_experts": 0, "expert_choice_router": False, "ffn_div": 1},
    **{"rotary_emb_base": 1000, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "prenorm": False},
}
NOMIC_NAMES = {
    "layers.": "encoder.layers.",
    "embeddings.LayerNorm": "emb_ln",
    "self_attn.o_proj": "attn.out_proj",
    "post_attention_layernorm": "norm1",
    "post_mlp_layernorm": "norm2",
    "mlp.router": "mlp.router.layer",
    "mlp.w": "mlp.experts.mlp.w",
    "mlp.bias": "mlp.experts.bias",
}
"""What transformers' class or those above call a tensor -> what the published checkpoint calls it."""


def nomic_moe_config(vocab_size: int) -> Any:
    """Of transformers' class, where that says the same as the published keys."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}
    sizes = {**SIZES, "vocab_size": vocab_size, "num_hidden_layers": 3, "max_position_embeddings": WINDOW}
    return hf.NomicBertConfig(**sizes, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5, **rope)


def load_nomic_moe(folder: str, **options: Any) -> SentenceTransformer:
    """The published layout, by transformers' class with the experts above, for it has none of its own."""
    stored = load_file(Path(folder, "model.safetensors"))
    for key in [key for key in stored if ".Wqkv." in key]:
        for part, values in zip("qkv", stored.pop(key).chunk(3), strict=True):
            stored[key.replace("attn.Wqkv", f"self_attn.{part}_proj")] = values
    for own, published in NOMIC_NAMES.items():
        stored = {key.replace(published, own): values for key, values in stored.items()}
    with tempfile.TemporaryDirectory() as plain:
        shutil.copytree(folder, plain, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model.safetensors"))
        config = nomic_moe_config(json.loads(Path(folder, "config.json").read_text())["vocab_size"])
        hf.NomicBertModel(config).save_pretrained(plain)
        model = SentenceTransformer(plain, **options)
    with_experts(model[0].model).load_state_dict(stored)
    model[0].model.to(options["model_kwargs"]["dtype"])
    return model


def jina_v3_config(vocab_size: int) -> Any:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}
    sizes = {**SIZES, "vocab_size": vocab_size, "num_hidden_layers": 2, "max_position_embeddings": WINDOW}
    return hf.JinaEmbeddingsV3Config(**sizes, **rope)


def jina_v3(name: str) -> None:
    """As transformers has it, which knows of no adapters."""
    pieces = unigram()
    model: Any = hf.JinaEmbeddingsV3Model(jina_v3_config(rows(pieces)), add_pooling_layer=False)
    embedder(name, randomise(model, 27, norm=0.5), pieces, Pooling(HIDDEN, "mean"))


JINA_CODE = "jinaai/xlm-roberta-flash-implementation--"
JINA_V3: dict[str, Any] = {
    "architectures": ["XLMRobertaModel"],
    "auto_map": {
        "AutoConfig": f"{JINA_CODE}configuration_xlm_roberta.XLMRobertaFlashConfig",
        "AutoModel": f"{JINA_CODE}modeling_lora.XLMRobertaLoRA",
    },
    **{"model_type": "xlm-roberta", "position_embedding_type": "rotary", "rotary_emb_base": 1000.0},
    **{"lora_adaptations": list(JINA_TASKS), "lora_alpha": 2, "lora_rank": 3, "load_trained_adapters": True},
    **{"lora_dropout_p": 0.0, "lora_main_params_trainable": False, "task_instructions": JINA_TASKS},
    **{"use_flash_attn": True, "emb_pooler": None, "matryoshka_dimensions": [24, 48], "truncate_dim": None},
}


def load_jina_v3(folder: str, task: str | None = None, **options: Any) -> SentenceTransformer:
    """The published layout by transformers' class; behind each layer that has one, the adapter of the `task`.

    The published code adds A B to a table and B A to a layer's matrix, by alpha / rank. Here what they make of
    the same input is added.
    """
    said = json.loads(Path(folder, "config.json").read_text())
    tensors = load_file(Path(folder, "model.safetensors"))
    adapters: dict[str, dict[str, Any]] = {}
    plain: Arrays = {}
    for key, values in tensors.items():
        stem, is_adapted, end = key.removeprefix("roberta.").partition(".parametrizations.weight.")
        if is_adapted and end != "original":
            adapters.setdefault(stem, {})[end.removeprefix("0.lora_")] = values
        else:
            plain[f"{stem}.weight" if is_adapted else stem] = values
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(folder, scratch, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model.safetensors"))
        modules = json.loads(Path(folder, "modules.json").read_text())
        modules[0] = {**modules[0], "type": "sentence_transformers.models.Transformer", "kwargs": []}
        Path(scratch, "modules.json").write_text(json.dumps(modules))
        config = jina_v3_config(said["vocab_size"])
        config.architectures = ["JinaEmbeddingsV3Model"]
        config.save_pretrained(scratch)
        save_file(plain, Path(scratch, "model.safetensors"), {"format": "pt"})
        model = SentenceTransformer(scratch, **options)
    network: Any = model[0].model
    scale = said["lora_alpha"] / said["lora_rank"]

    def behind(part: str, matrices: dict[str, Any], chosen: int) -> Callable[..., Any]:
        a, b = (matrices[kind][chosen].to(options["model_kwargs"]["dtype"]) for kind in "AB")
        if part:  # one of the three that lie in one matrix
            b = b.chunk(3)["qkv".index(part)]
        return lambda layer, given, result: (
            result + scale * (a[given[0]] @ b if isinstance(layer, torch.nn.Embedding) else given[0] @ a.T @ b.T)
        )

    for stem, matrices in adapters.items() if task else ():
        if stem.startswith("pooler"):
            continue
        own = stem.replace("encoder.layers.", "layers.").replace("mixer.out_proj", "self_attn.o_proj")
        for part in "qkv" if own.endswith("Wqkv") else [""]:
            layer = network.get_submodule(own.replace("mixer.Wqkv", f"self_attn.{part}_proj"))
            layer.register_forward_hook(behind(part, matrices, said["lora_adaptations"].index(task)))
    return model


def jina_v3_adapters(name: str) -> None:
    """In the layout of the published checkpoint; expected are the vectors without and with each adapter."""
    pieces, folder = unigram(), HERE / name
    network: Any = randomise(hf.JinaEmbeddingsV3Model(jina_v3_config(rows(pieces))), 28, norm=0.5)
    save_embedder(name, network, pieces, Pooling(HIDDEN, "mean"))
    plain = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(29)
    count, rank, stored = len(JINA_TASKS), JINA_V3["lora_rank"], {}
    for key, values in plain.items():
        stem, _, end = f"roberta.{key}".rpartition(".")
        if end != "weight" or values.ndim == 1:
            stored[f"roberta.{key}"] = values
            continue
        first, last = values.shape if "embeddings" in key else values.shape[::-1]
        base = f"{stem}.parametrizations.weight"
        stored[f"{base}.original"] = values
        stored[f"{base}.0.lora_A"] = torch.randn(
            (count, first, rank) if "embeddings" in key else (count, rank, first), generator=generator
        ) / math.sqrt(first if "embeddings" not in key else 4)
        stored[f"{base}.0.lora_B"] = 0.3 * torch.randn(
            (count, rank, last) if "embeddings" in key else (count, last, rank), generator=generator
        )
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    kept = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    kept += ("max_position_embeddings", "type_vocab_size", "hidden_act", "layer_norm_eps")
    said = json.loads((folder / "config.json").read_text())
    own = JINA_V3 | {key: said[key] for key in kept}
    (folder / "config.json").write_text(json.dumps(own, indent=2, sort_keys=True) + "\n")
    modules = json.loads((folder / "modules.json").read_text())
    modules[0] |= {"type": "custom_st.Transformer", "kwargs": ["task"]}
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n")
    expect_embeddings(name)
    arrays = dict(np.load(folder / "expected.npz"))
    for task in JINA_TASKS:
        model = load_jina_v3(str(folder), task, **LOAD)
        arrays[task] = np.stack([model.encode(text, prompt="") for text in TEXTS])
    write_expected(name, arrays, json.loads((folder / "expected.json").read_text())["bf16"])


FLASH_CODE = {"AutoConfig": "configuration_xlm_roberta.XLMRobertaFlashConfig"}
FLASH_CODE |= {"AutoModel": "modeling_xlm_roberta.XLMRobertaModel"}
FLASH: dict[str, Any] = {
    **{"model_type": "xlm-roberta", "emb_pooler": None, "use_flash_attn": True, "use_cache": False},
    **{"output_past": True, "classifier_dropout": None, "initializer_range": 0.02, "torch_dtype": "float32"},
}
FLASH_NAMES = {
    "embeddings.LayerNorm": "emb_ln",
    "encoder.layer.": "encoder.layers.",
    "attention.output.dense": "mixer.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "norm2",
}
"""What transformers' XLM-RoBERTa calls a tensor -> what Jina's code for it does."""


def as_flash(stored: Arrays) -> Arrays:
    """The tensors of transformers' XLM-RoBERTa by the names of Jina's code, which has those of three in one."""
    for key in [key for key in stored if ".self.query." in key]:
        parts = [stored.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        stored[key.replace("attention.self.query", "mixer.Wqkv")] = torch.cat(parts)
    for own, published in FLASH_NAMES.items():
        stored = {key.replace(own, published): one for key, one in stored.items()}
    return stored


def load_jina_flash_reranker(folder: str, **options: Any) -> CrossEncoder:
    """The published layout by transformers' class."""
    stored = load_file(Path(folder, "model.safetensors"))
    for key in [key for key in stored if ".Wqkv." in key]:
        for part, values in zip(("query", "key", "value"), stored.pop(key).chunk(3), strict=True):
            stored[key.replace("mixer.Wqkv", f"attention.self.{part}")] = values
    for own, published in reversed(FLASH_NAMES.items()):
        stored = {key.replace(published, own): one for key, one in stored.items()}
    config = json.loads(Path(folder, "config.json").read_text())
    del config["auto_map"]
    with tempfile.TemporaryDirectory() as plain:
        shutil.copytree(folder, plain, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model.safetensors"))
        Path(plain, "config.json").write_text(json.dumps(config | {"model_type": "xlm-roberta"}))
        save_file(stored, Path(plain, "model.safetensors"), {"format": "pt"})
        return CrossEncoder(plain, **options)


def jina_flash_reranker(name: str) -> None:
    """As jina-reranker-v2-base-multilingual, which does not say its type."""
    pieces, folder = unigram(), HERE / name
    sizes = roberta_sizes(pieces) | ONE
    network: Any = hf.XLMRobertaForSequenceClassification(hf.XLMRobertaConfig(**sizes))
    shutil.rmtree(folder, ignore_errors=True)
    save(folder, randomise(network, 39), pieces)
    stored = as_flash(load_file(folder / "model.safetensors"))
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    kind = "XLMRobertaForSequenceClassification"
    config = FLASH | sizes | {"architectures": [kind], "position_embedding_type": "absolute", "hidden_act": "gelu"}
    config |= {"auto_map": FLASH_CODE | {"AutoModelForSequenceClassification": f"modeling_xlm_roberta.{kind}"}}
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": 1}
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    expect_scores(name)


def load_jina_colbert(folder: str, **options: Any) -> MultiVectorEncoder:
    """The published layout by transformers' class of v3, of which it is one without adapters."""
    said = json.loads(Path(folder, "config.json").read_text())
    config = jina_v3_config(said["vocab_size"]).to_dict() | {"architectures": ["HF_ColBERT"]}
    stored = load_file(Path(folder, "model.safetensors"))
    with tempfile.TemporaryDirectory() as plain:
        shutil.copytree(folder, plain, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model.safetensors"))
        Path(plain, "config.json").write_text(json.dumps(config))
        renamed = {key.removeprefix("roberta."): one for key, one in stored.items()}
        save_file(renamed, Path(plain, "model.safetensors"), {"format": "pt"})
        return MultiVectorEncoder(plain, **options)


def jina_colbert(name: str) -> None:
    """As jina-colbert-v2, in the layout of Stanford's code, with markers that are tokens of their own."""
    pieces, folder = unigram(), HERE / name
    pieces.add_tokens([AddedToken(marker, special=True) for marker in ("[QueryMarker]", "[DocumentMarker]")])
    network: Any = hf.JinaEmbeddingsV3Model(jina_v3_config(rows(pieces)), add_pooling_layer=False)
    shutil.rmtree(folder, ignore_errors=True)
    save(folder, randomise(network, 40, norm=0.5), pieces)
    stored = {f"roberta.{key}": one for key, one in load_file(folder / "model.safetensors").items()}
    dense = randomise(torch.nn.Linear(HIDDEN, 24, bias=False), 41)
    save_file({"linear.weight": dense.weight, **stored}, folder / "model.safetensors", {"format": "pt"})
    own = json.loads((folder / "config.json").read_text())
    kept = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    kept += ("max_position_embeddings", "type_vocab_size", "hidden_act", "layer_norm_eps")
    config = FLASH | {key: own[key] for key in kept} | {"architectures": ["HF_ColBERT"], "pad_token_id": 1}
    config |= {"position_embedding_type": "rotary", "rotary_emb_base": 1000.0}
    repository = "jinaai/xlm-roberta-flash-implementation"
    config |= {"auto_map": {kind: f"{repository}--{place}" for kind, place in FLASH_CODE.items()}}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    said: dict[str, Any] = {"query_token_id": "[QueryMarker]", "doc_token_id": "[DocumentMarker]"}
    said |= {"similarity": "cosine", "interaction": "colbert", "dim": 24, "mask_punctuation": True}
    said |= {"query_maxlen": 32, "doc_maxlen": 48, "attend_to_mask_tokens": True}
    (folder / "artifact.metadata").write_text(json.dumps(said, indent=2) + "\n")
    vectors_expected(name)


def nomic_bert_moe(name: str) -> None:
    pieces, folder = unigram(), HERE / name
    network: Any = hf.NomicBertModel(nomic_moe_config(rows(pieces)))
    save_embedder(name, network, pieces, Pooling(HIDDEN, "mean"))
    stored = randomise(with_experts(network), 26, norm=0.5).state_dict()
    for own, published in NOMIC_NAMES.items():
        stored = {key.replace(own, published): values for key, values in stored.items()}
    for key in [key for key in stored if ".q_proj." in key]:
        parts = [stored.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        stored[key.replace("self_attn.q_proj", "attn.Wqkv")] = torch.cat(parts)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    said = {"architectures": ["NomicBertModel"], "model_type": "nomic_bert", "vocab_size": rows(pieces)}
    (folder / "config.json").write_text(json.dumps(NOMIC_MOE | said, indent=2, sort_keys=True) + "\n")
    expect_embeddings(name)


def roberta_sizes(pieces: Any) -> dict[str, Any]:
    sizes = {**SIZES, "vocab_size": rows(pieces), "num_hidden_layers": 2, "max_position_embeddings": WINDOW + 2}
    return sizes | {"type_vocab_size": 1, "layer_norm_eps": 1e-5}


def xlm_roberta(name: str) -> None:
    pieces = unigram()
    model = randomise(hf.XLMRobertaModel(hf.XLMRobertaConfig(**roberta_sizes(pieces))), 4)
    embedder(name, model, pieces, Pooling(HIDDEN, "mean"))


def gte(name: str) -> None:
    pieces = unigram()
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}
    sizes = {**SIZES, "vocab_size": rows(pieces), "num_hidden_layers": 2, "max_position_embeddings": WINDOW}
    model: Any = hf.GteModel(hf.GteConfig(**sizes, **rope))
    embedder(name, randomise(model, 24, norm=0.5), pieces, Pooling(HIDDEN, "cls"))


NEW_CODE = {"AutoConfig": "configuration.NewConfig", "AutoModel": "modeling.NewModel"}
NEW_HEADS = ("SequenceClassification", "TokenClassification")
NEW_CODE |= {f"AutoModelFor{head}": f"modeling.NewFor{head}" for head in NEW_HEADS}


def as_new(name: str, architectures: list[str], own: dict[str, Any], more: dict[str, torch.Tensor]) -> None:
    """The checkpoint as the published ones are, whose own code has this model by another name.

    `own` are keys in place of transformers' rotary positions, `more` are tensors that an embedder does not read.
    """
    folder = HERE / name
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "bos_token_id", "eos_token_id", "tie_word_embeddings"):
        del config[key]
    code = {kind: f"Alibaba-NLP/new-impl--{place}" for kind, place in NEW_CODE.items()}
    config |= {"model_type": "new", "architectures": architectures, "auto_map": code, "pack_qkv": True} | own
    config |= {"layer_norm_type": "layer_norm", "position_embedding_type": "rope", "unpad_inputs": False}
    config |= {"logn_attention_scale": False, "logn_attention_clip1": False}
    config |= {"use_memory_efficient_attention": False, "torch_dtype": config.pop("dtype")}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    heads = ("classifier", "new.")
    tensors = load_file(folder / "model.safetensors")
    kept = {key.removeprefix("gte."): one for key, one in tensors.items()}
    named = {key if key.startswith(heads) else f"new.{key}": one for key, one in kept.items()}
    save_file(named | more, folder / "model.safetensors", {"format": "pt"})


def stretched(theta: float, k: float) -> dict[str, Any]:
    """What the published code calls `ntk`, of which transformers knows nothing.

    A pair of values turns by (theta k)^(-2i/d) / k^(2/d) from place to place (kexue.fm/archives/9706, formula 6):
    that is `linear` of another base and factor.
    """
    width = HIDDEN // SIZES["num_attention_heads"]
    return {"rope_type": "linear", "rope_theta": theta * k, "factor": k ** (2 / width)}


def load_new(folder: str, kind: Any, **options: Any) -> Any:
    """What `as_new` has made, as transformers has it, by sentence-transformers' class `kind`."""
    config = json.loads(Path(folder, "config.json").read_text())
    theta, scaling, _ = (config.pop(key) for key in ("rope_theta", "rope_scaling", "auto_map"))
    config["model_type"] = "gte"
    config["architectures"] = [config["architectures"][0].replace("New", "Gte")]
    config["rope_parameters"] = stretched(theta, scaling["factor"] if scaling else 1.0)
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        Path(copy, "config.json").write_text(json.dumps(config))
        return kind(copy, **options)


def new(name: str) -> None:
    """As gte-multilingual-base."""
    pieces = unigram()
    sizes = {**SIZES, "vocab_size": rows(pieces), "num_hidden_layers": 2, "max_position_embeddings": WINDOW}
    model: Any = hf.GteModel(hf.GteConfig(**sizes, rope_parameters=stretched(100.0, 8.0)))
    save_embedder(name, randomise(model, 25, norm=0.5), pieces, Pooling(HIDDEN, "cls"))
    own = {"rope_theta": 100.0, "rope_scaling": {"type": "ntk", "factor": 8.0}, "num_labels": 1}
    classifier = randomise(torch.nn.Linear(HIDDEN, 1), 26)
    with torch.inference_mode():
        some = model(torch.tensor([pieces(TEXTS[8])["input_ids"]])).last_hidden_state
        classifier.bias.data -= classifier(some).mean()  # so that half of the words have a weight
    as_new(name, ["NewModel", "NewForTokenClassification"], own, classifier.state_dict(prefix="classifier."))
    expect_embeddings(name)
    arrays = dict(np.load(HERE / name / "expected.npz"))
    special = [getattr(pieces, f"{end}_token_id") for end in ("cls", "eos", "pad", "unk")]
    for start, texts in (("", TEXTS), ("blank_", BLANK)):
        arrays |= sparse_arrays(start, words_of_new(name, LOAD, texts, special))
    full, short = (words_of_new(name, options, TEXTS, special) for options in (LOAD, BF16))
    some = full.any(axis=1)
    said = json.loads((HERE / name / "expected.json").read_text())
    write_expected(name, arrays, said["bf16"])
    said |= {"sparse_bf16": round(lowest_cosine(short[some], full[some]), 6)}
    (HERE / name / "expected.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def words_of_new(name: str, options: dict[str, Any], texts: list[str], special: list[int]) -> Any:
    """Weights of words as the published script has them: of an id the largest that the classifier gives."""
    model = load_new(str(HERE / name), SentenceTransformer, **options)
    tensors = load_file(HERE / name / "model.safetensors")
    weight, bias = (
        tensors[f"classifier.{part}"].to(options["model_kwargs"]["dtype"]) for part in ("weight", "bias")
    )
    dense = np.zeros((len(texts), model[0].config.vocab_size), np.float32)
    for row, text in zip(dense, texts, strict=True):
        fed = model.preprocess([text])
        states = model[0].model(fed["input_ids"]).last_hidden_state[0]
        values = functional.linear(states, weight, bias)[:, 0].relu().float().tolist()
        for i, value in zip(fed["input_ids"][0].tolist(), values, strict=True):
            if i not in special:
                row[i] = max(row[i], value)
    return dense


def new_reranker(name: str) -> None:
    """As gte-multilingual-reranker-base, with the words and the segments of gte-large-en-v1.5."""
    words = wordpiece()
    config = hf.GteConfig(
        **bert_sizes(words), **ONE, type_vocab_size=2, rope_parameters={"rope_type": "default", "rope_theta": 1e3}
    )
    classifier: Any = hf.GteForSequenceClassification(config)
    shutil.rmtree(HERE / name, ignore_errors=True)
    save(HERE / name, randomise(classifier, 27, norm=0.5), words)
    as_new(name, ["NewForSequenceClassification"], {"rope_theta": 1000.0, "rope_scaling": None}, {})
    expect_scores(name)


def roberta_cross_encoder(name: str) -> None:
    pieces = unigram()
    config = hf.XLMRobertaConfig(**roberta_sizes(pieces), **ONE)
    classifier: Any = hf.XLMRobertaForSequenceClassification(config)
    cross_encoder(name, randomise(classifier, 5), pieces)


def roberta(name: str) -> None:
    pairs = byte_pairs()
    model = randomise(hf.RobertaModel(hf.RobertaConfig(**roberta_sizes(pairs))), 11)
    embedder(name, model, pairs, Pooling(HIDDEN, "mean"))


def roberta_pairs(name: str) -> None:
    pairs = byte_pairs()
    classifier: Any = hf.RobertaForSequenceClassification(hf.RobertaConfig(**roberta_sizes(pairs), **ONE))
    cross_encoder(name, randomise(classifier, 12), pairs)


def camembert(name: str) -> None:
    pieces = camembert_pieces()
    model = randomise(hf.CamembertModel(hf.CamembertConfig(**roberta_sizes(pieces))), 13)
    embedder(name, model, pieces, Pooling(HIDDEN, "mean"))


def camembert_cross_encoder(name: str) -> None:
    pieces = camembert_pieces()
    config = hf.CamembertConfig(**roberta_sizes(pieces), **ONE)
    classifier: Any = hf.CamembertForSequenceClassification(config)
    cross_encoder(name, randomise(classifier, 23), pieces)


def qwen3_sizes(closed: Any) -> dict[str, Any]:
    ends = {"bos_token_id": closed.pad_token_id, "eos_token_id": closed.pad_token_id}
    sizes = {**SIZES, **ends, "vocab_size": rows(closed), "num_hidden_layers": 3, "tie_word_embeddings": True}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16}
    return sizes | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}


def qwen3_embedding(name: str) -> None:
    closed = qwen(WINDOW, closing="<|endoftext|>")
    model: Any = hf.Qwen3Model(hf.Qwen3Config(**qwen3_sizes(closed), max_position_embeddings=WINDOW))
    embedder(name, randomise(model, 6).to(torch.bfloat16), closed, Pooling(HIDDEN, "lasttoken"))


def qwen3_reranker(name: str) -> None:
    sizes = qwen3_sizes(qwen(WINDOW, closing="<|endoftext|>"))
    model: Any = hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes, max_position_embeddings=RERANKER_WINDOW))
    qwen_reranker(name, randomise(model, 7), qwen(RERANKER_WINDOW))


def qwen3_classifier(name: str) -> None:
    """With a padding token, as conversions of Qwen3-Reranker have it."""
    words = qwen(RERANKER_WINDOW)
    sizes = decoder_sizes(words) | {"head_dim": 16, "max_position_embeddings": RERANKER_WINDOW}
    model: Any = hf.Qwen3ForSequenceClassification(hf.Qwen3Config(**sizes, **ONE))
    qwen_reranker(name, randomise(model, 24).to(torch.bfloat16), words)


VL_PROMPT = "Retrieve text relevant to the user's query."
VL_ASKED = """\
{%- macro text(role) -%}
    {%- for message in messages if message.role == role -%}
        {%- for part in message.content -%}
            {{- "<|vision_start|><|image_pad|><|vision_end|>" if part.type == "image" else part.text -}}
        {%- endfor -%}
    {%- endfor -%}
{%- endmacro -%}
{{- PREFIX + "<Instruct>: " + text("system") + "<Query>:" + text("query") + "\\n<Document>:" + text("document") -}}
{{- "<|im_end|>\\n" -}}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
""".replace("PREFIX", json.dumps(PREFIX))
"""The words that Qwen3-VL-Reranker is asked in, of content in parts."""
VL_CHAT = "{% for message in messages %}{{ message.role }}{% endfor %}"
"""What else it may be asked: for a pair it is not."""


def load_qwen3_vl(folder: str, **options: Any) -> CrossEncoder:
    """Without the processor of pictures, which needs torchvision; texts it gives to this tokenizer."""
    with tempfile.TemporaryDirectory() as words:
        hf.AutoTokenizer.from_pretrained(folder).save_pretrained(words)
        said = json.loads(Path(folder, "sentence_bert_config.json").read_text())
        said |= {"tokenizer_name_or_path": words, "model_kwargs": options["model_kwargs"]}
        model = Transformer(folder, **said)
    library = json.loads(Path(folder, "config_sentence_transformers.json").read_text())
    score = LogitScore.load(folder, subfolder="1_LogitScore")
    named = {name: library[name] for name in ("prompts", "default_prompt_name")}
    return CrossEncoder(modules=[model, score], device=options["device"], **named)


def qwen3_vl_reranker(name: str) -> None:
    """As Qwen3-VL-Reranker is published: a whole Qwen3-VL, and files that say that its answer is a score."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    words = qwen(RERANKER_WINDOW)
    words.chat_template = {"default": VL_CHAT, "reranker": VL_ASKED}
    text = {key: value for key, value in qwen3_sizes(words).items() if key != "tie_word_embeddings"}
    text |= {"max_position_embeddings": RERANKER_WINDOW}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True}
    text["rope_parameters"]["mrope_section"] = [4, 2, 2]
    vision: dict[str, Any] = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": HIDDEN}
    vision |= {"num_heads": 2, "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    save(folder, randomise(hf.Qwen3VLForConditionalGeneration(config), 47), words)
    yes, no = words.convert_tokens_to_ids(["yes", "no"])
    output = {"method": "forward", "method_output_name": "logits"}
    modules = {"": "base.modules.transformer.Transformer"}
    modules |= {"1_LogitScore": "cross_encoder.modules.logit_score.LogitScore"}
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
            for i, (path, kind) in enumerate(modules.items())
        ],
        "config_sentence_transformers.json": {
            **{"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.activation.Sigmoid"},
            **{"prompts": {"query": VL_PROMPT}, "default_prompt_name": "query"},
        },
        "sentence_bert_config.json": {
            "transformer_task": "any-to-any",
            "modality_config": {
                **dict.fromkeys(("text", "image", "video"), output),
                "message": output | {"format": "structured"},
            },
            "module_output_name": "causal_logits",
            "unpad_inputs": False,
            "processing_kwargs": {"chat_template": {"chat_template": "reranker", "add_generation_prompt": True}},
        },
        "1_LogitScore/config.json": {"true_token_id": yes, "false_token_id": no},
    }
    (folder / "1_LogitScore").mkdir()
    for path, content in files.items():
        (folder / path).write_text(json.dumps(content, indent=2) + "\n")
    model = load_qwen3_vl(str(folder), **LOAD)
    plain: dict[str, Any] = {"activation_fn": torch.nn.Identity()}
    ways = {"logits": plain, "scores": {}, "instructed": plain | {"prompt": "Find the answer?"}}
    fed = [model.preprocess([pair], prompt=VL_PROMPT)["input_ids"][0].tolist() for pair in PAIRS]
    arrays: Arrays = {"token_ids": flat(fed), "token_counts": flat([len(ids)] for ids in fed)}
    arrays |= {
        key: np.concatenate([model.predict([pair], **options) for pair in PAIRS]) for key, options in ways.items()
    }
    model.tokenizer.model_max_length = 2**20
    whole = [model.preprocess([pair], prompt=VL_PROMPT)["input_ids"][0] for pair in PAIRS]
    arrays["truncated"] = np.asarray([len(ids) > RERANKER_WINDOW for ids in whole])
    short = load_qwen3_vl(str(folder), **BF16)
    scores = np.concatenate([short.predict([pair]) for pair in PAIRS])
    write_expected(name, arrays, largest_difference(scores, arrays["scores"]))


VOYAGE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "auto_map": {"AutoModel": "modeling_qwen3_bidirectional.Qwen3BidirectionalModel"},
    "use_bidirectional_attention": True,
    "num_labels": 2 * HIDDEN,
}


def load_voyage(folder: str, **options: Any) -> SentenceTransformer:
    """The published layout by transformers' class, every token of which sees the whole text if it is told so.

    Behind its final norm stands the matrix that the published code has there.
    """
    stored = load_file(Path(folder, "model.safetensors"))
    matrix = stored.pop("linear.weight").to(options["model_kwargs"]["dtype"])
    config = json.loads(Path(folder, "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in VOYAGE}
    with tempfile.TemporaryDirectory() as plain:
        shutil.copytree(folder, plain, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model.safetensors"))
        Path(plain, "config.json").write_text(json.dumps(config | {"is_causal": False}))
        renamed = {key.removeprefix("model."): one for key, one in stored.items()}
        save_file(renamed, Path(plain, "model.safetensors"), {"format": "pt"})
        model = SentenceTransformer(plain, **options)

    network: Any = model[0].model
    network.norm.register_forward_hook(lambda _layer, _given, states: states @ matrix.T)
    return model


def voyage(name: str) -> None:
    closed, folder = qwen(WINDOW, closing="<|endoftext|>"), HERE / name
    network: Any = hf.Qwen3Model(hf.Qwen3Config(**qwen3_sizes(closed), max_position_embeddings=WINDOW))
    save_embedder(name, randomise(network, 37, norm=0.5).to(torch.bfloat16), closed, Pooling(2 * HIDDEN, "mean"))
    matrix = randomise(torch.nn.Linear(HIDDEN, 2 * HIDDEN, bias=False), 38).weight.data.to(torch.bfloat16)
    stored = {f"model.{key}": one for key, one in load_file(folder / "model.safetensors").items()}
    save_file(stored | {"linear.weight": matrix}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | VOYAGE
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    expect_embeddings(name)


def decoder_sizes(words: Any) -> dict[str, Any]:
    ends = {f"{end}_token_id": getattr(words, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    sizes = {**SIZES, **ends, "vocab_size": rows(words), "num_hidden_layers": 2, "num_key_value_heads": 2}
    return sizes | {"max_position_embeddings": WINDOW}


def qwen2(name: str) -> None:
    """As gte-Qwen2: every token sees the whole text."""
    closed = qwen(WINDOW, closing="<|endoftext|>")
    config = hf.Qwen2Config(**decoder_sizes(closed), is_causal=False)
    embedder(name, randomise(hf.Qwen2Model(config), 22, norm=0.5), closed, Pooling(HIDDEN, "lasttoken"))


def mistral(name: str) -> None:
    """With a window that is shorter than the texts."""
    words = mistrals()
    config = hf.MistralConfig(**decoder_sizes(words), sliding_window=16)
    embedder(name, randomise(hf.MistralModel(config), 23, norm=0.5), words, Pooling(HIDDEN, "lasttoken"))


def llama(name: str) -> None:
    """Every token sees the whole text, by positions that were scaled."""
    words = llama3s()
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = hf.LlamaConfig(**decoder_sizes(words), rope_parameters=rope, is_causal=False)
    embedder(name, randomise(hf.LlamaModel(config), 20, norm=0.5), words, Pooling(HIDDEN, "mean"))


def gemma3(name: str) -> None:
    spaced = gemma()
    sizes = {**SIZES, "vocab_size": rows(spaced), "max_position_embeddings": WINDOW, "num_hidden_layers": 4}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 16}
    sizes |= {"use_bidirectional_attention": True, "layer_types": ["sliding_attention", "full_attention"] * 2}
    model: Any = randomise(hf.Gemma3TextModel(hf.Gemma3TextConfig(**sizes)), 8, norm=0.5)
    wide = randomise(Dense(HIDDEN, 96, bias=False, activation_function=None), 9)
    narrow = randomise(Dense(96, HIDDEN, bias=False, activation_function=None), 10)
    embedder(name, model, spaced, Pooling(HIDDEN, "mean"), wide, narrow)


def modernbert_sizes(words: Any) -> dict[str, Any]:
    """A full, a sliding and a full layer; the ids that transformers gives special tokens are past these words."""
    ends = {"bos_token_id": words.cls_token_id, "eos_token_id": words.sep_token_id}
    ends |= {"pad_token_id": words.pad_token_id, "cls_token_id": words.cls_token_id}
    sizes = {**SIZES, **ends, "sep_token_id": words.sep_token_id, "vocab_size": rows(words)}
    bases = {"full_attention": 1000.0, "sliding_attention": 100.0}
    rope = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()}
    sizes |= {"num_hidden_layers": 3, "global_attn_every_n_layers": 2, "local_attention": 16}
    return sizes | {"rope_parameters": rope, "max_position_embeddings": WINDOW}


def modernbert(name: str) -> None:
    words = modern()
    model: Any = hf.ModernBertModel(hf.ModernBertConfig(**modernbert_sizes(words)))
    embedder(name, randomise(model, 11, norm=0.5), words, Pooling(HIDDEN, "mean"))


def modernbert_reranker(name: str) -> None:
    words = modern()
    config = hf.ModernBertConfig(**modernbert_sizes(words), **ONE, classifier_pooling="mean")
    classifier: Any = hf.ModernBertForSequenceClassification(config)
    cross_encoder(name, randomise(classifier, 12, norm=0.5), words)


def static(name: str) -> None:
    """In a folder of its own, and cut where its tokenizer says so; special tokens are there and not put around."""
    tokenizer = wordpiece().backend_tokenizer
    tokenizer.enable_truncation(WINDOW)
    table = randomise(torch.nn.Embedding(rows(wordpiece()), HIDDEN), 25).weight.data
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    modules = [StaticEmbedding(tokenizer, embedding_weights=table), Normalize()]
    SentenceTransformer(modules=modules, prompts=PROMPTS[name], device="cpu").save(
        str(folder), create_model_card=False
    )
    (folder / "0_StaticEmbedding").mkdir()
    for file in ("model.safetensors", "tokenizer.json"):
        (folder / file).rename(folder / "0_StaticEmbedding" / file)
    listed = json.loads((folder / "modules.json").read_text())
    listed[0]["path"] = "0_StaticEmbedding"
    (folder / "modules.json").write_text(json.dumps(listed, indent=2))
    model = SentenceTransformer(str(folder), **LOAD)
    whole = Tokenizer.from_file(str(folder / "0_StaticEmbedding" / "tokenizer.json"))
    whole.no_truncation()
    arrays: Arrays = {}
    for start, prompt in (("", ""), ("query_", PROMPTS[name]["query"])):
        inputs = [prompt + text for text in TEXTS]
        fed = [model.preprocess([text])["input_ids"].tolist() for text in inputs]
        cut = [len(whole.encode(text, add_special_tokens=False).ids) > WINDOW for text in inputs]
        arrays |= {f"{start}token_ids": flat(fed), f"{start}token_counts": flat([len(ids)] for ids in fed)}
        arrays |= {f"{start}truncated": np.asarray(cut)}
        arrays |= {f"{start}embeddings": np.stack([model.encode(text, prompt=prompt) for text in TEXTS])}
    short = SentenceTransformer(str(folder), **LOAD).bfloat16()
    found = np.stack([short.encode(text, convert_to_tensor=True).float() for text in TEXTS])
    write_expected(name, arrays, lowest_cosine(found, arrays["embeddings"]))


def model2vec_arrays(model: Any) -> Arrays:
    """What it makes of the texts, which it cuts by characters and by tokens before unknown words are left out."""
    read = [text[: model.max_length * model.median_token_length] for text in TEXTS]
    fed = model.tokenize(read)
    whole = [model.tokenizer.encode(text, add_special_tokens=False) for text in read]
    cut = [len(a) < len(b) or bool(c.overflowing) for a, b, c in zip(read, TEXTS, whole, strict=True)]
    vectors = np.stack([model.encode(text) for text in TEXTS]).astype(np.float32)
    found = {"token_ids": flat(fed), "token_counts": flat([len(ids)] for ids in fed), "truncated": np.asarray(cut)}
    return found | {"embeddings": vectors}


def static_model(name: str, model: StaticModel) -> None:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    model = StaticModel.from_pretrained(folder)
    found = model2vec_arrays(model)
    arrays = {start + key: array for start in ("", "query_") for key, array in found.items()}
    # Folded, as a token's vector is one tensor in a graph.
    table = model.embedding.astype(np.float32)
    table = table if model.token_mapping is None else table[model.token_mapping]
    table = table if model.weights is None else table * model.weights[:, None]
    rounded = torch.tensor(table).bfloat16().float().numpy()
    short = StaticModel(rounded, model.tokenizer, normalize=model.normalize, max_length=model.max_length)
    some = found["embeddings"].any(axis=1)
    bf16 = lowest_cosine(model2vec_arrays(short)["embeddings"][some], found["embeddings"][some])
    write_expected(name, arrays, bf16, MODEL2VEC)


def model2vec(name: str) -> None:
    """As potion's, whose configuration has more keys than its library writes."""
    tokenizer = wordpiece().backend_tokenizer
    table = randomise(torch.nn.Embedding(tokenizer.get_vocab_size(), HIDDEN), 26).weight.data.numpy()
    config: Any = {"model_type": "model2vec", "architectures": ["StaticModel"], "tokenizer_name": "tiny"}
    config |= {"apply_pca": HIDDEN, "apply_zipf": True, "hidden_dim": HIDDEN, "seq_length": 1000000}
    static_model(name, StaticModel(table, tokenizer, config, normalize=True, max_length=WINDOW))


def model2vec_mapped(name: str) -> None:
    """Of integers, with a row for several tokens and a weight for each."""
    tokenizer = unigram().backend_tokenizer
    size = tokenizer.get_vocab_size()
    generator = np.random.default_rng(27)
    table = generator.integers(-127, 128, (size // 2, HIDDEN), np.int8)
    mapping = generator.integers(0, size // 2, size, np.int64)
    weights = generator.uniform(0.1, 1, size).astype(np.float32)
    config: Any = {"model_type": "model2vec", "architectures": ["StaticModel"]}
    model = StaticModel(
        table, tokenizer, config, normalize=True, weights=weights, token_mapping=mapping, max_length=WINDOW
    )
    static_model(name, model)


@torch.inference_mode()
def bge_m3(name: str) -> None:
    """Lexical weights as FlagEmbedding has them: max(w h + b, 0), the largest of an id that is not special."""
    pieces = unigram()
    model = randomise(hf.XLMRobertaModel(hf.XLMRobertaConfig(**roberta_sizes(pieces))), 22)
    linear = randomise(torch.nn.Linear(HIDDEN, 1), 23)
    some = model(torch.tensor([pieces(TEXTS[8])["input_ids"]])).last_hidden_state
    linear.bias -= linear(some).mean()  # so that half of the words have a weight
    shutil.rmtree(HERE / name, ignore_errors=True)
    save(HERE / name, model, pieces)
    save_file(linear.state_dict(), HERE / name / "sparse_linear.safetensors")
    special = {pieces.cls_token_id, pieces.eos_token_id, pieces.pad_token_id, pieces.unk_token_id}

    def weights(dtype: torch.dtype, texts: list[str]) -> Any:
        dense = np.zeros((len(texts), model.config.vocab_size), np.float32)
        network = hf.AutoModel.from_pretrained(HERE / name, dtype=dtype)
        for row, text in zip(dense, texts, strict=True):
            ids = pieces(text, truncation=True, max_length=WINDOW)["input_ids"]
            states = network(torch.tensor([ids])).last_hidden_state[0]
            values = (
                torch.relu(torch.nn.functional.linear(states, *(p.to(dtype) for p in linear.parameters())))[:, 0]
                .float()
                .tolist()
            )
            for i, value in zip(ids, values, strict=True):
                if i not in special:
                    row[i] = max(row[i], value)
        return dense

    fed = [pieces(text, truncation=True, max_length=WINDOW)["input_ids"] for text in TEXTS]
    arrays = tokens(name, TEXTS, fed, WINDOW)
    for start, texts in (("", TEXTS), ("blank_", BLANK)):
        arrays |= sparse_arrays(start, weights(torch.float32, texts))
    full, short = (weights(dtype, TEXTS) for dtype in (torch.float32, torch.bfloat16))
    some = full.any(axis=1)
    write_expected(name, arrays, lowest_cosine(short[some], full[some]))


def bert_colbert(name: str) -> None:
    """A query of 32 tokens, those that are added seen by none; punctuation of documents does not count."""
    words = wordpiece()
    words.add_special_tokens({"additional_special_tokens": ["[Q]", "[D]"]})
    model = randomise(hf.BertModel(hf.BertConfig(**bert_sizes(words))), 20)
    tokens = {"module_input_name": "token_embeddings"}
    dense = randomise(Dense(HIDDEN, 24, bias=False, activation_function=None, **tokens), 21)
    after = (dense, MultiVectorMask(list(string.punctuation)), Normalize(**tokens))
    expansion = {"strategy": "fixed", "attend": False, "length": 32}
    multi_vector_encoder(name, model, words, *after, query_expansion=expansion, document_length=48)


def pylate_colbert(name: str) -> None:
    """As PyLate 1 saves it: it has no module for skiplist and norm, and markers that are tokens put in by code."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    words = modern()
    words.add_tokens(["[Q] ", "[D] "])
    sizes = modernbert_sizes(words) | {"local_attention": 64}
    save(folder, randomise(hf.ModernBertModel(hf.ModernBertConfig(**sizes)), 26, norm=0.5), words)
    dense = randomise(torch.nn.Linear(HIDDEN, 24, bias=False), 27)
    (folder / "1_Dense").mkdir()
    save_file({"linear.weight": dense.weight}, folder / "1_Dense" / "model.safetensors")
    identity = "torch.nn.modules.linear.Identity"
    kinds = {"": "sentence_transformers.models.Transformer", "1_Dense": "pylate.models.Dense.Dense"}
    files = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(kinds.items())
        ],
        "sentence_bert_config.json": {"max_seq_length": 47, "do_lower_case": False},
        "1_Dense/config.json": {
            **{"in_features": HIDDEN, "out_features": 24, "bias": False},
            **{"activation_function": identity, "use_residual": False},
        },
        "config_sentence_transformers.json": {
            "model_type": "ColBERT",
            "__version__": {"sentence_transformers": "5.3.0", "transformers": "5.3.0", "pytorch": "2.10.0"},
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "MaxSim",
            "query_prefix": "[Q] ",
            "document_prefix": "[D] ",
            "query_length": 32,
            "document_length": 48,
            "attend_to_expansion_tokens": False,
            "skiplist_words": list(string.punctuation),
            "do_query_expansion": True,
        },
    }
    for path, content in files.items():
        (folder / path).write_text(json.dumps(content, indent=2) + "\n")
    vectors_expected(name)


def stanford_colbert(name: str) -> None:
    """As Stanford's code saves it: a class of its own with a matrix beside its BERT, and no modules."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    words = wordpiece(unused=2)
    model: Any = randomise(hf.BertModel(hf.BertConfig(**bert_sizes(words))), 28)
    save(folder, model, words)
    dense = randomise(torch.nn.Linear(HIDDEN, 24, bias=False), 29)
    tensors = {f"bert.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file({"linear.weight": dense.weight, **tensors}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["HF_ColBERT"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    said = {"query_token_id": "[unused0]", "doc_token_id": "[unused1]", "query_token": "[Q]", "doc_token": "[D]"}
    said |= {"similarity": "cosine", "interaction": "colbert", "dim": 24, "mask_punctuation": True}  # type: ignore
    said |= {"query_maxlen": 32, "doc_maxlen": 48, "attend_to_mask_tokens": False, "nway": 2}  # type: ignore
    (folder / "artifact.metadata").write_text(json.dumps(said, indent=2) + "\n")
    vectors_expected(name)


@torch.inference_mode()
def bge_m3_colbert(name: str) -> None:
    """Vectors as FlagEmbedding has them: w h + b of all tokens but the first, of length 1."""
    pieces = unigram()
    model = randomise(hf.XLMRobertaModel(hf.XLMRobertaConfig(**roberta_sizes(pieces))), 30)
    linear = randomise(torch.nn.Linear(HIDDEN, HIDDEN), 31)
    shutil.rmtree(HERE / name, ignore_errors=True)
    save(HERE / name, model, pieces)
    save_file(linear.state_dict(), HERE / name / "colbert_linear.safetensors")

    def vectors(dtype: torch.dtype, text: str) -> Any:
        network = hf.AutoModel.from_pretrained(HERE / name, dtype=dtype)
        ids = pieces(text, truncation=True, max_length=WINDOW)["input_ids"]
        states = network(torch.tensor([ids])).last_hidden_state[0, 1:]
        weight, bias = (p.to(dtype) for p in linear.parameters())
        return functional.normalize(functional.linear(states, weight, bias), dim=-1).float()

    fed = [pieces(text, truncation=True, max_length=WINDOW)["input_ids"] for text in TEXTS]
    found = [vectors(torch.float32, text) for text in TEXTS]
    arrays = tokens(name, TEXTS, fed, WINDOW)
    arrays |= {"vectors": torch.cat(found).numpy(), "vector_counts": flat([len(one)] for one in found)}
    pairs = [[vectors(torch.float32, text) for text in pair] for pair in PAIRS]
    arrays["pair_maxsim"] = np.asarray([(q @ p.T).max(dim=1).values.sum().item() for q, p in pairs], np.float32)
    short = torch.cat([vectors(torch.bfloat16, text) for text in TEXTS])
    write_expected(name, arrays, lowest_cosine(short, arrays["vectors"]))


def bert_splade(name: str) -> None:
    words = wordpiece()
    model: Any = hf.BertForMaskedLM(hf.BertConfig(**bert_sizes(words)))
    sparse_encoder(name, randomise(model, 18), words, "max")


def roberta_splade(name: str) -> None:
    pairs = byte_pairs()
    model: Any = hf.RobertaForMaskedLM(hf.RobertaConfig(**roberta_sizes(pairs)))
    sparse_encoder(name, randomise(model, 33), pairs, "max")


def xlm_roberta_splade(name: str) -> None:
    pieces = unigram()
    model: Any = hf.XLMRobertaForMaskedLM(hf.XLMRobertaConfig(**roberta_sizes(pieces)))
    sparse_encoder(name, randomise(model, 34), pieces, "sum")


def camembert_splade(name: str) -> None:
    pieces = camembert_pieces()
    model: Any = hf.CamembertForMaskedLM(hf.CamembertConfig(**roberta_sizes(pieces)))
    sparse_encoder(name, randomise(model, 35), pieces, "max")


def modernbert_splade(name: str) -> None:
    words = modern()
    model: Any = hf.ModernBertForMaskedLM(hf.ModernBertConfig(**modernbert_sizes(words)))
    sparse_encoder(name, randomise(model, 36, norm=0.5), words, "max", less=1)


def distilbert_splade(name: str) -> None:
    words = distilberts()
    model: Any = hf.DistilBertForMaskedLM(hf.DistilBertConfig(**distilbert_sizes(words)))
    sparse_encoder(name, randomise(model, 19), words, "sum")


class Gated(torch.nn.Module):
    """act(U x) * V x, of one matrix for both; `first` says whether U comes first in it."""

    def __init__(self, act: str, first: bool) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(HIDDEN, 2 * SIZES["intermediate_size"], bias=False)
        self.act, self.first = getattr(functional, act), first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.dense(x).chunk(2, dim=-1)
        return self.act(left) * right if self.first else left * self.act(right)


class Normed(torch.nn.Module):
    """A linear layer and a norm of all that it gives, before it is split into heads."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear, self.norm = linear, torch.nn.LayerNorm(HIDDEN, eps=1e-12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


def alibi(heads: int, places: int) -> torch.Tensor:
    """What is added to scores (Press et al., 2021, arXiv:2108.12409), by distance to both sides: [heads, n, n].

    Slopes of n heads are 2^(-8/n), 2^(-16/n) and so on; where n is no power of 2, the first are those of the power
    below it, the others each second one of twice as many, as the paper's own code has it.
    """

    def of(n: int) -> list[float]:
        below = 2 ** math.floor(math.log2(n))
        own = [2.0 ** (-8 * i / below) for i in range(1, below + 1)]
        return own if below == n else own + of(2 * below)[::2][: n - below]

    place = torch.arange(places)
    return -torch.tensor(of(heads))[:, None, None] * (place[:, None] - place[None]).abs()


JINA_CODE = "jinaai/jina-bert-implementation"
JINA_NORMED = "jinaai/jina-bert-v2-qk-post-norm"
JINA_NAMES = {
    JINA_CODE: {
        r"(layer\.\d+)\.intermediate\.dense": r"\1.mlp.gated_layers",
        r"(layer\.\d+)\.output\.dense": r"\1.mlp.wo",
        r"(layer\.\d+)\.output\.LayerNorm": r"\1.mlp.layernorm",
    },
    JINA_NORMED: {
        r"(layer\.\d+)\.intermediate\.dense": r"\1.mlp.up_gated_layer",
        r"(layer\.\d+)\.output\.dense": r"\1.mlp.down_layer",
        r"(layer\.\d+)\.output\.LayerNorm": r"\1.layer_norm_2",
        r"self\.(query|key)\.linear": r"self.\1",
        r"self\.(q|k)(?:uery|ey)\.norm": r"self.layer_norm_\1",
    },
}
"""What its tensors are called as BERT's -> as the published ones."""


def jina_bert_of(whole: Any, code: str, act: str) -> Any:
    """transformers' BERT, or a classifier of it, changed into Jina's, of which transformers has no class."""
    network = getattr(whole, "bert", whole)
    network.embeddings.position_embeddings.weight.data.zero_()

    def biased(_: Any, args: Any, given: dict[str, Any]) -> Any:
        biases = alibi(network.config.num_attention_heads, args[0].shape[1])[None].to(args[0].dtype)
        return args, given | {"attention_mask": biases}  # a text alone, of which no token is hidden

    network.encoder.register_forward_pre_hook(biased, with_kwargs=True)
    for layer in network.encoder.layer:
        layer.intermediate = Gated(act, first=code == JINA_CODE)
        if code == JINA_NORMED:
            layer.attention.self.query = Normed(layer.attention.self.query)
            layer.attention.self.key = Normed(layer.attention.self.key)
            layer.layer_norm_1 = norm = torch.nn.LayerNorm(HIDDEN, eps=1e-12)
            layer.attention.output.register_forward_hook(
                lambda _, given, result, norm=norm: norm(given[1] + result)
            )
    return whole


def jina_bert_config(folder: str | Path) -> tuple[Any, str, str]:
    """transformers' configuration of a published one, the code that it names, and what its gate does."""
    own = json.loads(Path(folder, "config.json").read_text())
    code = own["auto_map"]["AutoModel"].partition("--")[0]
    kept = {key: own[key] for key in (*SIZES, "vocab_size", "num_hidden_layers", "max_position_embeddings")}
    labels = {"num_labels": 1} if "id2label" in own else {}
    return hf.BertConfig(**kept, **labels), code, {"geglu": "gelu", "reglu": "relu"}[own["feed_forward_type"]]


def load_jina_bert(folder: str, kind: Any, **options: Any) -> Any:
    """The published layout, by sentence-transformers' class `kind`."""
    config, code, act = jina_bert_config(folder)
    network: Any = (hf.BertModel if kind is SentenceTransformer else hf.BertForSequenceClassification)(config)
    stored = load_file(Path(folder, "model.safetensors"))
    with tempfile.TemporaryDirectory() as plain:
        shutil.copytree(folder, plain, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model.safetensors"))
        network.save_pretrained(plain)
        model = kind(plain, **options)
    changed = jina_bert_of(model[0].model, code, act)
    renamed = {jina_name(key, code): key for key in changed.state_dict()}
    places = next(key for key in renamed if key.endswith("position_embeddings.weight"))
    stored[places] = torch.zeros(config.max_position_embeddings, HIDDEN)
    changed.load_state_dict({renamed[key]: one for key, one in stored.items()})
    changed.to(options["model_kwargs"]["dtype"])
    return model


def jina_name(key: str, code: str) -> str:
    for old, new in JINA_NAMES[code].items():
        key = re.sub(old, new, key)
    return key


def save_jina_bert(name: str, whole: Any, code: str, seed: int, feed_forward: str, kind: str) -> None:
    """Random weights and a configuration as published, in place of what transformers has saved."""
    folder = HERE / name
    act = {"geglu": "gelu", "reglu": "relu"}[feed_forward]
    changed = randomise(jina_bert_of(whole, code, act), seed, norm=0.5).state_dict()
    stored = {jina_name(key, code): one for key, one in changed.items() if "position_embeddings" not in key}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    places = {"AutoConfig": "configuration_bert.JinaBertConfig", "AutoModel": "modeling_bert.JinaBertModel"}
    places["AutoModelForSequenceClassification"] = "modeling_bert.JinaBertForSequenceClassification"
    config |= {"auto_map": {key: f"{code}--{place}" for key, place in places.items()}, "architectures": [kind]}
    config |= {"position_embedding_type": "alibi", "feed_forward_type": feed_forward, "emb_pooler": "mean"}
    config |= {"_name_or_path": code, "model_max_length": WINDOW, "torch_dtype": config.pop("dtype")}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def jina_bert(name: str, code: str = JINA_CODE, **sizes: int) -> None:
    words = wordpiece()
    network: Any = hf.BertModel(hf.BertConfig(**bert_sizes(words) | sizes))
    save_embedder(name, network, words, Pooling(HIDDEN, "mean"))
    save_jina_bert(name, network, code, 28, "geglu", "JinaBertForMaskedLM")
    expect_embeddings(name)


def jina_reranker(name: str) -> None:
    words = wordpiece()
    classifier: Any = hf.BertForSequenceClassification(hf.BertConfig(**bert_sizes(words), **ONE))
    shutil.rmtree(HERE / name, ignore_errors=True)
    save(HERE / name, classifier, words)
    save_jina_bert(name, classifier, JINA_CODE, 29, "reglu", "JinaBertForSequenceClassification")
    expect_scores(name)


LOADERS: dict[str, Callable[..., Any]] = {
    "jina-bert": partial(load_jina_bert, kind=SentenceTransformer),
    "jina-bert-code": partial(load_jina_bert, kind=SentenceTransformer),
    "jina-reranker": partial(load_jina_bert, kind=CrossEncoder),
    "jina-colbert": load_jina_colbert,
    "jina-flash-reranker": load_jina_flash_reranker,
    "jina-v3-adapters": load_jina_v3,
    "new": partial(load_new, kind=SentenceTransformer),
    "new-reranker": partial(load_new, kind=CrossEncoder),
    "nomic-bert-moe": load_nomic_moe,
    "qwen3-vl-reranker": load_qwen3_vl,
    "voyage": load_voyage,
}
"""What loads a checkpoint that sentence-transformers cannot."""


MAKERS: dict[str, Callable[[str], None]] = {
    "bert-cls": bert_cls,
    "bert-cross-encoder": bert_cross_encoder,
    "bert-colbert": bert_colbert,
    "bert-splade": bert_splade,
    "bge-m3-colbert": bge_m3_colbert,
    "bge-m3-sparse": bge_m3,
    "camembert": camembert,
    "camembert-cross-encoder": camembert_cross_encoder,
    "camembert-splade": camembert_splade,
    "cross-encoder": roberta_cross_encoder,
    "deberta": deberta,
    "deberta-cross-encoder": deberta_cross_encoder,
    "distilbert": distilbert,
    "distilbert-cross-encoder": distilbert_cross_encoder,
    "distilbert-splade": distilbert_splade,
    "electra": electra,
    "electra-cross-encoder": electra_cross_encoder,
    "gemma3": gemma3,
    "gte": gte,
    "jina-bert": jina_bert,
    "jina-bert-code": partial(jina_bert, code=JINA_NORMED, num_attention_heads=6),
    "jina-colbert": jina_colbert,
    "jina-flash-reranker": jina_flash_reranker,
    "jina-reranker": jina_reranker,
    "jina-v3": jina_v3,
    "jina-v3-adapters": jina_v3_adapters,
    "llama": llama,
    "mistral": mistral,
    "model2vec": model2vec,
    "model2vec-mapped": model2vec_mapped,
    "modernbert": modernbert,
    "modernbert-reranker": modernbert_reranker,
    "modernbert-splade": modernbert_splade,
    "mpnet": mpnet,
    "mxbai-reranker": mxbai_reranker,
    "nemotron-reranker": nemotron_reranker,
    "mpnet-cross-encoder": mpnet_cross_encoder,
    "new": new,
    "new-reranker": new_reranker,
    "nomic-bert": nomic_bert,
    "nomic-bert-moe": nomic_bert_moe,
    "qwen2": qwen2,
    "qwen3-classifier": qwen3_classifier,
    "qwen3-embedding": qwen3_embedding,
    "qwen3-reranker": qwen3_reranker,
    "qwen3-vl-reranker": qwen3_vl_reranker,
    "pylate-colbert": pylate_colbert,
    "roberta": roberta,
    "roberta-cross-encoder": roberta_pairs,
    "roberta-splade": roberta_splade,
    "stanford-colbert": stanford_colbert,
    "static": static,
    "t5": t5,
    "t5-gated": t5_gated,
    "voyage": voyage,
    "xlm-roberta": xlm_roberta,
    "xlm-roberta-splade": xlm_roberta_splade,
}


def main() -> None:
    """Makes those that are named, or all."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MAKERS))
    names = parser.parse_args().names or list(MAKERS)
    if unknown := set(names) - set(MAKERS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(MAKERS)}")
    torch.set_num_threads(1)
    for name in names:
        MAKERS[name](name)


if __name__ == "__main__":
    main()
