"""Checkpoints of BERT's layout and MiniLM's tokenizer. Weights are random: only their speed means something."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tools.command import ROOT

CACHE = ROOT / ".cache" / "bench"
REPOSITORY = CACHE / "repository"
TOKENIZER = ROOT / "model_repository" / "minilm-tokenizer" / "1" / "tokenizer.json"
"""MiniLM's."""


@dataclass(frozen=True)
class Bert:
    """What is written, and the family that it becomes."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    window: int
    scores: bool
    """A cross-encoder; otherwise mean-pooled vectors of length one."""

    @property
    def folder(self) -> Path:
        """The checkpoint."""
        return CACHE / self.name

    def build(self, repository: Path = REPOSITORY, checkout: Path = ROOT) -> None:
        """Writes the checkpoint and builds it into `repository` with the code of `checkout`."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        shutil.copyfile(TOKENIZER, self.folder / "tokenizer.json")
        vocabulary = len(json.loads(TOKENIZER.read_bytes())["model"]["vocab"])
        for file, content in self._settings(vocabulary).items():
            path = self.folder / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        save_file(self._weights(vocabulary), self.folder / "model.safetensors")
        command = [sys.executable, "-m", "build.make", str(self.folder), "--repository", str(repository)]
        subprocess.run([*command, "--runtime", "openvino"], check=True, cwd=checkout, stdout=subprocess.DEVNULL)

    def _settings(self, vocabulary: int) -> dict[str, object]:
        """File -> content."""
        config = {
            "architectures": ["BertForSequenceClassification" if self.scores else "BertModel"],
            "model_type": "bert",
            "hidden_act": "gelu",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": self.window,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "pad_token_id": 0,
            "type_vocab_size": 2,
            "vocab_size": vocabulary,
        }
        files: dict[str, object] = {"tokenizer_config.json": {"model_max_length": self.window}}
        if self.scores:
            return files | {"config.json": config | {"id2label": {"0": "LABEL_0"}}}
        kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds.items())
        ]
        pooling = {"word_embedding_dimension": self.hidden, "pooling_mode_mean_tokens": True}
        return files | {"config.json": config, "modules.json": modules, "1_Pooling/config.json": pooling}

    def _weights(self, vocabulary: int) -> dict[str, np.typing.NDArray[np.float32]]:
        """Every tensor of the checkpoint, the same on every call."""
        prefix, hidden = "bert." if self.scores else "", self.hidden
        shapes: dict[str, tuple[int, ...]] = {}
        norms = [f"{prefix}embeddings.LayerNorm"]
        for name, rows in {"word": vocabulary, "position": self.window, "token_type": 2}.items():
            shapes[f"{prefix}embeddings.{name}_embeddings.weight"] = (rows, hidden)
        linear = {f"{prefix}pooler.dense": (hidden, hidden)}
        if self.scores:
            linear["classifier"] = (1, hidden)
        for i in range(self.layers):
            layer = f"{prefix}encoder.layer.{i}"
            linear |= {f"{layer}.attention.self.{part}": (hidden, hidden) for part in ("query", "key", "value")}
            linear |= {f"{layer}.attention.output.dense": (hidden, hidden)}
            linear |= {f"{layer}.intermediate.dense": (self.inner, hidden)}
            linear |= {f"{layer}.output.dense": (hidden, self.inner)}
            norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        for name, shape in linear.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        numbers = np.random.default_rng(0)
        weights = {name: numbers.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
        for name in norms:
            weights |= {
                f"{name}.weight": np.ones(hidden, np.float32),
                f"{name}.bias": np.zeros(hidden, np.float32),
            }
        return weights


CROSS_ENCODER = Bert("cross-encoder", layers=6, hidden=384, inner=1536, heads=12, window=512, scores=True)
"""A cross-encoder of ms-marco-MiniLM-L6's size."""

SHELL = Bert("shell", layers=1, hidden=64, inner=64, heads=1, window=256, scores=False)
"""Costs next to nothing, so what is left is the cost of all that is around an engine."""
