"""Triton's model control: what is loaded, loading and unloading, and what loaded models take.

Triton does three things badly that this makes good. An unload returns before its processes are gone, and a load at
that time gets in their way: `unload` waits for their end. An ensemble takes its steps along when it is loaded and
leaves them when it is unloaded: `unload` takes them too. And a load of what is there builds it up a second time
beside the first: it is not called then.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from tools.access import GRPC_HEADER
from tools.direct import channel_options

INDEX_SECONDS = 5.0
"""What Triton may take to say what it has loaded, and what that takes."""

UNLOAD_SECONDS = 60.0
"""Seconds after which a model that is still being unloaded counts as stuck."""

LOAD_SECONDS = 900.0
"""Seconds that a load may take."""

DEATH_SECONDS = 5.0
"""Seconds in which Triton notices that a process died while its model loads, unless it was very young."""

STUCK = (
    "a process of this model died while it loaded, or the load never ended. Triton cannot recover from that: "
    "restart it, and read its log"
)

NO_MEMORY = ("memory", "alloc")
"""Words by which engines say that there is no room."""

MEMORY = "model_memory_bytes"
"""The metric of `build/steps/memory.py`."""


PRECISION = "encoder_precision_info"
"""The metric of `build/steps/onnx_runner.py`."""


@dataclass(frozen=True)
class Told:
    """What steps tell on Triton's metrics port."""

    memory: Mapping[tuple[str, str], int]
    """(model, `process` or `gpu`) -> bytes that it holds, by its own count."""
    precisions: Mapping[str, str]
    """Model -> what it computes in, where that is decided when it is loaded."""


class StuckError(Exception):
    """Triton neither loads a family nor lets go of it."""


class Control:
    """The management of one Triton. Use it as an async context manager."""

    def __init__(self, address: str, metrics: str, secret: Path) -> None:
        """By the addresses of its gRPC and metrics, and the file of its secret, which each start makes anew."""
        self._address = address
        self._metrics = f"http://{metrics}/metrics"
        self._secret = secret
        self._client: Any = None
        self._session: Any = None

    async def __aenter__(self) -> Control:
        options = [("grpc.max_receive_message_length", -1), *channel_options(self._address)]
        self._client = InferenceServerClient(self._address, channel_args=options)
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(INDEX_SECONDS))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await self._client.close()

    async def states(self) -> dict[str, str]:
        """Model -> READY, LOADING, UNLOADING or UNAVAILABLE, without those that were never loaded.

        Raises InferenceServerException where Triton does not say.
        """
        index = await self._client.get_model_repository_index(self._headers(), client_timeout=INDEX_SECONDS)
        return {model.name: model.state for model in index.models if model.state}

    async def load(
        self, ensembles: Sequence[str], steps: Sequence[str], lost: Collection[str]
    ) -> dict[str, InferenceServerException]:
        """Loads what it can of ensembles that share `steps`; returns why the others are not there.

        What is there of them is unloaded before. Models whose process died while they are loaded come to be in
        `lost`. Raises InferenceServerException with Triton's reason where no ensemble can be loaded, or memory is
        lacking, and StuckError where Triton gives no reason.
        """
        models = (*ensembles, *steps)
        until = time.monotonic() + LOAD_SECONDS
        if states_of(await self.states(), models) & {"READY", "LOADING", "UNLOADING"}:
            await self.unload(models)
        load = asyncio.create_task(self._load(ensembles))
        died = math.inf
        try:
            while not (await asyncio.wait((load,), timeout=0.5))[0]:
                died = math.inf if {*lost}.isdisjoint(steps) else min(died, time.monotonic())
                if time.monotonic() > min(until, died + DEATH_SECONDS):
                    raise StuckError(STUCK)
            return load.result()
        except InferenceServerException:
            with suppress(InferenceServerException):
                await self.unload(models)
            raise
        finally:
            load.cancel()

    async def _load(self, ensembles: Sequence[str]) -> dict[str, InferenceServerException]:
        errors: dict[str, InferenceServerException] = {}
        for name in ensembles:
            try:
                await self._client.load_model(name, self._headers())
            except InferenceServerException as error:
                errors[name] = error
        for known in errors.values():
            if len(errors) == len(ensembles) or lacks_memory(known):
                raise known
        return errors

    async def unload(self, models: Sequence[str]) -> None:
        """Unloads ensembles and then their steps, and waits until nothing of them is left; what is not there is.

        Raises InferenceServerException where Triton does not answer, or not let go.
        """
        for name in models:
            await self._client.unload_model(name, self._headers(), client_timeout=INDEX_SECONDS)
        for _ in range(int(UNLOAD_SECONDS * 20)):
            states = await self.states()
            if not any(states.get(name) in ("UNLOADING", "LOADING", "READY") for name in models):
                return
            await asyncio.sleep(0.05)
        raise InferenceServerException(f"Triton has not unloaded {models[0]} within {UNLOAD_SECONDS:.0f} s")

    async def told(self) -> Told:
        """What steps tell of themselves; nothing where that cannot be had."""
        try:
            async with self._session.get(self._metrics) as answer:
                text = await answer.text()
            lines = "\n".join(line for line in text.splitlines() if MEMORY in line or PRECISION in line)
            samples = [sample for family in text_string_to_metric_families(lines) for sample in family.samples]
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError):
            return Told({}, {})
        labels = [(sample.name, sample.labels, sample.value) for sample in samples]
        return Told(
            {(own["model"], own["memory"]): int(value) for name, own, value in labels if name == MEMORY},
            {own["model"]: own["precision"] for name, own, _ in labels if name == PRECISION},
        )

    def _headers(self) -> dict[str, str]:
        try:
            return {GRPC_HEADER: self._secret.read_text()}
        except OSError as error:
            raise InferenceServerException(f"Triton's secret cannot be read: {error}") from None


def is_missing(error: InferenceServerException) -> bool:
    """Whether Triton says that it does not have the model, or not any more."""
    status, message = error.status() or "", error.message() or ""
    gone = ("unknown model", "is not ready", "not found", "unloaded", "no available versions")
    return any(word in status for word in ("NOT_FOUND", "UNAVAILABLE")) and any(one in message for one in gone)


def states_of(states: Mapping[str, str], models: Collection[str]) -> set[str]:
    """What Triton says of some models together; "" for those that it has never loaded."""
    return {states.get(name, "") for name in models}


def lacks_memory(error: InferenceServerException) -> bool:
    """Whether an engine says that there is no room."""
    return any(word in str(error.message()) for word in NO_MEMORY)
