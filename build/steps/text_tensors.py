"""The tensors around the tokenizer: a request's strings, and the rows of its answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

NO_TOKEN = -1

INPUT_TYPES = {"query": "query", "passage": "document"}
"""NIM's `input_type` -> prompt name."""


class BadRequestError(ValueError):
    """The request cannot be tokenized; the message says which text and why."""


@dataclass(frozen=True)
class Row:
    """One row of ids."""

    ids: list[int]
    truncated: bool
    kept: list[int]
    """Its ids, and -1 for those whose vectors are not kept."""
    count: int
    """How many ids it is said to have."""


def token_descriptions(described: list[bytes]) -> Any:
    """`tokens` BYTES [b, 1] of each text's JSON."""
    return pb_utils.Tensor("tokens", np.array(described, np.object_)[:, None])


def is_sent(request: Any, name: str) -> bool:
    """Whether the request has the optional tensor `name`."""
    return pb_utils.get_input_tensor_by_name(request, name) is not None


def strings(request: Any, name: str) -> list[str]:
    """The tensor `name` as text; [] when an optional one was not sent."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return []
    texts = []
    for i, value in enumerate(tensor.as_numpy().reshape(-1)):
        try:
            text = value.decode()
        except UnicodeDecodeError as error:
            raise BadRequestError(f"{name}[{i}] is not valid UTF-8: {error.reason}") from None
        if name in ("query", "instruction") and not text.strip():
            raise BadRequestError(f"{name}[{i}] is empty")
        texts.append(text)
    return texts


def prompt_of_input_type(request: Any) -> str:
    """The prompt name that the request's parameters ask for, "" if they ask for none."""
    parameters = request.parameters()
    input_type = json.loads(parameters).get("input_type", "") if "input_type" in parameters else ""
    if input_type and input_type not in INPUT_TYPES:
        raise BadRequestError(f"input_type {input_type!r} is unknown: it is one of {', '.join(INPUT_TYPES)}")
    return INPUT_TYPES.get(input_type, "")


def _filled_up(rows: Sequence[list[int]]) -> npt.NDArray[np.int32]:
    """INT32 [b, S], shorter rows filled up with NO_TOKEN."""
    if len(rows) == 1:
        return np.array(rows, np.int32)
    lengths = np.array([len(row) for row in rows])
    ids: npt.NDArray[np.int32] = np.full((len(rows), lengths.max()), NO_TOKEN, np.int32)
    ids[np.arange(ids.shape[1]) < lengths[:, None]] = list(chain.from_iterable(rows))
    return ids


def row_tensors(rows: list[Row], has_sides: bool) -> list[Any]:
    """`input_ids` INT32 [b, S], `token_count` `truncated` [b, 1]; where a model has sides, `kept_ids` [b, S]."""
    kept = [pb_utils.Tensor("kept_ids", _filled_up([row.kept for row in rows]))] if has_sides else []
    return [
        *kept,
        pb_utils.Tensor("input_ids", _filled_up([row.ids for row in rows])),
        pb_utils.Tensor("token_count", np.array([[row.count] for row in rows], np.int32)),
        pb_utils.Tensor("truncated", np.array([[row.truncated] for row in rows])),
    ]
