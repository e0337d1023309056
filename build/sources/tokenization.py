"""Whether `tokenizer.json`, or what is made in its place, alone gives the token ids that the reference gives.

transformers and sentence-transformers read more files than that one, and what they say in those goes before it.
The tokenizer step has only `tokenizer.json`: what disagrees with it stops the build.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece

from build.errors import BuildError
from build.sources.checkpoint import MASK, Checkpoint
from build.sources.files import is_listed
from build.sources.settings import Settings
from build.sources.vocabularies import BERT as BERT_CLASS
from build.sources.vocabularies import LLAMA, QWEN2, ROBERTA, difference, of_class, of_pairs

HARMLESS = (
    # What the class of the tokenizer is told of files, of decoding, of padding and of how a call is made.
    *("tokenizer_class", "backend", "is_local", "local_files_only", "name_or_path", "special_tokens_map_file"),
    *(
        "full_tokenizer_file",
        "tokenizer_file",
        "vocab_file",
        "sp_model_kwargs",
        "legacy",
        "extra_ids",
        "from_slow",
    ),
    *("clean_up_tokenization_spaces", "spaces_between_special_tokens", "errors", "trim_offsets"),
    *("padding_side", "pad_to_multiple_of", "pad_token_type_id", "padding", "return_token_type_ids"),
    *("max_length", "stride", "truncation_strategy", "truncation", "use_fast", "processor_class"),
    *("chat_template", "use_default_system_prompt", "add_generation_prompt", "response_schema"),
    # Read where pairs are told apart.
    "model_input_names",
    # Read by the tokenizers in Python alone, and where a tokenizer.json is made.
    *("do_basic_tokenize", "never_split", "do_lower_case", "remove_space", "keep_accents", "add_prefix_space"),
    *("split_by_punct", "unk_id"),
)
"""Keys of `tokenizer_config.json` that change no token id; `do_lower_case` is compared all the same."""

BERT = tuple(
    f"{kind}Tokenizer{fast}" for kind in ("Bert", "DistilBert", "Electra", "MPNet") for fast in ("", "Fast")
)
"""Tokenizers whose normaliser follows `tokenizer_config.json` and their own defaults."""

BERTS = ("", "bert", "distilbert", "electra", "mpnet")
"""Model types that have such a tokenizer where no file names another."""

FLAGS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
"""Key of `tokenizer_config.json` -> what BERT's normaliser calls it in `tokenizer.json`."""

DEFAULTS = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
"""What BERT's tokenizer takes where `tokenizer_config.json` says nothing."""

NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "boi", "eoi", "image", "audio", "video")
"""Tokens that have a key of their own, as `cls_token`."""


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Raises BuildError for the first thing in which another file disagrees with `tokenizer.json`."""
    if checkpoint.is_static:  # of which no other file is read
        return
    config = checkpoint.tokenizer_config
    if config.find("auto_map") is not None and not checkpoint.is_ended_by_code:
        raise BuildError(f"{config.path} has auto_map: code of its own tokenizes, which is never run")
    config.skip(HARMLESS)
    config.require("truncation_side", "right")
    config.require("split_special_tokens", False)
    _check_normaliser(checkpoint, config)
    _check_special_tokens(checkpoint, config)
    _check_class(checkpoint)
    _check_first_space(checkpoint, config)
    _check_ends(checkpoint, config)
    _check_window(checkpoint)


def _normaliser(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The steps of the normaliser in `tokenizer.json`, those of sequences one after the other."""
    whole = checkpoint.tokenizer_steps["normalizer"]

    def steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        if part is not None and part["type"] == "Sequence":
            for inner in part["normalizers"]:
                yield from steps(inner)
        elif part is not None:
            yield part

    return list(steps(whole))


def _check_normaliser(checkpoint: Checkpoint, config: Settings) -> None:
    steps = _normaliser(checkpoint)
    bert = next((step for step in steps if step["type"] == "BertNormalizer"), None)
    for name, ours in FLAGS.items():
        said = config.find(name)
        # A class that is not named follows from the model's type.
        follows = config.find("tokenizer_class") in (None, *BERT) and checkpoint.model_type in BERTS
        if bert is None:
            continue
        expected = DEFAULTS[name] if said is None and follows else said
        if (name in config or follows) and expected != bert[ours]:
            raise BuildError(
                f"{config.path} has {name} = {json.dumps(expected)}{'' if name in config else ' by default'}, but "
                f"tokenizer.json has {ours} = {json.dumps(bert[ours])}: libraries differ in which of them they "
                "follow; make the two agree"
            )


def _check_special_tokens(checkpoint: Checkpoint, config: Settings) -> None:
    """The reference adds a token that it is told of and that `tokenizer.json` has not."""
    tokenizer = checkpoint.tokenizer
    added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    for file in (config, checkpoint.special_tokens):
        for name, content in _said_tokens(file):
            if content not in added:
                raise BuildError(
                    f"{file.path} has {name} = {json.dumps(content)}, which is none of tokenizer.json's added "
                    "tokens: write both files anew with transformers, "
                    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
                )
    decoder = config.find("added_tokens_decoder") or {}
    ids = [(config, _content(token), i) for i, token in decoder.items()] if isinstance(decoder, dict) else []
    older = checkpoint.added_tokens
    ids += [(older, content, str(older.find(content))) for content in older]
    for file, token, i in ids:
        if token is not None and str(added.get(token)) != i:
            raise BuildError(
                f"{file.path} has {json.dumps(token)} as token {i}, tokenizer.json as {added.get(token)}: "
                "they are of two tokenizers"
            )


def _said_tokens(file: Settings) -> Iterator[tuple[str, str]]:
    """Each special token that a file names, with the key that names it."""
    said: list[tuple[str, Any]] = [(f"{name}_token", file.find(f"{name}_token")) for name in NAMED]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        value = file.find(name)
        values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        said += [(name, token) for token in values]
    for name, token in said:
        if (content := _content(token)) is not None:
            yield name, content


def _content(token: object) -> str | None:
    """The text of a token, which is written as it is or as an object; None for no token."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if content is None else str(content)


def _check_class(checkpoint: Checkpoint) -> None:
    """Some classes of transformers 5 take the words of `tokenizer.json` alone; 4 and others go by the file."""
    tokenizer, config, kind = checkpoint.tokenizer, checkpoint.tokenizer_config, checkpoint.tokenizer_class
    if not is_listed(checkpoint.transformer / "tokenizer.json"):
        return
    if kind == BERT_CLASS and not isinstance(tokenizer.model, WordPiece):
        print(
            f"{config.path} has tokenizer_class {kind}, and tokenizer.json has another kind of vocabulary: tokens "
            "are those of the file, as in transformers 4; transformers 5 knows none of its words",
            flush=True,
        )
    elif kind == BERT_CLASS:
        _check_agrees(checkpoint, of_class(tokenizer, b"", checkpoint.transformer, checkpoint.folder, kind))
    elif isinstance(tokenizer.model, BPE) and kind in (LLAMA, QWEN2):
        # Of Mistral's, and of bytes as Llama 3's, transformers 5 goes by the file.
        if kind == LLAMA and (checkpoint.model_type == "mistral" or _byte_level(checkpoint.tokenizer_steps)):
            return
        _check_agrees(checkpoint, of_pairs(tokenizer, kind, config))


def _check_agrees(checkpoint: Checkpoint, made: Tokenizer) -> None:
    if (probe := difference(checkpoint.tokenizer, made)) is not None:
        raise BuildError(
            f"{checkpoint.tokenizer_config.path} has tokenizer_class {checkpoint.tokenizer_class}, as which "
            f"transformers 5 makes other tokens of {probe!r} than tokenizer.json says: libraries differ in which "
            "of them they follow; say PreTrainedTokenizerFast to follow the file"
        )


def _byte_level(steps: dict[str, Any]) -> list[dict[str, Any]]:
    """Steps that make words of bytes."""
    before = steps["pre_tokenizer"] or {}
    return [step for step in before.get("pretokenizers", [before]) if step.get("type") == "ByteLevel"]


def _check_first_space(checkpoint: Checkpoint, config: Settings) -> None:
    """Byte-level words differ by the space before them; two files say whether a text's first one gets one."""
    byte_level = _byte_level(checkpoint.tokenizer_steps)
    said = config.find("add_prefix_space")
    if said is None and checkpoint.tokenizer_class == ROBERTA:
        said = False  # the class's own default, which goes before the file
    if said is not None and byte_level and said != byte_level[0]["add_prefix_space"]:
        does = "" if byte_level[0]["add_prefix_space"] else " not"
        raise BuildError(
            f"{config.path} has add_prefix_space = {json.dumps(said)}"
            f"{'' if 'add_prefix_space' in config else ' by default'}, but tokenizer.json does{does} put a space "
            "before a text: libraries differ in which of them they follow; make the two agree"
        )


def _check_ends(checkpoint: Checkpoint, config: Settings) -> None:
    """What the reference is told to put around a text, against what `tokenizer.json` puts there."""
    ids = checkpoint.tokenizer.encode("a").ids
    for name, end in (("bos", 0), ("eos", -1)):
        key = f"add_{name}_token"
        flag = config.find(key)
        token = config.find(f"{name}_token")
        content = _content(token) or checkpoint.named_token(name)
        if flag and not content:
            raise BuildError(f"{config.path} has {key} = true, but no {name}_token: say which token is put there")
        if flag is None or not content:
            continue
        if flag != (bool(ids) and ids[end] == checkpoint.tokenizer.token_to_id(content)):
            does = "not put there" if flag else "put there"
            raise BuildError(
                f"{config.path} has {key} = {json.dumps(flag)}, but {json.dumps(content)} is {does} by "
                "tokenizer.json: "
                "libraries differ in which of them they follow; make the two agree"
            )


def _check_window(checkpoint: Checkpoint) -> None:
    """What sentence-transformers is told of the transformer and its tokenizer."""
    window = checkpoint.window
    if window is None:
        return
    if any(module.kind == "LogitScore" for module in checkpoint.modules):
        is_mixed = checkpoint.architecture.endswith("ForConditionalGeneration")  # of texts and pictures
        window.require("transformer_task", "any-to-any" if is_mixed else "text-generation")
        window.require("module_output_name", "causal_logits")
    else:
        window.require("transformer_task", "feature-extraction", "sequence-classification", "fill-mask")
        window.require("module_output_name", "token_embeddings", "scores")
    if checkpoint.chat is None:
        modalities = window.find("modality_config")
        if isinstance(modalities, dict) and "message" in modalities:
            raise BuildError(
                f"{window.path} has modality_config.message: its texts are read in the words of a chat's "
                "template, which is written for rerankers only"
            )
        window.require("modality_config", *({"text": output} for output in OUTPUTS))
        window.require("processing_kwargs", {}, False)
    else:  # whose arguments its template reads
        modality, processing = window.inner("modality_config"), window.inner("processing_kwargs")
        if modality is not None:
            modality.require("text", *OUTPUTS)
            modality.skip(["image", "video"])  # which are not served
        if processing is not None:
            processing.skip(["chat_template"])
        for name, value in OUTPUTS[1].items():
            checkpoint.chat.require(name, value)
    for name in ("config_args", "config_kwargs"):
        window.require(name, {}, False)
    if MASK not in [module.kind for module in checkpoint.modules]:  # whose pages read it
        window.require("query_expansion", {}, False)
        if not checkpoint.is_cross_encoder:  # which reads pairs
            window.require("query_length", None)
            window.require("document_length", None)
    window.skip(["unpad_inputs", "query_length", "document_length"])
    for names, harmless in (
        (("model_args", "model_kwargs"), MODEL_ARGUMENTS),
        (("tokenizer_args", "processor_kwargs"), TOKENIZER_ARGUMENTS),
    ):
        if (inner := window.inner(*names)) is not None:
            inner.skip(harmless)
    lowers = any(
        step["type"] == "Lowercase" or (step["type"] == "BertNormalizer" and step["lowercase"])
        for step in _normaliser(checkpoint)
    )
    if window.flag("do_lower_case", default=False) and not lowers:
        raise BuildError(
            f"{window.path} has do_lower_case = true, but tokenizer.json does not lower case: put a Lowercase "
            "normalizer first in it, or set do_lower_case to false if the model was trained without"
        )


OUTPUTS = tuple({"method": "forward", "method_output_name": name} for name in ("last_hidden_state", "logits"))
"""How the reference may be told to run a transformer."""
MODEL_ARGUMENTS = (
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "safe_serialization",
    "use_safetensors",
    "device_map",
)
TOKENIZER_ARGUMENTS = ("padding_side", "use_fast")
