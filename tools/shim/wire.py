"""Requests and answers of Triton's protocol as they travel: protobuf on one side, numpy's arrays on the other."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from grpc import StatusCode
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse
from tritonclient.utils import InferenceServerException, deserialize_bytes_tensor

from tools.shim import tracing

BROKEN = re.compile("Stream removed|Received RST_STREAM")
"""How gRPC begins to tell of an answer that broke off on its way, which it calls an unknown or internal error."""

BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
"""Id of this machine's boot, whose processes share its monotonic clock."""


def asked_of(name: str, until: float) -> tuple[ModelInferRequest, tuple[tuple[str, str], ...]]:
    """A request to a model, without inputs yet, and the metadata that goes with it; nobody waits after `until`."""
    origin = tracing.current.get()
    request = ModelInferRequest(model_name=name, id=origin.request_id)
    # For steps on this machine, which Triton does not tell that a caller has gone: see build/steps.
    request.parameters["deadline"].string_param = f"{BOOT_ID} {until:.3f}"
    return request, (*origin.trace.items(),)


def packed(values: Sequence[bytes]) -> bytes:
    """A BYTES tensor as it travels: each value behind its length."""
    return b"".join([part for value in values for part in (len(value).to_bytes(4, "little"), value)])


def arrays(answer: ModelInferResponse) -> dict[str, npt.NDArray[Any]]:
    """The tensors of an answer, by name."""
    found = {}
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        is_text = output.datatype == "BYTES"
        flat = deserialize_bytes_tensor(raw) if is_text else np.frombuffer(raw, DTYPES[output.datatype])
        found[output.name] = flat.reshape(output.shape)
    return found


def failure(error: Any, until: float = math.inf) -> InferenceServerException:
    """What Triton or the way to it says, as tritonclient's own calls raise it.

    After `until` it is that the deadline has passed, in which way ever the call ended: a step that sees it first
    gives the call up.
    """
    code = StatusCode.UNAVAILABLE if BROKEN.match(error.details() or "") else error.code()
    code = StatusCode.DEADLINE_EXCEEDED if time.monotonic() >= until else code
    return InferenceServerException(error.details(), str(code), error.debug_error_string())


def unpadded(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """The tensors whose rows are filled up to the longest of a request, as objects [B, 1] without the filling."""
    if "token_embeddings" in tensors:
        counted = zip(tensors["token_embeddings"], tensors["vector_count"][:, 0], strict=True)
        return {"token_embeddings": of_rows([row[:count] for row, count in counted])}
    if "indices" not in tensors:
        return {}
    real = tensors["indices"] >= 0
    return {name: of_rows([row[own] for row, own in zip(tensors[name], real, strict=True)]) for name in SPARSE}


def of_rows(rows: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Arrays of any shapes as objects [B, 1]."""
    objects = np.empty((len(rows), 1), np.object_)
    for i, row in enumerate(rows):
        objects[i, 0] = row
    return objects


SPARSE = ("indices", "values")

DTYPES = {"BOOL": np.bool_, "INT32": np.int32, "UINT32": np.uint32, "FP32": np.float32}
"""What tensors that callers get are made of, text aside."""
