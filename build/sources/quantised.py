"""Weights that a checkpoint keeps in a byte each, as the numbers that they stand for.

The maths is that of transformers with `dequantize=True`: Fp8Dequantize for its own fp8, and
compressed-tensors' `dequantize` for the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from build.errors import BuildError
from build.sources.settings import MOST, Settings

KEY = "quantization_config"
FP8, INT8 = "F8_E4M3", "I8"
"""As safetensors calls the two."""

FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
"""Of compressed-tensors, those that keep a weight in a number of its own."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Quantised:
    """How a checkpoint keeps its matrices."""

    dtype: str
    """Of a matrix; other tensors are what they are."""
    scale: str
    """What comes after a matrix's name in that of its scales."""
    block: tuple[int, int]
    """Rows and columns that share a scale; 0 stands for all."""
    in_fp32: bool
    """Whether a weight is multiplied by its scale in FP32, else in the scale's own type."""
    is_symmetric: bool = True
    """Whether zero is kept as zero, else as the number beside the scale."""
    rounds_activations: bool = True
    """Whether the model's own kernels round what a matrix is multiplied by, too."""

    @property
    def name(self) -> str:
        """The type as people call it."""
        return "fp8" if self.dtype == FP8 else "int8"

    @property
    def unused(self) -> tuple[str, ...]:
        """Patterns of tensors that only kernels which round activations read."""
        return ("*.input_scale", "*.input_zero_point") if self.rounds_activations else ()

    @classmethod
    def of(cls, config: Settings) -> Quantised | None:
        """What `config.json` says; None where weights are plain, BuildError where they are kept in another way."""
        if (said := config.inner(KEY)) is None:
            return None
        method = said.word("quant_method", default="")
        if method == "fp8":
            return cls._fp8(said)
        if method == "compressed-tensors":
            return cls._compressed(said)
        raise _unread(config, f"weights of {method or 'no quant_method'}")

    @classmethod
    def _fp8(cls, said: Settings) -> Quantised:
        said.require("activation_scheme", "dynamic")
        said.require("fmt", "e4m3")
        said.require("scale_fmt", "float")
        said.require("dequantize", False, True)
        said.skip(["modules_to_not_convert", "ignored_layers"])  # which are as they are by their type
        block = _block(said, "weight_block_size") if "weight_block_size" in said else (128, 128)
        return cls(FP8, "_scale_inv", block, in_fp32=True)

    @classmethod
    def _compressed(cls, said: Settings) -> Quantised:
        groups = said.inner("config_groups")
        names = list(groups) if groups is not None else []
        if groups is None or len(names) != 1:
            raise _unread(said, f"weights of {len(names)} config_groups of compressed-tensors, where one is read,")
        (group,) = (groups.inner(name) for name in names)
        weights = group.inner("weights") if group is not None else None
        if group is None or weights is None:
            raise _unread(said, "a config_group of compressed-tensors without weights")
        for place in (group, said):
            if (kept := place.find("format")) is not None and kept not in FORMATS:
                raise _unread(said, f"weights in compressed-tensors' {kept!r}")
        weights.require("num_bits", 8)
        weights.require("dynamic", False)
        weights.skip(["observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype"])
        kind = weights.word("type", default="int")
        if kind not in ("int", "float"):
            raise _unread(said, f"weights of type {kind!r}")
        for place, name in ((group, "output_activations"), (said, "kv_cache_scheme")):
            if name in place:
                raise _unread(said, f"{name} of compressed-tensors")
        if (sparsity := said.inner("sparsity_config")) is not None:
            sparsity.require("format", "dense")
            sparsity.skip(sparsity)
        said.require("transform_config", {})
        said.require("quantization_status", "compressed")
        said.skip(["ignore", "global_compression_ratio", "version"])
        rounds = "input_activations" in group
        group.skip(["targets", "input_activations"])
        return cls(
            FP8 if kind == "float" else INT8,
            "_scale",
            _shared(said, weights),
            in_fp32=False,
            is_symmetric=weights.flag("symmetric", default=True),
            rounds_activations=rounds,
        )

    def dequantised(self, name: str, values: Array, scales: Array, zeros: Array | None) -> npt.NDArray[np.float32]:
        """The matrix `values` [outputs, inputs] of that name, each number times its block's scale."""
        if values.ndim != 2:
            raise BuildError(f"{name} is quantised and has {values.ndim} dimensions: only matrices are read so")
        scale = self._spread(f"{name}{self.scale}", scales, values.shape)
        if self.in_fp32:
            scale = scale.astype(np.float32)
        numbers = values.astype(scale.dtype)
        if zeros is not None:
            numbers = numbers - self._spread(f"{name}_zero_point", zeros, values.shape).astype(scale.dtype)
        product: npt.NDArray[np.float32] = (numbers * scale).astype(np.float32)
        return product

    def _spread(self, name: str, scales: Array, shape: tuple[int, ...]) -> Array:
        """Each block's number at all of its places."""
        blocks = [min(size, block or size) for size, block in zip(shape, self.block, strict=True)]
        grid = tuple(math.ceil(size / block) for size, block in zip(shape, blocks, strict=True))
        if scales.shape != grid and not (scales.ndim < 2 and scales.size == math.prod(grid)):
            raise BuildError(
                f"{name} has shape {list(scales.shape)}, but blocks of {blocks} in {list(shape)} need {list(grid)}"
            )
        rows = np.repeat(scales.reshape(grid), blocks[0], axis=0)[: shape[0]]
        return np.repeat(rows, blocks[1], axis=1)[:, : shape[1]]


def _shared(said: Settings, weights: Settings) -> tuple[int, int]:
    """Rows and columns that share a scale, by compressed-tensors' strategy."""
    size = weights.find("group_size")
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.word("strategy", default=inferred)
    if strategy == "group":
        return 1, weights.integer("group_size")
    if strategy == "block":
        return _block(weights, "block_structure")
    if strategy not in ("tensor", "channel"):
        raise _unread(said, f"weights with a scale for each {strategy!r}")
    weights.skip(["block_structure"])
    return (0, 0) if strategy == "tensor" else (1, 0)


def _block(said: Settings, name: str) -> tuple[int, int]:
    match said.find(name):
        case [int(rows), int(columns)] if 0 < rows <= MOST and 0 < columns <= MOST:
            return rows, columns
    raise BuildError(f"{said.path} has a {name} that is not two whole numbers, rows and columns")


def _unread(said: Settings, what: str) -> BuildError:
    return BuildError(
        f"{said.path} has {KEY}: {what} are not read; take the checkpoint that they were made from, or one in "
        "transformers' fp8 or compressed-tensors' int8 or fp8, or an exported graph with --onnx"
    )
