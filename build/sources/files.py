"""Names of a checkpoint's files, and their hashes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from build.errors import BuildError

WEIGHTS = "model.safetensors"
SHARDS = "model.safetensors.index.json"
GRAPHS = ("model.onnx", "onnx/model.onnx")
"""Where exporters put the graph of a checkpoint."""

PREPROCESSOR = "preprocessor_config.json"
"""How a checkpoint of pictures has them made."""


COLBERT_LINEAR = "colbert_linear"
"""The file of bge-m3's layer behind each token, but for what follows its dot."""


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    return _digest(path, hashlib.sha256())


def git_hash(path: Path) -> str:
    """What git knows the content of a file by, in hex."""
    return _digest(path, git_digest(path.stat().st_size))


def git_digest(size: int) -> hashlib._Hash:
    """Git's hash of a content of so many bytes, which is to be fed with them."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def _digest(path: Path, digest: hashlib._Hash) -> str:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_listed(path: Path) -> bool:
    """Whether there is such a name, if only of a link that leads nowhere; `own_file` says so of it."""
    return os.path.lexists(path)


def files_of(folder: Path) -> set[str]:
    """Every file in a folder, by its path there."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def homes(folder: Path) -> list[Path]:
    """Where the files of a checkpoint's folder may lie: in it, or in a cache of the Hub that it is a snapshot of.

    There they are with their repository's, or with those that all repositories share.
    """
    folder = folder.resolve()
    for snapshot in (folder, *folder.parents):
        if snapshot.parent.name == "snapshots":
            return [folder, snapshot.parents[1] / "blobs", snapshot.parents[2] / "blobs"]
    return [folder]


def own_file(path: Path, folder: Path) -> Path:
    """The path, which need not exist; raises BuildError where it is no regular file, or none of `folder`'s."""
    try:
        target, is_there = path.resolve(strict=True), True
    except FileNotFoundError:
        target, is_there = path.resolve(), False
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have, or a circle of links
        raise BuildError(f"{path} cannot be followed to a file: {getattr(error, 'strerror', error)}") from None
    if is_there and not target.is_file():
        raise BuildError(f"{path} is no regular file")
    if not any(target.is_relative_to(home) for home in homes(folder)):
        raise BuildError(f"{path} leads outside of the checkpoint, to {target}: put the file itself into {folder}")
    if path.is_symlink() and not is_there:
        raise BuildError(f"{path} leads to {target}, which is not there: get that file too")
    return path


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file that a folder is a checkpoint by; raises BuildError where it has several."""
    if is_listed(folder / "config.json"):
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise BuildError(f"{folder} has {len(files)} GGUF files: put one into a folder of its own")
    return own_file(files[0], folder) if files else None
