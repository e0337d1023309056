"""A short conversation with the gateway: vectors and scores come, as many as asked for and in order."""

from __future__ import annotations

import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.deploy.docker import DeployError
from tools.direct import open_url

TEXTS = ("Photosynthesis turns light into sugar.", "Ein Satz auf Deutsch.", "The bank raised its rates.")
QUESTION = "What is the capital of France?"
TOLERANCE = 1e-3
"""How far a number may move when a text comes in another batch, on engines that do not keep its bits."""

BESIDE = ("generate", "ocr", "layout", "picture")
"""Tasks that are served only where they are asked for."""


WATCH_SECONDS = 60
"""Seconds until Grafana runs and Prometheus has found and asked everything that there is."""


def smoke(embed: str, rerank: str) -> list[str]:
    """Asks every model that answers; returns a line for each one, raises DeployError where an answer is wrong.

    What writes or reads documents is not loaded for that: it may be of a build that the stack has no library for.
    """
    models = ask(f"{embed}/models")["models"]
    lines = []
    for model in models:
        name = model["name"]
        if model["task"] in BESIDE and model.get("state", "loaded") != "loaded":
            continue
        if model["task"] == "embed":
            _check_embeddings(f"{embed}/embed", name, model["dimensions"])
            lines.append(f"{name}: {len(TEXTS)} texts, {model['dimensions']} dimensions, in order")
        elif model["task"] == "rerank":
            best = _check_scores(f"{rerank}/rerank", name)
            lines.append(f"{name}: {len(TEXTS)} documents scored, best {best:.3f}")
        elif model["task"] == "classify":
            predictions = ask(f"{embed}/predict", {"inputs": [[text] for text in TEXTS], "model": name})
            if len(predictions) != len(TEXTS) or not all(predictions):
                raise DeployError(f"{name} gave no label for one of {len(TEXTS)} texts")
            lines.append(f"{name}: {len(TEXTS)} texts, {len(predictions[0])} labels")
        elif model["task"] == "generate":
            call = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 16, "model": name}
            written = ask(f"{embed}/v1/chat/completions", call)["choices"][0]["message"]["content"]
            if not written:
                raise DeployError(f"{name} has nothing to say to {QUESTION!r}")
            lines.append(f"{name}: writes {written!r}")
        elif model["task"] in BESIDE:
            lines.append(f"{name}: loaded, for callers of Triton")
        else:
            weights = ask(f"{embed}/{model['task']}", {"inputs": TEXTS, "model": name})
            if len(weights) != len(TEXTS) or not all(weights):
                raise DeployError(f"{name} gave nothing for one of {len(TEXTS)} texts")
            lines.append(f"{name}: {len(TEXTS)} texts, of any number of values")
    failing = ask(f"{embed}/health?partial=1")["failing"]
    return lines + [f"{name} is not served: {problem}" for name, problem in failing.items()]


def watched(prometheus: str, grafana: str) -> str:
    """A line about what Prometheus hears; raises DeployError where that is not all, or Grafana is not there."""
    deadline = time.monotonic() + WATCH_SECONDS
    while True:
        try:
            ask_watcher(f"{grafana}/api/health")
            series = ask_watcher(f"{prometheus}/api/v1/query?query=up")["data"]["result"]
            hears = ", ".join(sorted({one["metric"]["job"] for one in series if one["value"][1] == "1"}))
            if "gateway" in hears and "triton" in hears:
                return f"Prometheus hears {hears}"
            problem = f"Prometheus hears {hears or 'nothing'}: see {prometheus}/targets"
        except DeployError as error:
            problem = str(error)
        if time.monotonic() > deadline:
            raise DeployError(f"the stack serves but is not watched within {WATCH_SECONDS} s: {problem}")
        time.sleep(1)


def ask(url: str, content: object = None) -> Any:
    """The gateway's JSON answer to a GET, or to a POST of `content`; raises DeployError when it is an error."""
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, body)  # noqa: S310
    if file := os.environ.get("GATEWAY_API_KEYS_FILE"):
        keys = _keys(Path(file))
        request.add_header("Authorization", f"Bearer {keys[0]}")
    return _answer(request)


def _keys(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").split() or [""]
    except (OSError, UnicodeDecodeError) as error:
        raise DeployError(f"cannot read GATEWAY_API_KEYS_FILE {file}: {error}") from None


def ask_watcher(url: str) -> Any:
    """The JSON answer of Prometheus or Grafana, which get no key of the gateway's."""
    return _answer(urllib.request.Request(url))  # noqa: S310


def _answer(request: urllib.request.Request) -> Any:
    try:
        with open_url(request, timeout=120) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            raise DeployError(
                f"{request.full_url} answers {error.code}: {error.read().decode(errors='replace')}"
            ) from None
    except OSError as error:
        raise DeployError(f"{request.full_url} does not answer: {error}") from None


def _check_embeddings(url: str, model: str, dimensions: int) -> None:
    vectors = _embed(url, model, TEXTS)
    if [len(vector) for vector in vectors] != [dimensions] * len(TEXTS):
        lengths = [len(vector) for vector in vectors]
        raise DeployError(
            f"{model} gave vectors of {lengths} numbers for {len(TEXTS)} texts, not {dimensions} each"
        )
    for vector, again in zip(vectors, reversed(_embed(url, model, TEXTS[::-1])), strict=True):
        if not all(math.isclose(a, b, abs_tol=TOLERANCE) for a, b in zip(vector, again, strict=True)):
            raise DeployError(f"{model} does not keep the order of its texts")


def _embed(url: str, model: str, texts: Sequence[str]) -> list[list[float]]:
    vectors: list[list[float]] = ask(url, {"texts": texts, "model": model})["embeddings"]
    return vectors


def _check_scores(url: str, model: str) -> float:
    answer = ask(url, {"query": "How do plants make sugar?", "documents": TEXTS, "model": model})
    scores: list[float] = answer["scores"]
    if len(scores) != len(TEXTS):
        raise DeployError(f"{model} gave {len(scores)} scores for {len(TEXTS)} documents")
    if answer["order"] != sorted(range(len(TEXTS)), key=lambda i: -scores[i]):
        raise DeployError(f"{model} gave the order {answer['order']} for the scores {scores}")
    return max(scores)
