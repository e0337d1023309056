"""The family of a language model that writes: one Triton model, which batches by itself.

A checkpoint is a folder in transformers' layout, or one that has a GGUF file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from build.catalog import CatalogEntry
from build.errors import BuildError, UnsupportedRuntimeError
from build.graphs.architectures import ARCHITECTURES
from build.graphs.decoder import Decoder
from build.graphs.generator import MODEL, Tensors, write_generator, write_least
from build.graphs.unread import HARMLESS
from build.graphs.vocabulary import DETOKENIZER, write_vocabulary
from build.rendering import repository
from build.rendering.model_folder import Model
from build.rendering.models import check_weights_are_plain
from build.runtimes import DEFAULT
from build.sources.checkpoint import CHAT_TEMPLATE, Checkpoint
from build.sources.files import gguf_file, is_listed, own_file
from build.sources.settings import Settings, check_nothing_is_left, read_json
from build.steps.vocabulary import token_texts
from build.target import Target

READ_BY_VLLM = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files of a checkpoint, beside its weights and tokenizer.json."""

SPECIAL = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
"""Tokens that templates name as `bos_token` and so on."""

GGUF_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


@dataclass(frozen=True)
class LanguageModel:
    """What a checkpoint of any layout says."""

    decoder: Decoder
    weights: Tensors
    files: list[Path]
    """Files that hold the weights."""
    tokenizer: str
    """The content of tokenizer.json."""
    template: str | None
    """How messages become a prompt, in Jinja."""
    special_tokens: dict[str, str]
    """Tokens that a template may name."""
    end_tokens: list[int]
    """Ids that an answer ends with."""


def generator_models(entry: CatalogEntry, checkpoint: Checkpoint, target: Target) -> list[Model]:
    """The one model of the family; raises BuildError for what the checkpoint says and nothing here reads."""
    runtime, gguf = target.traits, gguf_file(checkpoint.folder)
    loads_checkpoint = not runtime.step
    if loads_checkpoint and gguf:
        raise UnsupportedRuntimeError(
            f"{entry.name} has its weights in {gguf.name}, which {target.runtime} is not given: take one in "
            f"safetensors, or RUNTIME={DEFAULT}"
        )
    model = _of_gguf(checkpoint, gguf) if gguf else _of_transformers(checkpoint, read_elsewhere=loads_checkpoint)
    window = min(entry.max_tokens or model.decoder.positions, model.decoder.positions)
    cache = max(runtime.cache_tokens, window)
    parameters = {
        **entry.facts,
        "runtime": target.runtime,
        "precision": target.precision,
        "max_tokens": str(window),
        "cache_tokens": str(cache),
        "cache_bytes": str(cache * cache_bytes(model.decoder, target.precision)),
        "end_tokens": json.dumps(model.end_tokens),
        "special_tokens": json.dumps(model.special_tokens),
    }
    if entry.ignore:
        parameters["ignored"] = ", ".join(entry.ignore)
    check_nothing_is_left(checkpoint.unread_settings(), entry.ignore)
    made = {"tokenizer.json": model.tokenizer}
    if model.template is not None:
        made[CHAT_TEMPLATE] = model.template
    config = repository.generator(entry.name, parameters, target.kind)
    if loads_checkpoint:
        beside = [path for name in READ_BY_VLLM if is_listed(path := checkpoint.folder / name)]
        files = [*model.files, *(own_file(path, checkpoint.folder) for path in beside)]
        write = partial(_link, files)
    else:
        write = partial(_write, model, window, target.precision)
    return [Model(config, step=runtime.generator, made=made, write=write)]


def cache_bytes(decoder: Decoder, precision: str) -> int:
    """Bytes of the cache that a token takes."""
    width = 4 if precision == "fp32" else 2
    return 2 * decoder.layers * decoder.key_value_heads * decoder.width * width


def _write(model: LanguageModel, window: int, precision: str, version: Path) -> None:
    write_generator(model.decoder, model.weights, window, precision, version / MODEL)
    if (texts := token_texts(json.loads(model.tokenizer))) is not None:
        write_vocabulary(texts, version / DETOKENIZER)
        (version / "grammar").mkdir()
        write_least(model.decoder, model.decoder.vocab_size, version / "grammar" / MODEL)


def _link(files: Sequence[Path], version: Path) -> None:
    """Has the version folder hold files of a checkpoint: these themselves, or copies in another file system."""
    for file in files:
        try:
            os.link(file.resolve(), version / file.name)
        except OSError:
            shutil.copyfile(file, version / file.name)


def _decoder(config: Settings) -> Decoder:
    kind = config.word("model_type")
    known = [name for name, architecture in ARCHITECTURES.items() if architecture.cached]
    if kind not in known:
        raise BuildError(
            f"{config.path} has model_type {kind!r}; language models are written for {', '.join(known)}"
        )
    decoder = ARCHITECTURES[kind].read(config)
    assert isinstance(decoder, Decoder)
    return decoder


def _of_gguf(checkpoint: Checkpoint, path: Path) -> LanguageModel:
    try:
        from build.sources.gguf_file import Gguf
    except ImportError:
        raise BuildError("a GGUF file is read by a package that is not installed: run make with CHAT=1") from None
    file = Gguf(path)
    decoder = _decoder(file.config)
    tokens = {f"{name}_token": file.special_token(own) for name, own in GGUF_NAMES.items()}
    end = file.settings.integer("tokenizer.ggml.eos_token_id", least=0)
    checkpoint.account(file.settings, file.tensors)
    return LanguageModel(
        decoder,
        file.tensors,
        [path],
        file.tokenizer,
        file.template,
        {name: token for name, token in tokens.items() if token is not None},
        [end],
    )


def _of_transformers(checkpoint: Checkpoint, read_elsewhere: bool) -> LanguageModel:
    """Of which another engine reads all tensors, where they are `read_elsewhere`."""
    config = checkpoint.config
    decoder = _decoder(config)
    architecture = ARCHITECTURES[checkpoint.model_type]
    check_weights_are_plain(checkpoint, architecture)
    if "quantization_config" in config:
        raise BuildError(f"{config.path} has quantization_config: take the checkpoint that it was made from")
    config.skip((*HARMLESS, *architecture.harmless))
    unused = ("*",) if read_elsewhere else _unused(architecture.unused, decoder)
    weights = checkpoint.weights(checkpoint.folder, architecture.prefixes, unused)
    file = checkpoint.folder / "tokenizer.json"
    if not is_listed(file):
        raise BuildError(f"{checkpoint.folder} has no tokenizer.json, which a language model is read by")
    tokenizer = own_file(file, checkpoint.folder).read_text("utf-8")
    said, named = checkpoint.tokenizer_config, checkpoint.named_tokens(SPECIAL)
    said.skip(said)
    return LanguageModel(
        decoder,
        weights,
        weights.paths,
        tokenizer,
        _template(checkpoint),
        named,
        _end_tokens(checkpoint),
    )


def _unused(patterns: tuple[str, ...], decoder: Decoder) -> tuple[str, ...]:
    """Of tensors, what an encoder leaves unread and a tied language model too; another one's head is read."""
    return patterns if decoder.tied else tuple(one for one in patterns if not one.startswith("lm_head"))


def _template(checkpoint: Checkpoint) -> str | None:
    """In a file of its own, where transformers 5 puts it, or in the tokenizer's configuration."""
    path = checkpoint.folder / CHAT_TEMPLATE
    if is_listed(path):
        return own_file(path, checkpoint.folder).read_text("utf-8")
    found: Any = checkpoint.tokenizer_config.find("chat_template")
    if isinstance(found, list):  # several, by name
        found = {one.get("name"): one.get("template") for one in found}.get("default")
    return found if isinstance(found, str) else None


def _end_tokens(checkpoint: Checkpoint) -> list[int]:
    """Those of generation_config.json, or of config.json where there is none."""
    path = checkpoint.folder / "generation_config.json"
    said: Any = read_json(path).get("eos_token_id") if is_listed(path) else None
    found = said if said is not None else checkpoint.config.find("eos_token_id")
    tokens = found if isinstance(found, list) else [found]
    if not all(isinstance(token, int) for token in tokens):
        raise BuildError(f"{checkpoint.config.path} does not say by eos_token_id what an answer ends with")
    return tokens
