"""The tensors of a checkpoint, read one at a time, so that none is passed over unseen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from build.errors import BuildError
from build.files import SHARDS, WEIGHTS, is_listed, own_file
from build.settings import Settings, read_json

FLOATS = ("F64", "F32", "F16", "BF16")
LEGACY = {"gamma": "weight", "beta": "bias"}
"""What TensorFlow's names for a norm's parameters stand for, as transformers reads them."""


class Weights:
    """The safetensors files of one folder, which remember the tensors that were read of them."""

    def __init__(
        self, folder: Path, checkpoint: Path, prefixes: Sequence[str] = (), harmless: Sequence[str] = ()
    ) -> None:
        """Of a folder in that of the `checkpoint`, or that itself.

        `prefixes` are what heads put before their encoder's names; `harmless`, patterns of names, not read.
        """
        self.folder = folder
        self._checkpoint = checkpoint
        self._prefixes = ("", *prefixes)
        self._harmless = harmless
        self._read: set[str] = set()

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Tensor, by its name in the file -> that file. Not opened before a tensor is asked for."""
        found: dict[str, Path] = {}
        for path in _paths(self.folder, self._checkpoint):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    if name in found:
                        raise BuildError(f"{self.folder} has tensor {name!r} in two files: leave one of them out")
                    found[name] = path
        return found

    @cached_property
    def _names(self) -> dict[str, str]:
        """Name as the pages know it -> name in the file."""
        names: dict[str, str] = {}
        for stored in self._files:
            stem, dot, last = stored.rpartition(".")
            names[f"{stem}{dot}{LEGACY.get(last, last)}"] = stored
        return names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, read from the head of its file; raises BuildError when there is none."""
        stored = self._stored(name)
        with _opened(self._files[stored]) as file:
            return tuple(file.get_slice(stored).get_shape())

    def tensor(self, name: str, *shape: int) -> npt.NDArray[np.float32]:
        """The tensor `name` as FP32, with or without a prefix.

        Raises BuildError when there is none, when it has another `shape` than config.json says or another type
        than a floating-point one, and when not all of its values are finite.
        """
        stored = self._stored(name)
        self._read.add(stored)
        path = self._files[stored]
        # Opened for one tensor at a time: an open file keeps every page in memory that was read from it.
        with _opened(path) as file:
            part = file.get_slice(stored)
            if tuple(part.get_shape()) != shape:
                raise BuildError(
                    f"{path} has {stored} of shape {list(part.get_shape())}, but the configuration asks for "
                    f"{list(shape)}"
                )
            if (dtype := part.get_dtype()) not in FLOATS:
                raise BuildError(
                    f"{path} has {stored} as {dtype}: quantised weights are not read; take the checkpoint that "
                    "they were made from, or an exported graph with --onnx"
                )
            values = np.asarray(file.get_tensor(stored), np.float32)
        if not np.isfinite(values.sum(dtype=np.float64)):  # a sum that nothing finite can take past its type
            raise BuildError(f"{path} has values in {stored} that are not finite: download it again")
        return values

    def unread(self) -> Iterator[tuple[str, str]]:
        """Each tensor that nobody has read and that is not harmless, with a sentence on it."""
        for name in self._files:
            plain = next((name.removeprefix(one) for one in self._prefixes if one and name.startswith(one)), name)
            if name not in self._read and not any(fnmatch(plain, pattern) for pattern in self._harmless):
                yield name, f"{self._files[name]} has tensor {name}, which is not read and may change the result"

    def _stored(self, name: str) -> str:
        """The name in the file of the tensor `name`, with or without a prefix."""
        for prefix in self._prefixes:
            if (stored := self._names.get(prefix + name)) is not None:
                return stored
        raise BuildError(f"the weights in {self.folder} have no tensor {name!r}")


def _paths(folder: Path, checkpoint: Path) -> list[Path]:
    """One file of weights, or those that an index names."""
    names = [WEIGHTS]
    if is_listed(folder / SHARDS) and not is_listed(folder / WEIGHTS):  # transformers' order
        index = Settings(folder / SHARDS, read_json(own_file(folder / SHARDS, checkpoint)))
        index.skip(["metadata"])
        if (shards := index.inner("weight_map")) is None:
            raise BuildError(f"{folder / SHARDS} has no weight_map")
        names = sorted({shards.word(tensor) for tensor in shards})
    return [own_file(_weights_file(folder, name), checkpoint) for name in names]


def _weights_file(folder: Path, name: str) -> Path:
    path = folder / name
    if not is_listed(path):
        pickles = [pickle.name for pickle in folder.glob("*.bin")]
        instead = f"; {pickles[0]} is a pickle, which can run code when it is read" if pickles else ""
        raise BuildError(
            f"the checkpoint has no {name} (looked in {folder}): weights are read from safetensors files "
            f"only{instead}"
        )
    return path


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise BuildError(f"{path} is not a readable safetensors file: {error}") from None
