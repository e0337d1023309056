"""A load of /embed calls, for what happens under it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import containers
import numpy as np
import numpy.typing as npt
from conftest import Answer, Stack


@dataclass
class Load:
    """Clients that embed slices of the same texts until the context ends, and what was wrong with the answers."""

    gateway: Stack
    texts: list[str]
    clients: int = 8
    calls: int = 0
    wrong: list[Answer | str] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Load:
        self._vectors = self.gateway.embed(self.texts)
        self._threads = [threading.Thread(target=self._client, args=(i,)) for i in range(self.clients)]
        for thread in self._threads:
            thread.start()
        self.go_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def go_on(self, calls: int = 40) -> None:
        """Waits until so many more calls are answered."""
        until = self.calls + calls
        containers.until(lambda: self.calls >= until, 60)

    def _client(self, place: int) -> None:
        while not self._over.is_set():
            place = (place + 3) % (len(self.texts) - 4)
            answer = self.gateway.post("embed", "/embed", {"texts": self.texts[place : place + 4]})
            if answer.status != 200:
                self.wrong.append(answer)
            elif not same_bits(answer.json()["embeddings"], self._vectors[place : place + 4]):
                self.wrong.append(f"other vectors for texts from {place}")
            self.calls += 1


def same_bits(vectors: list[list[float]], expected: npt.NDArray[np.float32]) -> bool:
    return bool(np.array_equal(np.array(vectors, np.float32), expected))
