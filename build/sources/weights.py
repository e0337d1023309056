"""The tensors of a checkpoint, read one at a time, so that none is passed over unseen."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from build.errors import BuildError
from build.sources.files import SHARDS, WEIGHTS, is_listed, own_file
from build.sources.quantised import FP8, INT8, KEY, Quantised
from build.sources.settings import Settings, read_json

FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32")
BYTES = (INT8,)
LEGACY = {"gamma": "weight", "beta": "bias"}
"""What TensorFlow's names for a norm's parameters stand for, as transformers reads them."""


class Weights:
    """The safetensors files of one folder, which remember the tensors that were read of them."""

    def __init__(
        self,
        folder: Path,
        checkpoint: Path,
        prefixes: Sequence[str] = (),
        harmless: Sequence[str] = (),
        quantised: Quantised | None = None,
        file: str = WEIGHTS,
    ) -> None:
        """Of a folder in that of the `checkpoint`, or that itself.

        `prefixes` are what heads put before their encoder's names; `harmless`, patterns of names, not read.
        """
        self.folder = folder
        self._file = file
        self._quantised = quantised
        self._checkpoint = checkpoint
        self._prefixes = ("", *prefixes)
        self._harmless = (*harmless, *(quantised.unused if quantised is not None else ()))
        self._read: set[str] = set()

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Tensor, by its name in the file -> that file. Not opened before a tensor is asked for."""
        found: dict[str, Path] = {}
        for path in self.paths:
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

    @property
    def paths(self) -> list[Path]:
        """Its files."""
        return _paths(self.folder, self._checkpoint, self._file)

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name, with or without a prefix."""
        return any(prefix + name in self._names for prefix in self._prefixes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, read from the head of its file; raises BuildError when there is none."""
        stored = self._stored(name)
        with _opened(self._files[stored]) as file:
            return tuple(file.get_slice(stored).get_shape())

    def tensor(self, name: str, *shape: int, more: Sequence[str] = ()) -> npt.NDArray[np.float32]:
        """The tensor `name` as FP32, with or without a prefix; of floating-point numbers, or `more` types.

        Raises BuildError when there is none, when it has another `shape` than config.json says or another type
        than a floating-point one, and when not all of its values are finite.
        """
        stored = self._stored(name)
        path = self._files[stored]
        kept = self._quantised
        values, dtype = self._array(stored, (*FLOATS, *more, *([kept.dtype] if kept else [])), shape)
        if kept is not None and dtype == kept.dtype:
            values = self._dequantised(stored, values, kept)
        values = np.asarray(values, np.float32)
        if not np.isfinite(values.sum(dtype=np.float64)):  # a sum that nothing finite can take past its type
            raise BuildError(f"{path} has values in {stored} that are not finite: download it again")
        return values

    def integers(self, name: str, *shape: int) -> npt.NDArray[np.int64]:
        """The tensor `name` of whole numbers; raises BuildError when there is none of the `shape`."""
        values, _ = self._array(self._stored(name), INTEGERS, shape)
        return np.asarray(values, np.int64)

    def unread(self) -> Iterator[tuple[str, str]]:
        """Each tensor that nobody has read and that is not harmless, with a sentence on it."""
        for name in self._files:
            plain = next((name.removeprefix(one) for one in self._prefixes if one and name.startswith(one)), name)
            if name not in self._read and not any(fnmatch(plain, pattern) for pattern in self._harmless):
                yield name, f"{self._files[name]} has tensor {name}, which is not read and may change the result"

    def _dequantised(self, stored: str, values: npt.NDArray[Any], kept: Quantised) -> npt.NDArray[np.float32]:
        """A matrix by the scales beside it."""
        beside = [kept.scale] if kept.is_symmetric else [kept.scale, "_zero_point"]
        for name in (stored + one for one in beside):
            if name not in self._files:
                raise BuildError(f"{self._files[stored]} has {stored} as {kept.dtype}, but no {name}")
        scales, _ = self._array(stored + kept.scale, FLOATS)
        zeros = None if kept.is_symmetric else self._array(f"{stored}_zero_point", (INT8,))[0]
        return kept.dequantised(stored, values, scales, zeros)

    def _array(
        self, stored: str, dtypes: Sequence[str], shape: tuple[int, ...] | None = None
    ) -> tuple[npt.NDArray[Any], str]:
        """A tensor as it is, and what safetensors calls its type; BuildError for another type or `shape`."""
        self._read.add(stored)
        path = self._files[stored]
        # Opened for one tensor at a time: an open file keeps every page in memory that was read from it.
        with _opened(path) as file:
            part = file.get_slice(stored)
            there, dtype = tuple(part.get_shape()), str(part.get_dtype())
            if shape is not None and there != shape:
                raise BuildError(
                    f"{path} has {stored} of shape {list(there)}, but the configuration asks for {list(shape)}"
                )
            if dtype not in dtypes:
                raise BuildError(
                    f"{path} has {stored} as {dtype}, and config.json has no {KEY} that says so: take the "
                    "checkpoint that it was made from, or an exported graph with --onnx"
                )
            if dtype == FP8:
                return _bytes(path, stored).view(ml_dtypes.float8_e4m3fn).reshape(there), dtype
            return file.get_tensor(stored), dtype

    def _stored(self, name: str) -> str:
        """The name in the file of the tensor `name`, with or without a prefix."""
        for prefix in self._prefixes:
            if (stored := self._names.get(prefix + name)) is not None:
                return stored
        raise BuildError(f"the weights in {self.folder} have no tensor {name!r}")


def _paths(folder: Path, checkpoint: Path, file: str) -> list[Path]:
    """One file of weights, or those that an index names."""
    names = [file]
    if file == WEIGHTS and is_listed(folder / SHARDS) and not is_listed(folder / WEIGHTS):  # transformers' order
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


def _bytes(path: Path, stored: str) -> npt.NDArray[np.uint8]:
    """Of a tensor in a file that safetensors has found to be whole; its NumPy has no type of that name."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        first, last = json.loads(file.read(size))[stored]["data_offsets"]
        file.seek(8 + size + first)
        return np.frombuffer(file.read(last - first), np.uint8)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise BuildError(f"{path} is not a readable safetensors file: {error}") from None
