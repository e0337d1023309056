"""An embedding in the types that dialects name, made from the float32 vector after its norm."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.float32]

Encoding = Literal["float", "base64", "binary", "ubinary"]

UNSCALED = "how int8 and uint8 are scaled is not published"
"""Why a dialect's other types are refused."""


def as_base64(row: Row) -> str:
    """Little-endian float32, as OpenAI's clients decode them."""
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


def as_ubinary(row: Row) -> list[int]:
    """One bit a dimension, 1 above zero; the first of eight is a byte's highest, as in sentence-transformers."""
    packed: list[int] = np.packbits(row > 0).tolist()
    return packed


def as_binary(row: Row) -> list[int]:
    """The same bytes less 128."""
    return [byte - 128 for byte in as_ubinary(row)]


ENCODERS: Mapping[str, Callable[[Row], Any]] = {
    "float": np.asarray,
    "base64": as_base64,
    "binary": as_binary,
    "ubinary": as_ubinary,
}
