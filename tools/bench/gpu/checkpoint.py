"""Checkpoints of full size without a hub: Qwen3-Embedding's layouts with random weights, and what they compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import TensorSpec, serialize_file

from build.errors import BuildError
from build.graphs.decoder import Decoder, read_qwen3
from build.sources.checkpoint import Checkpoint
from tools.command import ROOT

PUBLISHED = ROOT / "tests" / "reference" / "published.json"
"""Has the settings of Qwen3-Embedding-0.6B, which every size gets, but for its shape."""
TOKENIZER = ROOT / "tests" / "reference" / "tiny" / "qwen3-embedding" / "tokenizer.json"
"""A small one, made for the tests; it puts the same token behind a text."""

WINDOW = 8192
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    | {"intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 640},
    "0.6b": {},
    "4b": {"hidden_size": 2560, "num_attention_heads": 32, "intermediate_size": 9728, "num_hidden_layers": 36}
    | {"vocab_size": 151665},
    "8b": {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 12288, "num_hidden_layers": 36}
    | {"vocab_size": 151665},
}
"""Size -> what its `config.json` has that the published one has not."""

CHUNK = 1 << 22
"""Random numbers that are made at a time."""


def dimensions(folder: Path) -> Decoder:
    """Those of a checkpoint; raises BuildError where it is no Qwen3."""
    checkpoint = Checkpoint(folder)
    if checkpoint.model_type != "qwen3":
        raise BuildError(
            f"{checkpoint.config.path} is of the type {checkpoint.model_type!r}, and a proof counts what a "
            "Qwen3 computes: name a folder of Qwen3-Embedding"
        )
    return read_qwen3(checkpoint.config)


def flops(qwen3: Decoder, lengths: Sequence[int]) -> int:
    """Floating-point operations that texts of so many tokens need, a product and its sum being two.

    A layer's matrices have H (q + 2 k) + q H + 3 H I weights, queries being q = heads * d wide, keys and values
    k = key_value_heads * d, and take two operations for each weight and token. Token i of a text attends to i
    tokens: q k^T and the sum over v take 2 q each of them, so a text of n tokens takes 4 q n (n + 1) / 2. Norms,
    rotary positions, the softmax, the table of tokens and the head are left out.
    """
    hidden, q, k = qwen3.hidden_size, qwen3.heads * qwen3.width, qwen3.key_value_heads * qwen3.width
    weights = hidden * (q + 2 * k) + q * hidden + 3 * hidden * qwen3.inner
    return qwen3.layers * (2 * weights * sum(lengths) + sum(2 * q * n * (n + 1) for n in lengths))


def write_random(size: str, folder: Path) -> None:
    """Writes a checkpoint with random bf16 weights, a shard for the table of tokens and one for each layer."""
    files = json.loads(PUBLISHED.read_text())["models"]["Qwen/Qwen3-Embedding-0.6B"]
    config = files["config.json"] = files["config.json"] | SIZES[size]
    files["1_Pooling/config.json"]["word_embedding_dimension"] = config["hidden_size"]
    files["tokenizer_config.json"] = {
        "model_max_length": WINDOW,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, content in files.items():
        if name.endswith(".json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=1))
    shutil.copy(TOKENIZER, folder)
    parts = list(shards(dimensions(folder)))
    random = np.random.default_rng(0)
    places: dict[str, str] = {}
    for i, shapes in enumerate(parts):
        name = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        tensors = {tensor: _values(random, shape) for tensor, shape in shapes.items()}
        specs = {
            tensor: TensorSpec(
                dtype="bfloat16", shape=shapes[tensor], data_ptr=values.ctypes.data, data_len=values.nbytes
            )
            for tensor, values in tensors.items()
        }
        serialize_file(specs, folder / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def shards(qwen3: Decoder) -> Iterator[dict[str, tuple[int, ...]]]:
    """Tensor -> shape, in the layout that transformers saves."""
    hidden, q, k = qwen3.hidden_size, qwen3.heads * qwen3.width, qwen3.key_value_heads * qwen3.width
    yield {"embed_tokens.weight": (qwen3.vocab_size, hidden), "norm.weight": (hidden,)}
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (k, hidden),
        "self_attn.v_proj": (k, hidden),
        "self_attn.q_norm": (qwen3.width,),
        "self_attn.k_norm": (qwen3.width,),
        "self_attn.o_proj": (hidden, q),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (qwen3.inner, hidden),
        "mlp.up_proj": (qwen3.inner, hidden),
        "mlp.down_proj": (hidden, qwen3.inner),
    }
    for i in range(qwen3.layers):
        yield {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}


def _values(random: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.uint16]:
    """BF16 as its 16 bits: a norm's weights around 1, others so that a product of them keeps a row's length."""
    centre, reach = (1.0, 0.2) if len(shape) == 1 else (0.0, (3 / shape[-1]) ** 0.5)
    values = np.empty(int(np.prod(shape)), np.uint16)
    for part in np.split(values, range(CHUNK, len(values), CHUNK)):
        numbers = random.random(len(part), np.float32) * np.float32(2 * reach) + np.float32(centre - reach)
        part[:] = numbers.view(np.uint32) >> 16
    return values
