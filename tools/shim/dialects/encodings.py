"""An embedding in the types that dialects name, made from the float32 vector after its norm."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tools.shim.errors import bad_request

Row = npt.NDArray[np.float32]

Encoding = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]

SCALED = ("int8", "uint8")
SCALE = 127
"""Symmetric, so that the dot product of two int8 vectors is their cosine times SCALE squared."""
LENGTH_TOLERANCE = 1e-3


def as_base64(row: Row) -> str:
    """Little-endian float32, as OpenAI's clients decode them."""
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


def as_int8(row: Row) -> list[int]:
    """Each number of -1..1 in steps of 1/127, the nearest one."""
    steps: list[int] = np.rint(row * SCALE).astype(np.int8).tolist()
    return steps


def as_uint8(row: Row) -> list[int]:
    """The same and 128."""
    return [step + 128 for step in as_int8(row)]


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
    "int8": as_int8,
    "uint8": as_uint8,
    "binary": as_binary,
    "ubinary": as_ubinary,
}


def encoded(rows: npt.NDArray[np.float32], kind: Encoding, model: str) -> list[Any]:
    """Each of the embeddings `rows` as a `kind`.

    Raises GatewayError 400 where that is scaled for numbers of -1..1 and those of `model` may be larger.
    """
    lengths = np.linalg.norm(rows, axis=1)
    # Static embeddings give zeros for a text without a token, which no scale changes.
    if kind in SCALED and (abs(lengths - 1) > LENGTH_TOLERANCE)[lengths != 0].any():
        raise bad_request(f"{kind} is for vectors of unit length, and {model} gives others: ask for float")
    return [ENCODERS[kind](row) for row in rows]
