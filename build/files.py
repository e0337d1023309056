"""Names of a checkpoint's files, and their hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path

WEIGHTS = "model.safetensors"
SHARDS = "model.safetensors.index.json"
GRAPHS = ("model.onnx", "onnx/model.onnx")
"""Where exporters put the graph of a checkpoint."""


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
