"""One answer of a model that writes, as it comes from Triton piece by piece."""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from tritonclient.utils import InferenceServerException

from tools.shim.errors import bad_request
from tools.shim.gateway import Gateway
from tools.shim.served_model import ServedModel

Tensor = tuple[str, npt.NDArray[Any]]
"""Triton's name of a type, and [1, ...] of it."""


Guide: TypeAlias = tuple[str, str]
"""What an answer follows: `json_schema` or `structural_tag`, and it itself."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is to be written; None for what the model does by itself."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop_words: Sequence[str] = ()
    guide: Guide | None = None
    log_probs: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Each as the model's input of that name."""
        kinds: dict[str, tuple[str, type]] = {
            "max_tokens": ("INT32", np.int32),
            "seed": ("UINT64", np.uint64),
            **dict.fromkeys(
                ("temperature", "top_p", "frequency_penalty", "presence_penalty"), ("FP32", np.float32)
            ),
        }
        said = {name: getattr(self, name) for name in kinds}
        found: dict[str, Tensor] = {
            name: (kinds[name][0], np.array([[value]], kinds[name][1]))
            for name, value in said.items()
            if value is not None
        }
        if self.stop_words:
            found["stop_words"] = strings(self.stop_words)
        if self.guide:
            found["guided_decoding_guide_type"], found["guided_decoding_guide"] = (
                strings([one]) for one in self.guide
            )
        if self.log_probs:
            found["return_log_probs"] = ("BOOL", np.array([[True]]))
        return found


@dataclass(frozen=True)
class LogProb:
    """How likely the model found a token that it wrote."""

    token: bytes
    value: float


@dataclass
class Generation:
    """An answer under way. Its numbers are true once `pieces` has ended."""

    gateway: Gateway
    model: ServedModel
    inputs: Mapping[str, Tensor]
    prompt_tokens: int = 0
    tokens: int = 0
    """Tokens written."""
    reason: str = ""
    """Why it has ended: stop or length."""
    log_probs: list[LogProb] = field(default_factory=list)
    """Log-probabilities of the tokens since these were last taken, where they were asked for."""
    started: float = field(default_factory=time.perf_counter)
    first: float = math.nan
    """Seconds until the first piece."""
    ended: float = math.nan
    """Seconds until the last."""

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text as it comes. To close this is to give the answer up."""
        gateway, name = self.gateway, self.model.name
        async with gateway.upstream.use(name, gateway.seconds, gateway.keep_alive):
            for attempt in (1, 2):
                try:
                    async with aclosing(
                        gateway.upstream.generate(name, self.inputs, gateway.seconds)
                    ) as responses:
                        async for response in responses:
                            self._note(response)
                            yield response["text_output"][0, 0].decode()
                    break
                except InferenceServerException as error:
                    started = not math.isnan(self.first)
                    again = gateway.upstream.reloaded
                    if attempt == 2 or started or not await again(name, error, gateway.seconds):
                        raise
        self.ended = time.perf_counter() - self.started
        if not self.reason:
            raise InferenceServerException(f"{name} ended an answer without a word", "UNAVAILABLE")

    async def whole(self) -> str:
        """The text, all of it."""
        return "".join([piece async for piece in self.pieces()])

    def _note(self, response: Mapping[str, npt.NDArray[Any]]) -> None:
        if math.isnan(self.first):
            self.first = time.perf_counter() - self.started
        self.prompt_tokens = int(response["num_input_tokens"][0, 0])
        self.tokens += int(response["num_output_tokens"][0, 0])
        self.reason = response["finish_reason"][0, 0].decode()
        if "output_tokens" in response:
            told = zip(response["output_tokens"][0], response["output_log_probs"][0].tolist(), strict=True)
            self.log_probs += [LogProb(token, value) for token, value in told]


async def generate(
    gateway: Gateway, model_name: str | None, inputs: Mapping[str, Tensor], sampling: Sampling
) -> Generation:
    """An answer by the model called so, or the first that writes; raises GatewayError where there is none."""
    model = await gateway.upstream.model("generate", model_name)
    stream: dict[str, Tensor] = {"stream": ("BOOL", np.array([[True]]))}
    return Generation(gateway, model, {**inputs, **sampling.tensors(), **stream})


def as_json(value: Any) -> str:
    """A part of a call for the model; raises GatewayError 400 where it has too many objects in each other."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise bad_request("the call has hundreds of objects in each other: send fewer") from None


def strings(values: Sequence[str]) -> Tensor:
    """Texts as a tensor [1, number]."""
    return "BYTES", np.array([[value.encode() for value in values]], np.object_)
