"""Tokenizer step (Python backend): text in, unpadded token ids out.

Inputs   text BYTES [b, 1]; prompt_name BYTES [b, 1], optional, the name of a prompt to put before the text
Outputs  input_ids INT32 [b, S], special tokens included; S is the longest row of this request and shorter rows
         are filled with -1, which is no token id, so no attention mask travels
         token_count INT32 [b, 1], ids in the row; truncated BOOL [b, 1], whether the text was cut to fit
Errors   INVALID_ARG, for the one request at fault: text that is not UTF-8 or holds no token, unknown prompt_name

Model parameters: `max_tokens`, the longest row; `prompts`, a JSON object of prompt name -> prefix.
`tokenizer.json` lies in the version folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# One thread: tokenizing is about 1 % of the work and its own thread pool would fight the engine's.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import triton_python_backend_utils as pb_utils
from tokenizers import Encoding, Tokenizer

NO_TOKEN = -1


class BadRequestError(ValueError):
    """The request cannot be tokenized; the message says which text and why."""


class TritonPythonModel:
    """Tokenizes all texts of a dynamic batch in one call."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads `tokenizer.json` and sets truncation; padding is off whatever the file says."""
        parameters = json.loads(args["model_config"])["parameters"]
        folder = Path(args["model_repository"], args["model_version"])
        self._prompts: dict[str, str] = json.loads(parameters["prompts"]["string_value"])
        file = folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"{file} cannot be read, build the family again: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(int(parameters["max_tokens"]["string_value"]))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers every request; a bad one fails alone."""
        texts: list[str] = []
        counts: list[int | BadRequestError] = []
        for request in requests:
            try:
                own = list(self._texts(request))
                texts += own
                counts.append(len(own))
            except BadRequestError as error:
                counts.append(error)
        encodings = iter(self._tokenizer.encode_batch_fast(texts))
        return [self._response(count, encodings) for count in counts]

    def _texts(self, request: Any) -> Iterator[str]:
        """The request's texts, each behind its prompt."""
        texts = _strings(request, "text")
        names = _strings(request, "prompt_name") or [""] * len(texts)
        for text, name in zip(texts, names, strict=True):
            if not text.strip():
                raise BadRequestError(f"text {text[:20]!r} is empty")
            if name and name not in self._prompts:
                known = ", ".join(sorted(self._prompts))
                raise BadRequestError(f"prompt_name {name!r} is unknown: this model has {known}")
            yield self._prompts.get(name, "") + text

    def _response(self, count: int | BadRequestError, encodings: Iterator[Encoding]) -> Any:
        try:
            if isinstance(count, BadRequestError):
                raise count
            rows = [next(encodings) for _ in range(count)]
            return pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, array) for name, array in _tensors(rows).items()]
            )
        except BadRequestError as error:
            message = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=message)


def _strings(request: Any, name: str) -> list[str]:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return []
    values = tensor.as_numpy().reshape(-1)
    try:
        return [value.decode() for value in values]
    except UnicodeDecodeError as error:
        raise BadRequestError(f"{name} is not valid UTF-8: {error.reason}") from None


def _tensors(rows: list[Encoding]) -> dict[str, npt.NDArray[Any]]:
    if any(all(row.special_tokens_mask) for row in rows):
        raise BadRequestError("a text is empty: the tokenizer keeps none of its characters")
    lengths = [len(row) for row in rows]
    input_ids = np.full((len(rows), max(lengths)), NO_TOKEN, np.int32)
    for i, row in enumerate(rows):
        input_ids[i, : lengths[i]] = row.ids
    return {
        "input_ids": input_ids,
        "token_count": np.array(lengths, np.int32)[:, None],
        "truncated": np.array([[bool(row.overflowing)] for row in rows]),
    }
