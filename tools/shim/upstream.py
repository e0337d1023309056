"""The gateway's side of Triton: which models it serves, whether they answer, and v2 infer over gRPC.

gRPC, because it alone tells Triton when a caller has gone: cancelled calls leave Triton's queues.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
from grpc import RpcError, aio
from tritonclient.grpc.service_pb2 import ModelConfigRequest, ModelInferRequest, ModelReadyRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub
from tritonclient.utils import InferenceServerException

from build.config import read_config
from build.errors import BuildError
from build.tasks import DOCUMENT_TASKS, Task
from tools.direct import channel_options
from tools.shim.deadline import deadline
from tools.shim.errors import GatewayError, has_gone, is_dead_step, not_ready, quoted, unknown_model
from tools.shim.residency.control import is_missing
from tools.shim.residency.families import is_built, space, steps_of
from tools.shim.residency.loader import Residency
from tools.shim.served_model import Absent, ServedModel
from tools.shim.wire import arrays, asked_of, failure, packed, unpadded

CONFIG_SECONDS = 5.0
"""How long Triton may take to say what a model is."""

PROVEN_SECONDS = 5.0
"""How long an answer proves its model alive."""

PROBE_SECONDS = 60.0
"""How long a probe may take to be answered, behind all callers of a busy model."""

PATIENCE_SECONDS = 2.0
"""How long a probe is waited for before other answers may speak; Triton needs one to tell of a dead step."""

SILENT_SECONDS = 8.0
"""How long a model's steps may answer nobody, while a probe waits, before it counts as hanging."""

AGAIN_SECONDS = 0.5
"""Seconds after which a request whose Triton has gone is sent once more: a load balancer has noticed by then."""

SERVICE_CONFIG: dict[str, Any] = {
    # Each call goes to the next Triton, where the address names several; a connection would stick to one.
    "loadBalancingConfig": [{"round_robin": {}}],
}
"""What gRPC itself does for every call (its service config). It would not retry a call whose answer has begun."""

CHANNEL = [
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    # DNS is asked again this soon when a connection has ended.
    ("grpc.dns_min_time_between_resolutions_ms", 5000),
    # A restarted Triton is found again within a second instead of gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # What an attempt may take, handshake included.
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]


class Upstream:
    """A connection to one Triton server. Use it as an async context manager."""

    def __init__(
        self,
        address: str,
        names: Sequence[str],
        absent: Mapping[str, Absent],
        aliases: Mapping[str, str] | None = None,
        residency: Residency | None = None,
    ) -> None:
        """Of the models `names`, which `residency` loads when they are called; without it they are there or not.

        What is known of those that could not be loaded is in `absent`.
        """
        self.residency = residency
        self.is_stopping = False
        """Whether the gateway has been told to stop, and is to get no more calls."""
        self._address = address
        self._names = names
        self._absent = absent
        self._aliases = aliases or {}
        self._models: dict[str, ServedModel] = {}
        self._answered: dict[str, float] = {}
        """When a model last answered, unless its last call failed."""
        self._heard: dict[str, float] = {}
        """When a step last had its part in an answer."""
        self._probes: dict[str, tuple[asyncio.Task[str | None], float]] = {}
        """The last probe of each model, and when it was sent."""
        self._failed: set[str] = set()
        """Models whose last probe failed: only answers of their own speak for them."""
        self._channel: Any = None
        self._triton: Any = None
        """The calls of Triton's protocol; tritonclient's own classes around them take longer than they do."""

    async def __aenter__(self) -> Upstream:
        self._channel = aio.insecure_channel(self._address, [*CHANNEL, *channel_options(self._address)])
        self._triton = GRPCInferenceServiceStub(self._channel)
        return self

    async def __aexit__(self, *raised: object) -> None:
        for probe, _ in self._probes.values():
            probe.cancel()
        await self._channel.close()

    async def models(self) -> list[ServedModel]:
        """The models that Triton has, in the order they were named; raises GatewayError 503 where it has none."""
        found = await asyncio.gather(*map(self._known, self._names), return_exceptions=True)
        served = [model for model in found if isinstance(model, ServedModel)]
        for problem in found:
            if isinstance(problem, BaseException) and not (served and isinstance(problem, GatewayError)):
                raise problem
        return served

    async def model(self, task: Task, name: str | None) -> ServedModel:
        """The model called `name`, or so by alias or checkpoint's source; else the task's default, the first.

        Raises GatewayError 404 with those there are, and 503 where Triton does not have the model, or one of
        unknown task before the default: calls never go to another model than they would if all were well.
        """
        name = self._aliases.get(name, name) if name else name
        if name is not None and name not in self._names:
            for model in await self.models():
                if model.task == task and model.facts.get("source") == name:
                    return model
        for one in self._names if name is None else {name}.intersection(self._names):
            if name is None and one in self._absent and self._absent[one].task not in (None, task):
                continue
            model = await self._known(one)
            if model.task == task:
                return model
        there_are = ", ".join(model.name for model in await self.models() if model.task == task) or "none"
        asked = f"no model {quoted(name)}" if name else "no model"
        advice = ": `make serve CHAT=1` brings one" if (task, there_are) == ("generate", "none") else ""
        raise unknown_model(f"{asked} for {task}; this server has: {there_are}{advice}{self._built_since(name)}")

    async def named(self, name: str) -> ServedModel:
        """The model of any task called `name`, as `model` finds it; raises GatewayError 404 and 503 as it does."""
        name = self._aliases.get(name, name)
        if name in self._names:
            return await self._known(name)
        served = await self.models()
        for model in served:
            if model.facts.get("source") == name:
                return model
        there_are = ", ".join(model.name for model in served)
        raise unknown_model(f"no model {quoted(name)}; this server has: {there_are}{self._built_since(name)}")

    def _built_since(self, name: str | None) -> str:
        """What serves a model that is there and was not when the server started, or was not to be served."""
        if not name or name in self._names or not self.residency or not is_built(self.residency.repository, name):
            return ""
        return f". {name} is built: start the server again to serve it, with it in --models where that is given"

    async def _known(self, name: str) -> ServedModel:
        """One of the models that are to be served; raises GatewayError 503 where Triton does not have it."""
        if self.residency is not None and not self.residency.is_loaded(name):
            self._models.pop(name, None)  # it may be built anew before it is loaded
        if name not in self._models:
            try:
                self._models[name] = await self._describe(name)
            except (InferenceServerException, BuildError) as error:
                raise not_ready(f"Triton cannot serve {name}: {self._cause(name, error)}") from None
        return self._models[name]

    def use(self, name: str, seconds: float, keep_alive: float | None) -> AbstractAsyncContextManager[float]:
        """Has a model loaded while the context lasts; gives the seconds of waiting for that."""
        return self.residency.use(name, seconds, keep_alive) if self.residency is not None else nullcontext(0.0)

    async def reloaded(self, name: str, error: InferenceServerException, seconds: float) -> bool:
        """Loads the model, within `seconds`, where `error` says that it was gone; returns whether it was."""
        if self.residency is None or not is_missing(error):
            return False
        await self.residency.reload(name, seconds)
        return True

    def _cause(self, name: str, error: InferenceServerException | BuildError | asyncio.TimeoutError) -> str:
        """Why Triton does not have a model: it says so when it starts, and later only that it is unknown."""
        if isinstance(error, asyncio.TimeoutError):
            return f"it has not answered within {PROBE_SECONDS:.0f} s"
        if isinstance(error, BuildError):
            return str(error)
        if name in self._absent and "NOT_FOUND" in (error.status() or ""):
            return self._absent[name].cause
        return str(error.message())

    async def infer(
        self, name: str, texts: Mapping[str, Sequence[bytes]], timeout: float, outputs: Sequence[str] = ()
    ) -> dict[str, npt.NDArray[Any]]:
        """One v2 infer: BYTES [B, 1] for each entry of `texts`, UTF-8; `outputs`, or else all, [B, ...] back.

        Its steps give it up after `timeout` seconds; whoever waits for it is to do the same, by `deadline`.
        It is sent once more where its Triton has gone, which takes its calls along, and where a process of that
        Triton has died, for which it is being ended: another one or the next takes its place. Computing a text
        again is safe.
        """
        return await self._infer_again(name, texts, timeout, outputs, lambda e: has_gone(e) or is_dead_step(e))

    async def _infer_again(
        self,
        name: str,
        texts: Mapping[str, Sequence[bytes]],
        timeout: float,
        outputs: Sequence[str],
        is_worth: Callable[[InferenceServerException], bool],
    ) -> dict[str, npt.NDArray[Any]]:
        """One v2 infer, sent once more where its error is worth it."""
        until = time.monotonic() + timeout
        try:
            return await self._infer(name, texts, timeout, outputs)
        except InferenceServerException as error:
            unloaded = self.residency is not None and is_missing(error)
            if unloaded or not is_worth(error) or until - time.monotonic() < AGAIN_SECONDS:
                raise
        await asyncio.sleep(AGAIN_SECONDS)
        return await self._infer(name, texts, until - time.monotonic(), outputs)

    async def _infer(
        self, name: str, texts: Mapping[str, Sequence[bytes]], timeout: float, outputs: Sequence[str]
    ) -> dict[str, npt.NDArray[Any]]:
        """One v2 infer, sent once."""
        until = time.monotonic() + timeout
        request, trace = asked_of(name, until)
        for tensor_name, values in texts.items():
            request.inputs.add(name=tensor_name, datatype="BYTES", shape=(len(values), 1))
            request.raw_input_contents.append(packed(values))
        for output in outputs:
            request.outputs.add(name=output)
        try:
            answer = await self._triton.ModelInfer(request, metadata=trace)
        except BaseException as error:  # a deadline that passed comes as CancelledError
            self._answered.pop(name, None)  # what it answered before proves nothing any more
            if isinstance(error, RpcError):
                raise failure(error, until) from None
            raise
        tensors = arrays(answer)
        for output, array in tensors.items():
            if array.dtype == np.float32 and np.count_nonzero(np.isfinite(array)) < array.size:
                self._answered.pop(name, None)
                raise InferenceServerException(f"{name} gave {output} that are not finite numbers")
        self._note(name)
        return tensors | unpadded(tensors)

    async def generate(
        self, name: str, inputs: Mapping[str, tuple[str, npt.NDArray[Any]]], timeout: float
    ) -> AsyncGenerator[dict[str, npt.NDArray[Any]], None]:
        """Each response of a decoupled model to inputs of (type, [1, ...]), as it comes; `timeout` as for `infer`.

        A call that is given up is cancelled at Triton, too.
        """
        until = time.monotonic() + timeout
        request, trace = asked_of(name, until)
        for tensor_name, (datatype, array) in inputs.items():
            request.inputs.add(name=tensor_name, datatype=datatype, shape=array.shape)
            raw = packed(array.reshape(-1).tolist()) if datatype == "BYTES" else array.tobytes()
            request.raw_input_contents.append(raw)

        async def requests() -> AsyncIterator[ModelInferRequest]:
            yield request

        # Without this, errors of a stream come as sentences alone.
        metadata = (*trace, ("triton_grpc_error", "true"))
        call = self._triton.ModelStreamInfer(requests(), metadata=metadata)
        try:
            async for response in call:
                if response.error_message:
                    raise InferenceServerException(response.error_message)
                self._note(name)
                yield arrays(response.infer_response)
        except RpcError as error:
            self._answered.pop(name, None)
            raise failure(error, until) from None
        finally:
            call.cancel()

    async def problems(self) -> dict[str, str | None]:
        """Every served model with None when it answers, else why it does not.

        Triton's own readiness stays green when a Python backend's process is dead (triton-inference-server/core
        issue 473), so a model must have answered a text within the last seconds, a caller's or a probe. A probe of
        a busy model waits behind its callers: until it is answered or refused, a step in which others' calls pass
        proves that the model is slow and not dead.
        """
        names = [name for name in self._names if self.residency is None or self.residency.counts(name)]
        found = await asyncio.gather(*map(self._problem, names))
        return dict(zip(names, found, strict=True))

    async def _problem(self, name: str) -> str | None:
        if self.residency is not None and not self.residency.is_loaded(name):
            return self.residency.problem(name)
        if time.monotonic() - self._answered.get(name, -math.inf) < PROVEN_SECONDS:
            return None
        if name not in self._probes or self._probes[name][0].done():
            self._probes[name] = asyncio.create_task(self._probe(name)), time.monotonic()
        probe, sent = self._probes[name]
        await asyncio.wait((probe,), timeout=sent + PATIENCE_SECONDS - time.monotonic())
        while not probe.done():
            heard = self._last_heard(name)
            left = max(sent, heard) + SILENT_SECONDS - time.monotonic()
            if left < 0:
                return f"nothing has been answered for {SILENT_SECONDS:.0f} s"
            if heard > sent:
                return None
            await asyncio.wait((probe,), timeout=min(left, 0.1))
        if self.residency is not None and not self.residency.is_loaded(name):
            return None  # it was unloaded meanwhile
        return probe.result()

    async def _probe(self, name: str) -> str | None:
        """Sends one text, however long it takes; returns what Triton says instead of an answer.

        A dead process is what it looks for, so that is not asked again.
        """
        try:
            if name not in self._models:
                self._models[name] = await self._describe(name)
            async with deadline(PROBE_SECONDS):
                await self._answer(name, self._models[name].task)
        except (InferenceServerException, BuildError, asyncio.TimeoutError) as error:
            self._failed.add(name)
            return self._cause(name, error)
        return None

    async def _answer(self, name: str, task: Task) -> None:
        """Has a model answer one text; raises InferenceServerException where it does not."""
        if task in DOCUMENT_TASKS:
            await self._check_ready(name)
        elif task == "generate":
            async with aclosing(self.generate(name, PROBE, PROBE_SECONDS)) as responses:
                async for _ in responses:
                    pass
        else:
            await self._infer_again(name, PROBES[task], PROBE_SECONDS, (), has_gone)

    async def _check_ready(self, name: str) -> None:
        """Raises InferenceServerException where Triton does not take calls for a model."""
        try:
            answer = await self._triton.ModelReady(ModelReadyRequest(name=name))
        except RpcError as error:
            raise failure(error) from None
        if not answer.ready:
            raise InferenceServerException(f"{name} is not ready")

    def _note(self, name: str) -> None:
        """A model has answered."""
        now = self._answered[name] = time.monotonic()
        self._failed.discard(name)
        if name in self._models:
            self._heard |= dict.fromkeys(self._models[name].steps, now)

    def _last_heard(self, name: str) -> float:
        """When one of a model's steps last had its part in an answer, as far as that speaks for the model."""
        if name in self._failed or name not in self._models:
            return -math.inf
        return max(self._heard.get(step, -math.inf) for step in self._models[name].steps)

    async def _describe(self, name: str) -> ServedModel:
        config = await self._config(name)
        tokenizer = await self._config(steps_of(config)[0])
        graph = space(self.residency.repository, config) if self.residency is not None else None
        return ServedModel.of(name, config, tokenizer, graph)

    async def _config(self, name: str) -> Any:
        """A model's configuration: Triton's, or that of the repository, where it need not be loaded."""
        if self.residency is not None:
            return read_config(self.residency.repository, name)
        try:
            return (await self._triton.ModelConfig(ModelConfigRequest(name=name), timeout=CONFIG_SECONDS)).config
        except RpcError as error:
            raise failure(error) from None


PROBES: dict[Task, dict[str, list[bytes]]] = {
    "embed": {"text": [b"ready?"]},
    "embed_all": {"text": [b"ready?"]},
    "embed_sparse": {"text": [b"ready?"]},
    "rerank": {"query": [b"ready?"], "passage": [b"ready."]},
    "classify": {"text": [b"ready?"]},
}

PROBE = {
    "text_input": ("BYTES", np.array([[b"ready?"]], np.object_)),
    "max_tokens": ("INT32", np.array([[1]], np.int32)),
}
"""The same for a model that writes."""
