"""What gives vectors, however it is reached."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from tools.bench.perf_analyzer import Load, PerfAnalyzer
from tools.bench.server import Process
from tools.direct import open_url

MODEL = "minilm"
"""What servers call it."""


class Embedder(Protocol):
    """One way to get vectors."""

    @property
    def processes(self) -> list[Process]:
        """What computes."""
        ...

    @property
    def concurrent(self) -> bool:
        """Whether it takes calls of many clients at once."""
        ...

    def embed(self, texts: list[str]) -> npt.NDArray[np.float64]:
        """One call: the vectors."""
        ...

    def send(self, calls: list[list[str]], clients: int, load: PerfAnalyzer) -> Load:
        """Every call once."""
        ...


@dataclass(frozen=True)
class Server:
    """Takes JSON over HTTP."""

    processes: list[Process]
    address: str
    route: str
    field: str
    """Field of the body that holds the texts."""
    concurrent: bool = True

    def embed(self, texts: list[str]) -> npt.NDArray[np.float64]:
        """One call: the vectors."""
        request = urllib.request.Request(
            f"http://{self.address}/{self.route}", json.dumps(self._body(texts)).encode()
        )
        request.add_header("Content-Type", "application/json")
        with open_url(request) as reply:
            answer = json.loads(reply.read())
        rows = answer["embeddings"] if "embeddings" in answer else [row["embedding"] for row in answer["data"]]
        return np.array(rows)

    def send(self, calls: list[list[str]], clients: int, load: PerfAnalyzer) -> Load:
        """By perf_analyzer."""
        return load.post(self.address, self.route, [self._body(texts) for texts in calls], clients)

    def _body(self, texts: list[str]) -> dict[str, Any]:
        return {self.field: texts, "model": MODEL}


@dataclass(frozen=True)
class Library:
    """encode.py, which takes one call after another."""

    processes: list[Process]
    questions: IO[str]
    answers: IO[str]
    concurrent: bool = False

    def embed(self, texts: list[str]) -> npt.NDArray[np.float64]:
        """One call: the vectors."""
        return np.array(self._ask([texts], vectors=True)["vectors"])

    def send(self, calls: list[list[str]], clients: int, load: PerfAnalyzer) -> Load:  # noqa: ARG002
        """One after another, which it times itself."""
        milliseconds = self._ask(calls, vectors=False)["milliseconds"]
        return Load(sum(milliseconds) / 1000, milliseconds, 0)

    def _ask(self, calls: list[list[str]], vectors: bool) -> dict[str, Any]:
        self.questions.write(json.dumps({"texts": calls, "vectors": vectors}) + "\n")
        self.questions.flush()
        answer: dict[str, Any] = json.loads(self.answers.readline())
        return answer
