"""The bytes that each token writes. Special tokens write none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_texts(tokenizer: dict[str, Any]) -> list[bytes] | None:
    """Of a `tokenizer.json`, in the order of ids; None where it spells in another way than the two known here."""
    if (spelled := _spelling(json.dumps(tokenizer["decoder"]))) is None:
        return None
    texts = {i: spelled(token) for token, i in tokenizer["model"]["vocab"].items()}
    texts |= {one["id"]: b"" if one["special"] else one["content"].encode() for one in tokenizer["added_tokens"]}
    return [texts.get(i, b"") for i in range(max(texts) + 1)]


def _spelling(decoder: str) -> Callable[[str], bytes] | None:
    if "ByteLevel" in decoder:
        return lambda token: bytes(LETTERS[letter] for letter in token)
    if "ByteFallback" in decoder:
        return _with_bytes
    return None


def _with_bytes(token: str) -> bytes:
    """Of SentencePiece's BPE."""
    found = BYTE.fullmatch(token)
    return bytes.fromhex(found[1]) if found else token.replace("▁", " ").encode()


def _letters() -> dict[str, int]:
    """The byte of each letter that GPT-2's BPE (Radford et al., 2019) writes for one."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


LETTERS = _letters()
