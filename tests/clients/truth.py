"""What the gateway says in its own dialect, for the scripts of the clients to compare with."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

GATEWAY = os.environ["GATEWAY"]
KEY = os.environ["GATEWAY_KEY"]
TEXTS = ["Triton serves embeddings", "Ein Satz auf Deutsch", "植物は光を糖に変える"]
QUERY = "How do plants make sugar?"
DOCUMENTS = ["The bank raised its rates.", "Photosynthesis turns light into sugar.", "Sugar is sold by the kilo."]
LONG = "seven " * 300


def post(path: str, content: object) -> Any:
    headers = {"Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(GATEWAY + path, json.dumps(content).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def embeddings(texts: list[str]) -> list[list[float]]:
    return post("/embed", {"texts": texts})["embeddings"]


def scores() -> list[float]:
    return post("/rerank", {"query": QUERY, "documents": DOCUMENTS})["scores"]


def order() -> list[int]:
    return post("/rerank", {"query": QUERY, "documents": DOCUMENTS})["order"]


def same(a: Any, b: Any) -> bool:
    """Whether two nests of numbers are the same float32s, however many digits a client keeps of them."""
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return abs(a - b) <= 1e-7 * max(abs(a), abs(b))


@contextmanager
def raises(kind: type[Exception], words: str) -> Iterator[None]:
    """The block must end with an error of this kind that says `words`."""
    try:
        yield
    except kind as error:
        if words not in str(error):
            raise
    else:
        raise AssertionError(f"no {kind.__name__}: {words}")
