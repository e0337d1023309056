"""Bearer keys: whoever knows one of them may call. Without any, everybody may."""

from __future__ import annotations

import hmac
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from tools.shim.errors import unauthorized

VARIABLE = "GATEWAY_API_KEYS"
"""Keys, apart by white space."""

FILE_VARIABLE = "GATEWAY_API_KEYS_FILE"
"""A file of keys, one a line."""


def load(environment: Mapping[str, str] = os.environ) -> list[bytes]:
    """The keys that the environment and its file name.

    Raises OSError where the file cannot be read, and ValueError where it holds no key: a mistake must not open the
    door.
    """
    keys = environment.get(VARIABLE, "").split()
    if file := environment.get(FILE_VARIABLE):
        there = Path(file).read_text().split()
        if not there:
            raise ValueError(f"{file}, named by {FILE_VARIABLE}, holds no key")
        keys += there
    return [key.encode() for key in keys]


def check(keys: Collection[bytes], authorization: str) -> None:
    """Raises GatewayError 401 unless the header carries one of `keys`, in a time that says nothing about them."""
    scheme, _, key = authorization.partition(" ")
    sent = key.strip().encode("utf-8", "surrogateescape")
    known = sum(hmac.compare_digest(sent, one) for one in keys)
    if scheme.lower() != "bearer" or not known:
        raise unauthorized("this server takes calls with a key: send it as `Authorization: Bearer <key>`")
