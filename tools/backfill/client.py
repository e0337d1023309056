"""The gateway as a backfill calls it: in calls of the bulk lane, patient with a server that is busy or gone."""

from __future__ import annotations

import asyncio
import base64
import io
import random
from collections.abc import Sequence
from itertools import count, cycle
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
import numpy as np
import numpy.typing as npt
import orjson

from tools.backfill.errors import BackfillError
from tools.backfill.origin import Origin
from tools.backfill.progress import Progress
from tools.command import EMBED_PORT
from tools.direct import is_local

GATEWAY = f"http://localhost:{EMBED_PORT}"

CALL_TEXTS, CALL_BYTES = 256, 2**18
"""Texts and bytes of one call. The gateway splits it into requests; a larger one only takes longer to fail."""

PATIENCE = 4
"""How often a single text may fail on the server's side before it is listed."""

SLOWEST = 600.0
"""Seconds that an answer may take; the gateway has a deadline of its own before."""

PROBE = "ready?"

GONE = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, asyncio.TimeoutError)


class Client:
    """One or many stacks that serve the same model. Use it as an async context manager.

    Raises BackfillError where a stack cannot be reached at first, has no such model, or not the others'.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str | None,
        prompt: str | None,
        dimensions: int | None,
        key: str | None,
        calls: int,
        progress: Progress,
        usual: str = "document",
    ) -> None:
        """Of stacks at `urls`, with so many `calls` to each at once.

        `prompt` None is the `usual` one, where the model has it; "none" is none.
        """
        self.origin: Origin
        self._urls = [url.rstrip("/") for url in urls]
        self._model, self._prompt, self._dimensions = model, prompt, dimensions
        self._usual = usual
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._progress = progress
        self._slots = asyncio.Semaphore(calls * len(urls))
        self._next = cycle(self._urls)
        self._call_bytes = CALL_BYTES
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Client:
        for url in self._urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
                raise BackfillError(f"--url {url!r} is no URL such as {GATEWAY}")
        away = not all(is_local(urlsplit(url).netloc) for url in self._urls)
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(SLOWEST, sock_connect=10),
            connector=aiohttp.TCPConnector(limit=0),
            trust_env=away,
        )
        try:
            origins = [await self._introduce(url) for url in self._urls]
            for url, origin in zip(self._urls, origins, strict=True):
                if origin != origins[0]:
                    raise BackfillError(
                        f"{url} serves {origin} and {self._urls[0]} {origins[0]}: their vectors do not mix, so "
                        "serve the same build everywhere"
                    )
            self.origin = origins[0]
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def embed(
        self,
        texts: Sequence[str | None],
        places: Sequence[int],
        vectors: npt.NDArray[np.float32],
        refused: dict[int, str],
    ) -> None:
        """Fills in the rows of `vectors` [rows, D] for the texts at `places`, or says in `refused` why not."""
        sizes = {i: len((texts[i] or "").encode("utf-8", "replace")) for i in places}
        in_order = sorted(places, key=lambda i: (sizes[i], texts[i]), reverse=True)
        calls: list[list[int]] = []
        room = 0
        for i in in_order:  # like lengths travel together, the longest first
            if not calls or len(calls[-1]) == CALL_TEXTS or sizes[i] > room:
                calls.append([])
                room = self._call_bytes
            calls[-1].append(i)
            room -= sizes[i]
        sending = [asyncio.create_task(self._send(texts, call, vectors, refused)) for call in calls]
        try:
            await asyncio.gather(*sending)
        finally:
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)

    async def rerank(self, query: str, documents: Sequence[str], model: str | None) -> list[float]:
        """Scores of documents; raises BackfillError where they are refused."""
        body = {"query": query, "documents": documents, "model": model}
        try:
            async with self._session.post(f"{self._urls[0]}/rerank", data=orjson.dumps(body)) as reply:
                answer = await reply.read()
        except GONE as error:
            raise BackfillError(f"{self._urls[0]} does not answer: {error or type(error).__name__}") from None
        content = orjson.loads(answer)
        if reply.status != 200:
            raise BackfillError(f"{self._urls[0]} cannot rerank: {content.get('error')}")
        return [float(score) for score in content["scores"]]

    async def check(self) -> None:
        """Raises BackfillError where a stack serves another model than at first; waits for one that is gone."""
        for url in self._urls:
            origin = Origin.of(await self._describe(url), self.origin.prompt, self.origin.dimensions)
            if origin != self.origin:
                raise BackfillError(
                    f"{url} has become {origin} and was {self.origin}: nothing of it was written; start again, "
                    "with --replace if the new one is to take over"
                )

    async def _send(
        self,
        texts: Sequence[str | None],
        call: Sequence[int],
        vectors: npt.NDArray[np.float32],
        refused: dict[int, str],
    ) -> None:
        """One call; one that is refused or fails is sent in halves, until it is a text that can be named."""
        async with self._slots:
            status, answer = await self._answer(next(self._next), [texts[i] for i in call])
        if status == 200:
            for i, row, usable in zip(call, answer, np.isfinite(answer).all(axis=1), strict=True):
                if usable:
                    vectors[i] = row
                else:
                    refused[i] = "the model gave it a vector with numbers that are not finite"
        elif len(call) > 1:
            if status in (408, 504):
                self._call_bytes = max(2**12, self._call_bytes // 2)
            middle = len(call) // 2
            await self._send(texts, call[:middle], vectors, refused)
            await self._send(texts, call[middle:], vectors, refused)
        else:
            refused[call[0]] = answer

    async def _answer(self, url: str, texts: Sequence[str | None]) -> tuple[int, Any]:
        """Status and vectors [texts, D], or why they are refused; waits as long as the server is not there."""
        body: dict[str, Any] = {"input": texts, "model": self.origin.family, "encoding_format": "base64"}
        if self.origin.prompt is not None:
            body["input_type"] = self.origin.prompt
        if self._dimensions is not None:
            body["dimensions"] = self._dimensions
        try:
            content = orjson.dumps(body)
        except TypeError:
            return 400, "its text is not valid Unicode: it holds half of a surrogate pair"
        failures = 0
        for attempt in count():
            try:
                async with self._session.post(f"{url}/v1/embeddings", data=io.BytesIO(content)) as reply:
                    answer = await reply.read()
                    status, headers = reply.status, reply.headers
            except GONE as error:
                await self._wait(url, attempt, None, f"{type(error).__name__}: {error}")
                continue
            if status == 200:
                try:
                    rows = [one["embedding"] for one in orjson.loads(answer)["data"]]
                    vectors = np.frombuffer(b"".join(map(base64.b64decode, rows)), "<f4").reshape(len(rows), -1)
                    tokens, cut = int(headers["X-Token-Count"]), int(headers["X-Truncated"])
                except (ValueError, KeyError, TypeError):
                    raise BackfillError(f"{url} answers as no gateway of this project does") from None
                if len(vectors) != len(texts):
                    raise BackfillError(f"{url} gave {len(vectors)} vectors for {len(texts)} texts")
                self._progress.answered(len(texts), tokens, cut)
                return 200, vectors
            sentence = sentence_of(answer, status)
            if status in (401, 403, 404, 507):
                raise BackfillError(f"{url}: {sentence}")
            if status in (429, 503):
                await self._wait(url, attempt, headers.get("Retry-After"), sentence)
                continue
            if status in (408, 504) and len(texts) > 1:
                return status, sentence
            if status >= 500 or status == 408:
                # A server that fails with any text is broken, and is waited for; else it is this text's fault.
                failures += 1
                if failures <= PATIENCE or not await self._is_well(url):
                    await self._wait(url, failures, None, sentence)
                    continue
            return status, sentence
        raise AssertionError

    async def _is_well(self, url: str) -> bool:
        """Whether the model embeds a text that it is known to embed."""
        body = {"input": PROBE, "model": self.origin.family}
        try:
            async with self._session.post(f"{url}/v1/embeddings", data=orjson.dumps(body)) as reply:
                await reply.read()
                return reply.status == 200
        except GONE:
            return False

    async def _introduce(self, url: str) -> Origin:
        """What a stack serves, by its own word and by the vector of one text."""
        try:
            async with self._session.get(f"{url}/v1/models") as reply:
                answer, status = await reply.read(), reply.status
        except GONE as error:
            raise BackfillError(
                f"no gateway answers at {url} ({error or type(error).__name__}): start it, or name "
                "another with --url"
            ) from None
        except aiohttp.ClientError as error:
            raise BackfillError(f"{url} cannot be asked: {type(error).__name__} {error}") from None
        if status in (401, 403):
            raise BackfillError(f"{url}: {sentence_of(answer, status)} (GATEWAY_API_KEY in the environment)")
        model = await self._describe(url)
        prompt = self._prompt
        if prompt is None:
            prompt = self._usual if self._usual in model["prompts"] else None
        elif prompt == "none":
            prompt = None
        self.origin = Origin.of(model, prompt, 0)
        status, answer = await self._answer(url, [PROBE])
        if status != 200:
            raise BackfillError(f"{url}: {answer}")
        return Origin.of(model, prompt, answer.shape[1])

    async def _describe(self, url: str) -> dict[str, Any]:
        """The model as the gateway lists it."""
        name = self.origin.family if hasattr(self, "origin") else self._model
        path = f"/v1/models/{quote(name, safe='')}" if name else "/v1/models"
        for attempt in count():
            try:
                async with self._session.get(f"{url}{path}") as reply:
                    answer, status, headers = await reply.read(), reply.status, reply.headers
            except GONE as error:
                await self._wait(url, attempt, None, f"{type(error).__name__}: {error}")
                continue
            if status != 503:
                break
            await self._wait(url, attempt, headers.get("Retry-After"), sentence_of(answer, status))
        if status != 200 and name:
            raise BackfillError(f"{url}: {sentence_of(answer, status)}")
        try:
            content = orjson.loads(answer)
            models = [one for one in ([content] if name else content["data"]) if one["task"] == "embed"]
            if not models:
                raise BackfillError(f"{url} serves no model that embeds" + (f" called {name}" if name else ""))
            model: dict[str, Any] = models[0]
            Origin.of(model, None, 0)
        except (ValueError, KeyError, TypeError):
            raise BackfillError(
                f"{url} is no gateway of this project, or an older one: name it with --url"
            ) from None
        return model

    async def _wait(self, url: str, attempt: int, retry_after: str | None, why: str) -> None:
        """As long as the server says, else longer each time, up to ten seconds."""
        seconds = min(10.0, 0.25 * 2 ** min(attempt, 6))
        if retry_after and retry_after.isdecimal():  # a proxy may name a date
            seconds = float(retry_after)
        self._progress.waits(f"{url}: {why}")
        await asyncio.sleep(seconds * random.uniform(1, 1.25))


def sentence_of(answer: bytes, status: int) -> str:
    """What an error's body says."""
    try:
        return str(orjson.loads(answer)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {status}"
