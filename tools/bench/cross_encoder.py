"""A cross-encoder of ms-marco-MiniLM-L6's size; its weights are random, so only its speed means something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tools.command import ROOT

NAME = "cross-encoder"
REPOSITORY = ROOT / ".cache" / "bench" / "repository"
CHECKPOINT = ROOT / ".cache" / "bench" / NAME
LAYERS, HIDDEN, INNER, HEADS, WINDOW = 6, 384, 1536, 12, 512


def build(minilm_tokenizer: Path) -> None:
    """Writes the checkpoint beside MiniLM's tokenizer and builds it into REPOSITORY."""
    CHECKPOINT.mkdir(parents=True, exist_ok=True)
    (CHECKPOINT / "tokenizer.json").write_bytes(minilm_tokenizer.read_bytes())
    vocabulary = len(json.loads(minilm_tokenizer.read_bytes())["model"]["vocab"])
    config = {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": HIDDEN,
        "id2label": {"0": "LABEL_0"},
        "intermediate_size": INNER,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": WINDOW,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": vocabulary,
    }
    (CHECKPOINT / "config.json").write_text(json.dumps(config))
    (CHECKPOINT / "tokenizer_config.json").write_text(json.dumps({"model_max_length": WINDOW}))
    save_file(_weights(vocabulary), CHECKPOINT / "model.safetensors")
    command = [sys.executable, "-m", "build.make", str(CHECKPOINT), "--repository", str(REPOSITORY)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def _weights(vocabulary: int) -> dict[str, np.typing.NDArray[np.float32]]:
    """Every tensor of the checkpoint, the same on every call."""
    shapes: dict[str, tuple[int, ...]] = {}
    norms = ["bert.embeddings.LayerNorm"]
    for name, rows in {"word": vocabulary, "position": WINDOW, "token_type": 2}.items():
        shapes[f"bert.embeddings.{name}_embeddings.weight"] = (rows, HIDDEN)
    linear = {"bert.pooler.dense": (HIDDEN, HIDDEN), "classifier": (1, HIDDEN)}
    for i in range(LAYERS):
        layer = f"bert.encoder.layer.{i}"
        linear |= {f"{layer}.attention.self.{part}": (HIDDEN, HIDDEN) for part in ("query", "key", "value")}
        linear |= {f"{layer}.attention.output.dense": (HIDDEN, HIDDEN)}
        linear |= {f"{layer}.intermediate.dense": (INNER, HIDDEN), f"{layer}.output.dense": (HIDDEN, INNER)}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    numbers = np.random.default_rng(0)
    weights = {name: numbers.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    for name in norms:
        weights |= {f"{name}.weight": np.ones(HIDDEN, np.float32), f"{name}.bias": np.zeros(HIDDEN, np.float32)}
    return weights
