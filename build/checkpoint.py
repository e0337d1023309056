"""A checkpoint is data: a folder with `config.json`, safetensors weights and tokenizer files, checked by hash."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from build.errors import BuildError
from build.files import SHARDS

PREFIXES = ("", "model.", "bert.", "roberta.")
ROBERTA = ("camembert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl")
"""Model types that count positions as RoBERTa does."""


class Checkpoint:
    """Reads one checkpoint folder in the layout of transformers and sentence-transformers."""

    def __init__(self, folder: Path, downloaded: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.downloaded = downloaded or {}
        """File -> sha256, where the catalog could not say it beforehand."""

    def json(self, name: str) -> Any:
        """The parsed JSON file `name` of the checkpoint; raises BuildError when it is missing or broken."""
        path = self.folder / name
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            raise BuildError(f"the checkpoint has no {name} (looked in {self.folder})") from None
        except ValueError as error:
            raise BuildError(f"{path} is not valid JSON: {error}") from None

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`."""
        config = self.json("config.json")
        if not isinstance(config, dict):
            raise BuildError(f"{self.folder / 'config.json'} must hold a JSON object")
        return config

    def require(self, field: str, value: object, default: object = None) -> None:
        """Raises BuildError unless `config.json` has `field` set to `value`."""
        found = self.config.get(field, default)
        if found != value:
            raise BuildError(
                f"{self.folder / 'config.json'} has {field} = {found!r}; "
                f"the graph of {self.config.get('model_type')!r} is written for {value!r} only"
            )

    def field(self, *names: str) -> Any:
        """The first of `names` that `config.json` has: older checkpoints call some fields otherwise."""
        for name in names:
            if name in self.config:
                return self.config[name]
        raise BuildError(f"{self.folder / 'config.json'} has no {' or '.join(names)}")

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self.field("hidden_size", "n_embd", "dim", "d_model"))

    @property
    def first_position(self) -> int:
        """Row of the position table that the first token takes."""
        # RoBERTa counts from the padding token's id on, and leaves that one out.
        return int(self.field("pad_token_id")) + 1 if self.config.get("model_type") in ROBERTA else 0

    @property
    def positions(self) -> int:
        """How many tokens the encoder has positions for."""
        # Nomic's checkpoint has both, and gives as the second one what it was trained on.
        return int(self.field("n_positions", "max_position_embeddings")) - self.first_position

    @property
    def architecture(self) -> str:
        """The transformers class that the checkpoint was saved from, as `BertForSequenceClassification`."""
        return str(self.field("architectures")[0])

    @property
    def segment_offset(self) -> int:
        """What is added to the ids of a pair's second text, 0 where the model does not tell the two apart."""
        is_pair = self.architecture.endswith("ForSequenceClassification")
        return int(self.field("vocab_size")) if is_pair and self.config.get("type_vocab_size", 1) > 1 else 0

    @property
    def max_tokens(self) -> int:
        """The longest text in tokens, special tokens included, as sentence-transformers reads it."""
        longest = self.positions
        if (self.folder / "sentence_bert_config.json").exists():
            asked = self.json("sentence_bert_config.json").get("max_seq_length")
            if asked is not None and asked > longest:
                raise BuildError(
                    f"{self.folder / 'sentence_bert_config.json'} has max_seq_length {asked}, "
                    f"but the encoder has {longest} positions"
                )
            if asked is not None:
                return int(asked)
        return min(longest, int(self.json("tokenizer_config.json").get("model_max_length", longest)))

    @property
    def prompts(self) -> dict[str, str]:
        """Prompt name -> what is put before the text: the checkpoint's own, and two that every model has."""
        name = "config_sentence_transformers.json"
        own = self.json(name).get("prompts", {}) if (self.folder / name).exists() else {}
        # Nomic's names for the two; an empty one beside them is only sentence-transformers' default.
        both = {side: own.get(side) or own.get(f"search_{side}", "") for side in ("query", "document")}
        return own | both

    def rope_theta(self, layer_type: str = "") -> float:
        """Base of the rotary positions, of one kind of layer where the checkpoint has several.

        Written as `rope_parameters` by transformers 5, as `rope_theta` and `rope_local_base_freq` before.
        """
        parameters = self.config.get("rope_parameters")
        if parameters is None:
            local = layer_type == "sliding_attention"
            return float(self.config["rope_local_base_freq" if local else "rope_theta"])
        parameters = parameters.get(layer_type, parameters)
        if (kind := parameters.get("rope_type", "default")) != "default":
            raise BuildError(f"{self.folder / 'config.json'} asks for rotary positions of type {kind!r}")
        return float(parameters["rope_theta"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """`tokenizer.json`; raises BuildError when it is missing or broken."""
        path = self.folder / "tokenizer.json"
        if not path.exists():
            raise BuildError(f"the checkpoint has no tokenizer.json (looked in {self.folder})")
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise BuildError(f"{path} cannot be read: {error}") from None

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """The weight `name` as FP32, with or without the prefix that heads put before their encoder's names."""
        for prefix in PREFIXES:
            if (path := self._weights.get(prefix + name)) is not None:
                # Opened for one tensor at a time: an open file keeps every page in memory that was read from it.
                with safe_open(path, framework="np") as file:
                    return np.asarray(file.get_tensor(prefix + name), np.float32)
        raise BuildError(f"the weights in {self.folder} have no tensor {name!r}")

    @cached_property
    def _weights(self) -> dict[str, Path]:
        """Tensor name -> the safetensors file that holds it."""
        names = ["model.safetensors"]
        if (self.folder / SHARDS).exists():
            names = sorted(set(self.json(SHARDS)["weight_map"].values()))
        files: dict[str, Path] = {}
        for name in names:
            path = self.folder / name
            if not path.exists():
                pickles = [pickle.name for pickle in self.folder.glob("*.bin")]
                instead = f"; {pickles[0]} is a pickle, which can run code when it is read" if pickles else ""
                raise BuildError(
                    f"the checkpoint has no {name} (looked in {self.folder}): "
                    f"weights are read from safetensors files only{instead}"
                )
            try:
                with safe_open(path, framework="np") as file:
                    files |= dict.fromkeys(file.keys(), path)
            except SafetensorError as error:
                raise BuildError(f"{path} is not a readable safetensors file: {error}") from None
        return files
