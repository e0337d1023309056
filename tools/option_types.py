"""What the options of commands take: argparse types, which refuse anything else by a sentence."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from urllib.parse import urlsplit

MOST_WORKERS = 64
MOST_PORT = 65535


def port(words: str) -> int:
    """Where to listen."""
    if not (words.isascii() and words.isdecimal() and 1 <= int(words) <= MOST_PORT):
        raise argparse.ArgumentTypeError(f"{words!r} is no port from 1 to {MOST_PORT}")
    return int(words)


def seconds(words: str) -> float:
    """A time that passes."""
    if not 0 < (number := _number(words)) < math.inf:
        raise argparse.ArgumentTypeError(f"{words!r} is no number of seconds above 0")
    return number


def delay(words: str) -> float:
    """A time that may be none."""
    if not 0 <= (number := _number(words)) < math.inf:
        raise argparse.ArgumentTypeError(f"{words!r} is no number of seconds from 0")
    return number


def _number(words: str) -> float:
    """NaN where it is none."""
    try:
        return float(words)
    except ValueError:
        return math.nan


def workers(words: str) -> int:
    """How many processes."""
    if not (words.isascii() and words.isdecimal() and 1 <= int(words) <= MOST_WORKERS):
        raise argparse.ArgumentTypeError(f"{words!r} is no number of processes from 1 to {MOST_WORKERS}")
    return int(words)


def size(words: str) -> int:
    """Bytes, said as 12GB, 500MB or 8GiB."""
    found = re.fullmatch(r"([0-9.]+) ?([KMGT])(i?)B?", words, re.IGNORECASE)
    try:
        number, unit, binary = found.groups() if found else ("", "", "")
        return int(float(number) * (1024 if binary else 1000) ** (1 + "KMGT".index(unit.upper())))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{words!r} is no size such as 12GB or 500MB") from None


def alias(pair: str) -> str:
    """A pair of a name and a model."""
    name, _, model = pair.rpartition("=")
    if not name or not model:
        raise argparse.ArgumentTypeError(f"{pair!r} is not NAME=MODEL, such as text-embedding-3-small=minilm")
    return pair


def repository(place: str) -> Path | str:
    """A folder, or a URL, which Triton alone can read."""
    return place if "://" in place else Path(place)


def trace_url(value: str) -> str:
    """The URL of a collector, or "" for none."""
    parts = urlsplit(value)
    if value and not (parts.scheme in ("http", "https") and parts.netloc):
        raise argparse.ArgumentTypeError(f"{value!r} is not a URL such as http://localhost:4318/v1/traces")
    return value
