"""The calls that every dialect uses: embed, embed_all, embed_sparse, rerank, classify and tokenize.

And the lanes that they queue in.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.utils import InferenceServerException

from tools.shim import schedule
from tools.shim.admission import Lane, Work
from tools.shim.errors import bad_request, quoted, too_large, too_long
from tools.shim.served_model import ServedModel
from tools.shim.upstream import Upstream

SHORT_BYTES = 2**16
"""Bytes beyond which a call of one request does not go before others: a text of megabytes is no short call."""

BESIDE_BYTES = 2**20
"""UTF-8 bytes of a query in one request, all times that it is sent beside a document."""

MAX_SENT_BYTES = 2**28
"""UTF-8 bytes of what one call has Triton read, a query counted beside each document."""


@dataclass(frozen=True)
class Result:
    """What Triton gave for the texts of one call, in their order."""

    model: ServedModel
    tensors: Mapping[str, npt.NDArray[Any]]
    waited: float
    """Seconds until Triton had the first of them."""
    computed: float
    """Seconds from then until it had answered the last."""
    loaded: float = 0.0
    """Seconds of `waited` in which the model was not loaded yet."""

    @cached_property
    def tokens(self) -> int:
        """Tokens of all texts together."""
        return int(self.tensors["token_count"].sum())

    @cached_property
    def truncated(self) -> int:
        """How many texts were cut to fit."""
        return np.count_nonzero(self.tensors["truncated"])

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """Score of each document [B], as the checkpoint shows them: 0 to 1, or its logits."""
        return self.tensors["score"][:, 0]

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """Logit of each document [B], before an activation has made a score of it."""
        return self.tensors["logit"][:, 0]

    @property
    def shares(self) -> npt.NDArray[np.float32]:
        """Score of each document [B] from 0 to 1, whatever the checkpoint shows."""
        if self.model.facts.get("activation", "Sigmoid") == "Sigmoid":
            return self.scores
        return np.asarray(1 / (1 + np.exp(-self.logits)), np.float32)

    @property
    def order(self) -> npt.NDArray[np.intp]:
        """Documents by descending score; equal ones stay in the order they came in."""
        return np.argsort(-self.scores, kind="stable")


@dataclass(frozen=True)
class Lanes:
    """What all calls share. Many requests of few texts fill Triton's batches; of those of many, more only wait."""

    short: Lane = field(default_factory=lambda: Lane(requests=64, seconds=10))
    """Calls of one request that is not large, which somebody may be waiting for."""
    bulk: Lane = field(default_factory=lambda: Lane(requests=4, seconds=60))
    """All others, most of them split into several."""

    @classmethod
    def of(cls, workers: int) -> Lanes:
        """One process's share of them; a lane of one request would not tokenize while it encodes."""
        whole = cls()
        return cls(whole.short.shared(workers), whole.bulk.shared(workers))


@dataclass(frozen=True)
class Gateway:
    """Answers calls from Triton, each by a deadline."""

    upstream: Upstream
    lanes: Lanes
    deadline: float = math.inf
    """Time, by time.monotonic(), after which nobody waits for the answer."""
    keep_alive: float | None = None
    """Seconds that the call's model stays loaded after it, where the call says so."""

    def within(self, seconds: float, keep_alive: float | None = None) -> Gateway:
        """The same for one call that may take so long."""
        return Gateway(self.upstream, self.lanes, time.monotonic() + seconds, keep_alive)

    @property
    def seconds(self) -> float:
        """Left until the deadline."""
        return self.deadline - time.monotonic()

    async def embed(
        self,
        texts: list[str],
        model_name: str | None = None,
        *,
        prompt: str | None = None,
        dimensions: int | None = None,
        truncate: bool = True,
    ) -> Result:
        """`embeddings` of `texts` behind a prompt, cut to `dimensions` and of unit length again.

        Where `truncate` is off, a text longer than the model's window is refused.
        """
        model = await self.upstream.model("embed", model_name)
        check_dimensions(model, dimensions)
        result = await self._infer(model, text_inputs(model, texts, prompt), truncate)
        if dimensions in (None, model.dimensions):
            return result
        cut = unit_length(result.tensors["embeddings"][:, :dimensions])
        return replace(result, tensors={**result.tensors, "embeddings": cut})

    async def embed_all(
        self, texts: list[str], model_name: str | None = None, *, prompt: str | None = None, truncate: bool = True
    ) -> Result:
        """`token_embeddings` of `texts` behind a prompt, of unlike numbers of rows: objects [B, 1]."""
        model = await self.upstream.model("embed_all", model_name)
        return await self._infer(model, text_inputs(model, texts, prompt), truncate)

    async def embed_sparse(
        self, texts: list[str], model_name: str | None = None, *, prompt: str | None = None, truncate: bool = True
    ) -> Result:
        """`indices` and `values` of `texts` behind a prompt: the vocabulary's words that have a weight.

        Rows are of unlike lengths, objects [B, 1].
        """
        model = await self.upstream.model("embed_sparse", model_name)
        return await self._infer(model, text_inputs(model, texts, prompt), truncate)

    async def rerank(
        self,
        query: str | list[str],
        documents: list[str],
        model_name: str | None = None,
        *,
        instruction: str | None = None,
        truncate: bool = True,
    ) -> Result:
        """`score` and `logit` of each document, for one query or for one each.

        Where a model takes no `instruction`, it is refused.
        """
        model = await self.upstream.model("rerank", model_name)
        inputs: dict[str, str | list[str]] = {"query": query, "passage": documents}
        if instruction is not None:
            if not model.takes_instruction:
                raise bad_request(f"{model.name} takes no instruction: leave it out")
            inputs["instruction"] = instruction
        return await self._infer(model, inputs, truncate)

    async def classify(
        self, inputs: Sequence[tuple[str, ...]], model_name: str | None = None, *, truncate: bool = True
    ) -> Result:
        """`probabilities` and `logits` of each text or pair of texts."""
        model = await self.upstream.model("classify", model_name)
        parts, order = list[Result](), list[int]()
        for names in (("text",), ("text", "text_pair")):  # a request has pairs only or none
            if at := [i for i, texts in enumerate(inputs) if len(texts) == len(names)]:
                columns = zip(*(inputs[i] for i in at), strict=True)
                own: dict[str, str | list[str]] = dict(zip(names, map(list, columns), strict=True))
                parts.append(await self._infer(model, own, truncate, at=at))
                order += at
        if len(parts) == 1:
            return parts[0]
        first, second = parts
        tensors = {
            name: np.concatenate([tensor, second.tensors[name]])[np.argsort(order)]
            for name, tensor in first.tensors.items()
        }
        return replace(first, tensors=tensors, computed=first.computed + second.waited + second.computed)

    async def tokenize(self, texts: list[str], prompt: str | None = None) -> Result:
        """`tokens` of each text, as the tokenizer step describes them, by the first model that embeds."""
        model = await self.upstream.model("embed", None)
        inputs = text_inputs(model, texts, prompt)
        return await self._infer(model, inputs, True, model.tokenizer, ("tokens", "token_count", "truncated"))

    async def _infer(
        self,
        model: ServedModel,
        inputs: Mapping[str, str | list[str]],
        truncate: bool,
        step: str | None = None,
        outputs: tuple[str, ...] = (),
        at: Sequence[int] | None = None,
    ) -> Result:
        """Every output for every row of the inputs, in order, through as many Triton requests as it takes.

        An input that is one string is sent beside each row; equal rows are sent once. An error names a row by
        its place in the call, `at` where others stand between.
        """
        started = time.perf_counter()
        shared = {name: value.encode() for name, value in inputs.items() if isinstance(value, str)}
        beside = sum(map(len, shared.values()))
        columns = {
            name: [text.encode() for text in value] for name, value in inputs.items() if not isinstance(value, str)
        }
        rows = list(zip(*columns.values(), strict=True))
        distinct = list(dict.fromkeys(rows))
        sizes = [sum(map(len, row)) for row in distinct]
        sent = sum(sizes) + beside * len(sizes)
        if sent > MAX_SENT_BYTES:
            raise too_large(
                f"the query is read beside each document, {sent} bytes together, over the limit of "
                f"{MAX_SENT_BYTES}: shorten it, or send fewer documents a call"
            )
        # Documents of one request share the work for their query, but the query is sent with each.
        together = max(1, BESIDE_BYTES // max(1, beside))
        requests = schedule.split(sizes, min(model.max_batch_size, together))
        is_short = len(requests) == 1 and sent <= SHORT_BYTES
        lane = self.lanes.short if is_short else self.lanes.bulk
        first = 0.0

        def place(i: int) -> str:
            return place_of(model, at[i] if at else i)

        async def infer(indices: list[int]) -> dict[str, npt.NDArray[Any]]:
            nonlocal first
            first = first or time.perf_counter()
            own = {name: [distinct[i][c] for i in indices] for c, name in enumerate(columns)}
            own |= {name: [value] * len(indices) for name, value in shared.items()}
            send = partial(self.upstream.infer, step or model.name, own)
            try:
                try:
                    return await send(self.seconds, outputs)
                except InferenceServerException as error:
                    if not await self.upstream.reloaded(model.name, error, self.seconds):
                        raise
                    return await send(self.seconds, outputs)
            except InferenceServerException as error:
                raise placed(error, [place(rows.index(distinct[i])) for i in indices]) from None

        def work(indices: Iterable[int]) -> Work:
            return Work.of([beside + sizes[i] for i in indices], model.max_tokens)

        async with self.upstream.use(model.name, self.seconds, self.keep_alive) as loaded:
            with lane.admitted(work(range(len(sizes))), self.seconds) as admitted:
                tensors = await schedule.run(
                    requests,
                    lambda indices: lane.run(admitted, work(indices), partial(infer, indices)),
                    lane.requests,
                )
        if len(distinct) < len(rows):
            places = {row: i for i, row in enumerate(distinct)}
            again = [places[row] for row in rows]
            tensors = {name: tensor[again] for name, tensor in tensors.items()}
        if not truncate and tensors["truncated"].any():
            i = int(tensors["truncated"].argmax())
            raise too_long(f"{place(i)} is longer than the {model.max_tokens} tokens that {model.name} reads")
        return Result(model, tensors, first - started, time.perf_counter() - first, loaded)


ROW = re.compile(r"\b(?:text|passage)\[(\d+)]")
"""How a step names a text of its request."""


def place_of(model: ServedModel, i: int) -> str:
    """How an error names the text at `i` of a call: a reranker reads it with its query, which may be to blame."""
    return f"text {i} with its query" if model.task == "rerank" else f"text {i}"


def placed(error: InferenceServerException, places: list[str]) -> InferenceServerException:
    """The error, by where its text stands in the call instead of in the request; `places` are its texts'."""
    message = ROW.sub(lambda row: places[int(row[1])], error.message() or "", count=1)
    return InferenceServerException(message, error.status(), error.debug_details())


def text_inputs(model: ServedModel, texts: list[str], prompt: str | None) -> dict[str, str | list[str]]:
    """`texts` and the name of their prompt; raises GatewayError 400 with the names there are."""
    if prompt is None:
        return {"text": texts}
    if prompt not in model.prompts:
        known = ", ".join(sorted(model.prompts))
        raise bad_request(f"there is no prompt {quoted(prompt)}: {model.name} has {known}")
    return {"text": texts, "prompt_name": prompt}


def check_dimensions(model: ServedModel, dimensions: int | None) -> None:
    """Raises GatewayError 400 where the embeddings of `model` cannot be cut to `dimensions`."""
    if dimensions is None or model.dimensions is None or dimensions == model.dimensions:
        return
    if model.minimum_dimensions is None:
        gives = f"{model.name} gives {model.dimensions} dimensions"
        if dimensions > model.dimensions:
            raise bad_request(f"{gives}: ask for no more")
        raise bad_request(
            f"{gives} and was not trained to give fewer: leave the field out, or have it built under another "
            f"--name with --dimensions {dimensions}"
        )
    if not model.minimum_dimensions <= dimensions <= model.dimensions:
        allowed = f"{model.minimum_dimensions} to {model.dimensions}"
        raise bad_request(f"{model.name} gives {allowed} dimensions: ask for one of these, not {dimensions}")


def unit_length(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Each row divided by its length."""
    unit: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
