"""The gateway's routes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from tools.shim import schedule
from tools.shim.contract import parse_embed, parse_rerank
from tools.shim.errors import as_gateway_error, as_response, not_ready, overloaded
from tools.shim.upstream import ServedModel, Upstream

MAX_BODY_BYTES = 16 * 2**20
MAX_TEXTS_IN_FLIGHT = 8192
"""Texts of all calls together; a call that would pass it is turned away with 429."""

REQUESTS_IN_FLIGHT = 64
"""Triton requests of all calls together."""

log = logging.getLogger(__name__)


@dataclass
class Gateway:
    """Remaps calls onto one Triton server, within the limits above."""

    upstream: Upstream
    timeout: float
    """Seconds a call may take."""
    texts_in_flight: int = 0
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(REQUESTS_IN_FLIGHT))

    async def embed(self, request: web.Request) -> web.Response:
        """`POST /embed {"texts", "model"}` -> `{"embeddings", "model"}`."""
        call = parse_embed(await request.read())
        model = await self.upstream.model("embed", call.model)
        embeddings = await self._infer(model, "embeddings", call.texts)
        return answer({"embeddings": embeddings, "model": model.name})

    async def rerank(self, request: web.Request) -> web.Response:
        """`POST /rerank {"query", "documents", "model"}` -> `{"scores", "order", "model"}`."""
        call = parse_rerank(await request.read())
        model = await self.upstream.model("rerank", call.model)
        scores = (await self._infer(model, "score", call.documents, query=call.query))[:, 0]
        order = np.argsort(-scores, kind="stable")
        return answer({"scores": scores, "order": order, "model": model.name})

    async def models(self, _: web.Request) -> web.Response:
        """`GET /models`: what is served; the first model of a task is its default."""
        return answer({"models": await self.upstream.models()})

    async def health(self, _: web.Request) -> web.Response:
        """`GET /health`: 200 when every served model answers, else 503 with which one does not and why."""
        problems = await self.upstream.problems()
        failing = {name: problem for name, problem in problems.items() if problem}
        if failing:
            raise not_ready("; ".join(f"{name}: {problem}" for name, problem in failing.items()))
        return answer({"status": "ready", "models": list(problems)})

    async def _infer(
        self, model: ServedModel, output: str, texts: list[str], query: str | None = None
    ) -> npt.NDArray[Any]:
        """`output` for every text, in order, through as many Triton requests as it takes; equal texts go once."""
        places = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        distinct = list(places)

        async def infer(indices: list[int]) -> npt.NDArray[Any]:
            own = [distinct[i] for i in indices]
            inputs = {"text": own} if query is None else {"query": [query] * len(own), "passage": own}
            return await self.upstream.infer(model, inputs, output, self.timeout)

        with self._admitted(len(texts)):
            requests = schedule.split(distinct, model.max_batch_size)
            rows = await asyncio.wait_for(schedule.run(requests, infer, self.slots), self.timeout)
        return rows if len(distinct) == len(texts) else rows[[places[text] for text in texts]]

    @contextmanager
    def _admitted(self, texts: int) -> Iterator[None]:
        if self.texts_in_flight + texts > MAX_TEXTS_IN_FLIGHT:
            raise overloaded(f"{self.texts_in_flight} texts are in flight: try again in a second")
        self.texts_in_flight += texts
        try:
            yield
        finally:
            self.texts_in_flight -= texts


def answer(content: object) -> web.Response:
    """`content` as JSON; numpy's float32 keeps exactly the digits that read back as the same float32."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return web.Response(body=body, content_type="application/json")


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every exception becomes one row of the error table; unexpected ones are logged with their trace."""
    try:
        return await handler(request)
    except Exception as error:
        known = as_gateway_error(error)
        if known.status == HTTPStatus.INTERNAL_SERVER_ERROR:
            log.exception("%s %s failed", request.method, request.path)
        return as_response(known)


def make_app(upstream: Upstream, timeout: float) -> web.Application:
    """The gateway as an aiohttp application over an upstream that the caller opens and closes."""
    gateway = Gateway(upstream, timeout)
    app = web.Application(middlewares=[errors], client_max_size=MAX_BODY_BYTES)
    app.router.add_post("/embed", gateway.embed)
    app.router.add_post("/rerank", gateway.rerank)
    app.router.add_get("/models", gateway.models)
    app.router.add_get("/health", gateway.health)
    return app
