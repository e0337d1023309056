"""Long texts take memory by their length, not by its square: what the encoder grows by in a real server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, Stack
from safetensors.numpy import load_file, save_file

from build import make

FAMILIES = ["qwen3-embedding", "gemma3"]
"""One causal, one with a window and without."""

HEADS = 16
PER_TOKEN = 40 << 10
"""Bytes; scores kept for every head would take 64 * S of them, 512 KiB where S is 8192."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The tiny checkpoints with 16 heads, one layer of each kind and a window of 8192 tokens, in bf16."""
    folder = tmp_path_factory.mktemp("memory")
    options = ["--repository", str(folder / "repository")]
    for name in FAMILIES:
        shutil.copytree(TINY / name, folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        layers = len(set(config["layer_types"]))
        config |= {"num_attention_heads": HEADS, "num_hidden_layers": layers, "max_position_embeddings": 8192}
        config["layer_types"] = config["layer_types"][:layers]
        (folder / name / "config.json").write_text(json.dumps(config))
        limits = json.loads((folder / name / "tokenizer_config.json").read_text()) | {"model_max_length": 8192}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(limits))
        tensors = {
            tensor: array
            for tensor, array in load_file(folder / name / "model.safetensors").items()
            if not tensor.startswith("layers.") or int(tensor.split(".")[1]) < layers
        }
        hidden, inner = config["hidden_size"], HEADS * config["head_dim"]
        for tensor, array in tensors.items():
            if "q_proj" in tensor or "o_proj" in tensor:
                shape = (inner, hidden) if "q_proj" in tensor else (hidden, inner)
                tensors[tensor] = np.resize(array, shape)
        save_file(tensors, folder / name / "model.safetensors")
        assert make.main([str(folder / name), "--precision", "bf16", *options]) == 0
    stack = Stack(folder / "work", ["--models", *FAMILIES, *options]).start()
    yield stack
    assert stack.stop() == 0


def status(process: int, field: str) -> int:
    """A field of /proc/PID/status, in bytes."""
    (line,) = (line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("name", FAMILIES)
def test_memory_grows_with_the_length_of_a_text(stack: Stack, name: str) -> None:
    encoder = stack.step(f"{name}-encoder").pid
    Path(f"/proc/{encoder}/clear_refs").write_text("5")  # the peak starts anew
    before = status(encoder, "VmRSS")
    for lengths in [(512,), (2048,), (8192,), (8192, *[16] * 63)]:
        texts = [f"{'the ' * (length - 4)}{i}" for i, length in enumerate(lengths)]
        assert np.isfinite(stack.embed(texts, name)).all()
        assert status(encoder, "VmHWM") - before < PER_TOKEN * sum(lengths)
