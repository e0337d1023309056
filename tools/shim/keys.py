"""Bearer keys: whoever knows one of them may call. Without any, everybody may."""

from __future__ import annotations

import hmac
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from tools.command import ServerError
from tools.shim.errors import unauthorized

VARIABLE = "GATEWAY_API_KEYS"
"""Keys, apart by white space."""

FILE_VARIABLE = "GATEWAY_API_KEYS_FILE"
"""A file of keys, one a line."""


class KeysError(ServerError):
    """The keys cannot be read; the message says why."""


def load(environment: Mapping[str, str] = os.environ) -> list[bytes]:
    """The keys that the environment and its file name.

    Raises KeysError where the file cannot be read or holds no key: a mistake must not open the door.
    """
    keys = environment.get(VARIABLE, "").split()
    if file := environment.get(FILE_VARIABLE):
        try:
            there = Path(file).read_text().split()
        except OSError as error:
            raise KeysError(f"{FILE_VARIABLE}: cannot read {file}: {error.strerror}") from None
        if not there:
            raise KeysError(f"{FILE_VARIABLE}: {file} holds no key")
        keys += there
    return [key.encode() for key in keys]


def check(keys: Collection[bytes], authorization: str) -> None:
    """Raises GatewayError 401 unless the header carries one of `keys`, in a time that says nothing about them."""
    scheme, _, key = authorization.partition(" ")
    sent = key.strip().encode("utf-8", "surrogateescape")
    known = sum(hmac.compare_digest(sent, one) for one in keys)
    if scheme.lower() != "bearer" or not known:
        raise unauthorized("this server takes calls with a key: send it as `Authorization: Bearer <key>`")
