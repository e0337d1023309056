"""A GGUF file as a checkpoint: what it says by transformers' names, tensors dequantised, a tokenizer written out.

The layout is llama.cpp's. Numbers of blocks are those that the `gguf` package gives: FP32, exactly what the blocks
stand for. Llama's queries and keys lie there with the pairs of a head side by side, and are put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from build.errors import BuildError
from build.sources.settings import Settings

KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
"""What GGUF calls a key behind the architecture's name -> what transformers calls it in config.json."""

SAME = {"attention.value_length": "head_dim", "rope.dimension_count": "head_dim"}
"""What a graph has no other value for than another key's."""

HARMLESS = ("GGUF.", "general.", "tokenizer.ggml.seperator_token_id", "quantize.imatrix.")
"""Beginnings of keys that change no result."""

ARCHITECTURES = ("llama", "qwen2", "qwen3")

NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Tensor of GGUF, of a layer without its number -> transformers' name of it."""

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
WORDS: dict[str, list[Any]] = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Split(Regex(GPT2_WORDS), "isolated")],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")],
}
"""`tokenizer.ggml.pre` -> what cuts a text into words, as the published tokenizer.json of these models have it."""

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Of `tokenizer.ggml.token_type`."""


class Gguf:
    """One file, which remembers what was read of it."""

    def __init__(self, path: Path) -> None:
        """Raises BuildError where it is none, or is of an architecture that is not read."""
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
            values = {name: field.contents() for name, field in self._reader.fields.items()}
        except Exception as error:  # whatever a broken file leads to
            raise BuildError(f"{path} is not a readable GGUF file: {error}") from None
        self.settings = Settings(path, values)
        self.settings.skip(name for name in values if name.startswith(HARMLESS))
        self.architecture = self.settings.word("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise BuildError(
                f"{path} is of architecture {self.architecture!r}; language models are read of "
                f"{', '.join(ARCHITECTURES)}"
            )

    @cached_property
    def config(self) -> Settings:
        """What config.json would say."""
        said, own = self.settings, self.architecture
        found = {name: said.find(f"{own}.{key}") for key, name in KEYS.items()}
        found |= {"model_type": own, "tie_word_embeddings": "output.weight" not in self.tensors.stored}
        for token in ("bos", "eos"):
            found[f"{token}_token_id"] = said.find(f"tokenizer.ggml.{token}_token_id")
        if found["vocab_size"] is None:
            found["vocab_size"] = len(self.tokens)
        if found["head_dim"] is None and found["hidden_size"] and found["num_attention_heads"]:
            found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
        for key, name in SAME.items():
            said.require(f"{own}.{key}", found[name])
        return Settings(self.path, found)

    @cached_property
    def tensors(self) -> GgufTensors:
        """Its weights."""
        return GgufTensors(self)

    @cached_property
    def tokens(self) -> list[str]:
        """By their ids."""
        return self.settings.words("tokenizer.ggml.tokens")

    @property
    def template(self) -> str | None:
        """How messages become a text."""
        found = self.settings.find("tokenizer.chat_template")
        return None if found is None else str(found)

    def special_token(self, name: str) -> str | None:
        """The text of the token called `bos`, `eos`, `unknown` or `padding`."""
        i = self.settings.find(f"tokenizer.ggml.{name}_token_id")
        return None if i is None else self.tokens[i]

    @cached_property
    def tokenizer(self) -> str:
        """What tokenizer.json would say, of byte-level BPE; BuildError for another kind."""
        said = self.settings
        said.require("tokenizer.ggml.model", "gpt2")
        said.require("tokenizer.ggml.add_space_prefix", False, default=False)
        said.require("tokenizer.ggml.add_eos_token", False, default=False)
        # The template has the token itself, where texts are to begin with one.
        said.skip(["tokenizer.ggml.add_bos_token"])
        for name in ("bos", "eos", "unknown", "padding"):
            self.special_token(name)
        kind = said.word("tokenizer.ggml.pre")
        if kind not in WORDS:
            raise BuildError(
                f"{self.path} has words cut as {kind!r} does; they are cut as {', '.join(WORDS)} do: take the "
                "checkpoint in safetensors"
            )
        pairs = (pair.partition(" ") for pair in said.words("tokenizer.ggml.merges"))
        merges = [(left, right) for left, _, right in pairs]
        vocabulary = {token: i for i, token in enumerate(self.tokens)}
        try:
            made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=kind == "llama-bpe"))
        except Exception as error:  # tokenizers raises nothing narrower
            raise BuildError(f"{self.path} has a vocabulary that cannot be read: {error}") from None
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([*WORDS[kind], last])
        made.decoder = decoders.ByteLevel()
        kinds = said.find("tokenizer.ggml.token_type") or [NORMAL] * len(self.tokens)
        for token, own in zip(self.tokens, kinds, strict=True):
            if own in (CONTROL, USER_DEFINED):
                made.add_tokens([AddedToken(token, special=own == CONTROL, normalized=False)])
        return str(made.to_str())


class GgufTensors:
    """The weights of a file, by transformers' names without the prefix `model.`."""

    def __init__(self, file: Gguf) -> None:
        self._file = file
        self.stored = {tensor.name: tensor for tensor in file._reader.tensors}
        self._names = {_transformers_name(name): name for name in self.stored}
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def tensor(self, name: str, *shape: int) -> npt.NDArray[np.float32]:
        """One tensor, dequantised; BuildError when there is none of that shape, or it has no finite values."""
        path = self._file.path
        if name not in self._names:
            raise BuildError(f"{path} has no tensor for {name!r}")
        stored = self._names[name]
        self._read.add(stored)
        found = self.stored[stored]
        try:
            values = np.asarray(gguf.quants.dequantize(found.data, found.tensor_type), np.float32)
        except NotImplementedError:
            raise BuildError(
                f"{path} has {stored} as {found.tensor_type.name}, which is not read: take the file in Q8_0"
            ) from None
        if values.shape != shape:
            raise BuildError(
                f"{path} has {stored} of shape {list(values.shape)}, but its keys ask for {list(shape)}"
            )
        if not np.isfinite(values.sum(dtype=np.float64)):
            raise BuildError(f"{path} has values in {stored} that are not finite: download it again")
        if self._file.architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            key = "num_attention_heads" if name.endswith("q_proj.weight") else "num_key_value_heads"
            values = _apart(values, self._file.config.integer(key))
        return values

    def unread(self) -> Iterator[tuple[str, str]]:
        """Each tensor that nobody has read, with a sentence on it."""
        for name in self.stored:
            if name not in self._read:
                yield name, f"{self._file.path} has tensor {name}, which is not read and may change the result"


def _transformers_name(name: str) -> str:
    stem, _, last = name.rpartition(".")
    if stem.startswith("blk."):
        _, number, inner = stem.split(".", 2)
        return f"layers.{number}.{LAYER.get(inner, inner)}.{last}"
    return f"{NAMES.get(stem, stem)}.{last}"


def _apart(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """The rows of each head with the two of a pair half a head apart, as transformers turns them."""
    pairs: npt.NDArray[Any] = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(pairs.reshape(values.shape))
