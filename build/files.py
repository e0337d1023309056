"""Names of a checkpoint's files, and their hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from build.errors import BuildError

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


def own_file(path: Path, folder: Path) -> Path:
    """The path, which need not exist; raises BuildError where it is no regular file, or none of `folder`'s.

    Links may lead anywhere in the folder, and from a snapshot of the Hub's cache to the files that it keeps.
    """
    if path.exists() and not path.is_file():
        raise BuildError(f"{path} is no regular file")
    home = folder.resolve()
    home = home.parent.parent if home.parent.name == "snapshots" else home
    if not (target := path.resolve()).is_relative_to(home):
        raise BuildError(f"{path} leads outside of the checkpoint, to {target}: put the file itself into {folder}")
    return path
