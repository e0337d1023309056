"""Bearer keys: whoever knows one of them may call. Without any, everybody may."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from tools.command import ServerError
from tools.shim.errors import unauthorized

VARIABLE = "GATEWAY_API_KEYS"
"""Keys, apart by white space."""

FILE_VARIABLE = "GATEWAY_API_KEYS_FILE"
"""A file of keys, one a line; empty lines are no keys. /dev/null says that there are to be none."""

VALID = re.compile(r"(?!#)[!-~]{16,}")
"""Visible ASCII: what is shorter is guessed, or is a word of a comment."""


class KeysError(ServerError):
    """The keys cannot be read; the message says why."""


def load(environment: Mapping[str, str] = os.environ) -> list[bytes]:
    """The keys that the environment and its file name.

    Raises KeysError where the file cannot be read or holds no key, or where anything is no key: a mistake must not
    open the door. No message repeats a key.
    """
    words = environment.get(VARIABLE, "").split()
    found = {f"{VARIABLE}: word {i}": word for i, word in enumerate(words, 1)}
    file = environment.get(FILE_VARIABLE)
    if file and not Path(file).is_char_device():
        try:
            lines = Path(file).read_text(encoding="ascii").splitlines()
        except OSError as error:
            raise KeysError(f"{FILE_VARIABLE}: cannot read {file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise KeysError(f"{FILE_VARIABLE}: {file} has characters that are not ASCII") from None
        if not any(lines):
            raise KeysError(f"{FILE_VARIABLE}: {file} holds no key")
        found |= {f"{FILE_VARIABLE}: line {i} of {file}": line for i, line in enumerate(lines, 1) if line}
    for place, key in found.items():
        if not VALID.fullmatch(key):
            raise KeysError(
                f"{place} is no key: a key has 16 or more ASCII characters, no spaces, and no # at its start: "
                "comments are not read"
            )
    return [key.encode() for key in found.values()]


def check(keys: Collection[bytes], authorization: str) -> None:
    """Raises GatewayError 401 unless the header carries one of `keys`, in a time that says nothing about them."""
    scheme, _, key = authorization.partition(" ")
    sent = key.strip().encode("utf-8", "surrogateescape")
    known = sum(hmac.compare_digest(sent, one) for one in keys)
    if scheme.lower() != "bearer" or not known:
        raise unauthorized("this server takes calls with a key: send it as `Authorization: Bearer <key>`")
