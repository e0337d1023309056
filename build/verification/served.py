"""A family on a running Triton, asked over gRPC as its users ask it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from build.errors import BuildError
from build.tasks import TASKS, Task
from build.verification.references.loading import Pair
from tools.direct import channel_options

REQUEST = 8
"""Texts in one request."""
CLIENTS = 8
"""Requests at once."""
VERIFIED: tuple[Task, ...] = ("rerank", "classify", "embed_all", "embed_sparse", "embed")
"""Tasks that have a reference."""
FILLING = {"indices": -1}
"""What shorter rows of an output are filled up with, where it is not 0."""


class Served:
    """A family on a running Triton; raises BuildError when it cannot be asked."""

    def __init__(self, url: str, family: str) -> None:
        self._client = InferenceServerClient(url, channel_args=channel_options(url))
        self._url = url
        self.family = family
        config = self._ask(lambda: self._client.get_model_config(family)).config
        self._outputs = [tensor.name for tensor in config.output]
        self._facts = {name: value.string_value for name, value in config.parameters.items()}
        steps = list(config.ensemble_scheduling.step)
        tokenizers = [step.model_name for step in steps if step.model_name.endswith("-tokenizer")]
        self._tokenizer: Any = None
        if tokenizers:
            self._tokenizer = self._ask(lambda: self._client.get_model_config(tokenizers[0])).config
        self.is_two_sided = len(tokenizers) > 1
        self.has_vectors = any("token_embeddings" in step.output_map for step in steps)
        self._batch = min(REQUEST, config.max_batch_size)

    @property
    def kind(self) -> str:
        """What it does, in the catalog's words; raises BuildError where it does none of that."""
        for task in VERIFIED:
            if TASKS[task].output in self._outputs:
                return task
        raise BuildError(
            f"{self.family!r} gives {', '.join(self._outputs)}, so it neither embeds nor scores texts"
        )

    @property
    def adapter(self) -> str | None:
        """The task whose adapter is in its weights, None for none."""
        return self._facts.get("adapter")

    @property
    def prompts(self) -> dict[str, str]:
        """Prompt name -> what it puts before a text."""
        found: dict[str, str] = json.loads(self._parameters.get("prompts", "{}"))
        return found

    @property
    def server(self) -> str:
        """Name and version of the server."""
        metadata = self._ask(self._client.get_server_metadata)
        return f"{metadata.name} {metadata.version}"

    def parameter(self, name: str) -> int:
        """A number among the tokenizer's parameters, 0 where there is none."""
        return int(self._parameters.get(name, 0))

    @property
    def _parameters(self) -> dict[str, str]:
        if self._tokenizer is None:
            return {}
        return {name: value.string_value for name, value in self._tokenizer.parameters.items()}

    def answer(self, **columns: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """The family's outputs [n, ...] for BYTES inputs of n texts each."""
        parts = self._infer(self.family, columns)
        return {name: _joined([part[name] for part in parts], FILLING.get(name, 0)) for name in parts[0]}

    def embeddings(self, texts: Sequence[str], prompt: str) -> npt.NDArray[np.float32]:
        """Of texts behind the prompt of that name, or behind none."""
        columns = {"prompt_name": [prompt] * len(texts)} if prompt else {}
        return self.answer(text=texts, **columns)["embeddings"]

    def scores(self, pairs: Sequence[Pair]) -> npt.NDArray[np.float32]:
        """Of (query, passage)."""
        queries, passages = zip(*pairs, strict=True)
        return self.answer(query=queries, passage=passages)["score"][:, 0]

    def token_ids(self, **columns: Sequence[str]) -> list[list[int]] | None:
        """What the tokenizer step makes of the same inputs, or None where it is not asked for both at once."""
        if self._tokenizer is None or self.is_two_sided:
            return None
        parts = self._infer(self._tokenizer.name, columns)
        # One stands for no token at all.
        none = {self.parameter("nothing")} - {0}
        return [
            [i for i in row.tolist() if i >= 0 and i not in none] for part in parts for row in part["input_ids"]
        ]

    def _infer(self, model: str, columns: dict[str, Sequence[str]]) -> list[dict[str, npt.NDArray[Any]]]:
        # Several at once, so that Triton merges requests as it does for users.
        with ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(lambda part: self._request(model, part), _parts(columns, self._batch)))

    def _request(self, model: str, columns: dict[str, Sequence[str]]) -> dict[str, npt.NDArray[Any]]:
        inputs = []
        for name, values in columns.items():
            array = np.array([[value.encode()] for value in values], np.object_)
            inputs.append(InferInput(name, array.shape, "BYTES").set_data_from_numpy(array))
        result = self._ask(lambda: self._client.infer(model, inputs))
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except InferenceServerException as error:
            if error.status() == "StatusCode.UNAVAILABLE":
                raise BuildError(
                    f"no server answers at {self._url}: start one with `make serve MODEL={self.family}`, or name "
                    "another with --url"
                ) from None
            raise BuildError(f"the server at {self._url} says: {error.message()}") from None


def _joined(parts: Sequence[npt.NDArray[Any]], filling: int) -> npt.NDArray[Any]:
    """One array; of the answers' rows, those that happen to be shorter are filled up."""
    width = max(part.shape[1] for part in parts)
    filled = []
    for part in parts:
        rest = [(0, 0), (0, width - part.shape[1]), *[(0, 0)] * (part.ndim - 2)]
        filled.append(np.pad(part, rest, constant_values=filling))
    return np.concatenate(filled)


def _parts(columns: dict[str, Sequence[str]], size: int) -> list[dict[str, Sequence[str]]]:
    count = len(next(iter(columns.values())))
    return [{n: values[i : i + size] for n, values in columns.items()} for i in range(0, count, size)]
