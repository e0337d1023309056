"""One graph on batches of texts: how it is fed, and what its results must be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from tritonclient.grpc.model_config_pb2 import BatchInput, DataType, ModelConfig
from tritonclient.utils import triton_to_np_dtype

from build.check.engines import NO_TOKEN, Array, Engine
from build.errors import BuildError

Batch: TypeAlias = "list[Array]"
"""The ids of each text."""

MIDDLE = 48
"""Tokens of the longest text among unlike ones."""

RESULTS = ("embeddings", "logit", "probabilities", "values", "token_embeddings")


def run(
    engine: type[Engine],
    path: Path,
    config: ModelConfig,
    batches: Sequence[Batch],
    found: Sequence[dict[str, Array]],
) -> None:
    """Runs one graph on every batch, fed with what the graphs before it have `found`, and adds what it gives."""
    cannot = f"{config.name} cannot be run by {engine.title}"
    try:
        graph = engine(path)
    except Exception as error:  # each engine has its own
        raise BuildError(f"{cannot}: {cause(error)}") from None
    for batch, tensors in zip(batches, found, strict=True):
        tokens = f"{' and '.join(str(len(row)) for row in batch)} tokens"
        try:
            given = graph.run(feed_of(config, batch, tensors))
        except Exception as error:
            raise BuildError(f"{cannot} with texts of {tokens}: {cause(error)}") from None
        for output in config.output:
            values = given[output.name]
            rows = len(batch)
            if output.name == "last_hidden_state":
                rows = sum(map(len, batch))
            elif output.dims[0] == NO_TOKEN:  # as many for each text as that with most has
                rows *= values.shape[1]
            size = rows * math.prod(dim for dim in output.dims if dim > 0)
            if values.size != size:
                raise BuildError(
                    f"{config.name} gives {output.name} {list(values.shape)} for {tokens}, not {size}"
                )
            if not np.isfinite(values).all():
                raise BuildError(f"{config.name} gives {output.name} that are not finite numbers for {tokens}")
            tensors[output.name] = values


def run_zeros(engine: type[Engine], path: Path, config: ModelConfig) -> None:
    """Runs a graph that is fed no text on one item of zeros."""
    feed = {}
    for tensor in config.input:
        dtype = triton_to_np_dtype(DataType.Name(tensor.data_type).removeprefix("TYPE_"))
        feed[tensor.name] = np.zeros((1, *tensor.dims), dtype)
    try:
        given = engine(path).run(feed)
    except Exception as error:  # each engine has its own
        raise BuildError(f"{config.name} cannot be run by {engine.title}: {cause(error)}") from None
    for output in config.output:
        found, wanted = given[output.name], [1, *output.dims]
        if found.ndim != len(wanted) or any(
            -1 != size != there for size, there in zip(wanted, found.shape, strict=True)
        ):
            raise BuildError(f"{config.name} gives {output.name} {list(found.shape)}, not {wanted}")
        if not np.isfinite(found).all():
            raise BuildError(f"{config.name} gives {output.name} that are not finite numbers")


def feed_of(config: ModelConfig, batch: Batch, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """A batch as the runtime of `config` hands it over."""
    lengths = np.array([len(row) for row in batch], np.int32)
    made = {
        BatchInput.BATCH_ITEM_SHAPE_FLATTEN: lengths,
        BatchInput.BATCH_MAX_ELEMENT_COUNT_AS_SHAPE: np.zeros(lengths.max(), np.int32),
    }
    feed = {name: made[entry.kind] for entry in config.batch_input for name in entry.target_name}
    for tensor in config.input:
        if tensor.name in ("input_ids", "kept_ids"):
            feed[tensor.name] = np.concatenate(batch) if tensor.allow_ragged_batch else np.stack(batch)
        elif tensor.name == "last_hidden_state":
            states = tensors[tensor.name]
            feed[tensor.name] = states.reshape(-1) if tensor.allow_ragged_batch else states
        else:
            dtype = triton_to_np_dtype(DataType.Name(tensor.data_type).removeprefix("TYPE_"))
            feed[tensor.name] = np.ones((len(batch), *(abs(size) for size in tensor.dims)), dtype)
    return feed


def batches_of(ids: Array, padded: bool) -> Iterator[Batch]:
    """The first token alone, a text alone, both and half of that text together, and all `ids`.

    Where texts of one request come `padded`, their slots without a token are there.
    """
    middle = ids[:MIDDLE]
    yield [ids[:1]]
    yield [middle]
    unlike = [ids[:1], middle[: max(1, len(middle) // 2)], middle]
    if padded:
        unlike = [np.pad(row, (0, len(middle) - len(row)), constant_values=NO_TOKEN) for row in unlike]
    yield unlike
    yield [ids]


def compare(family: str, found: Sequence[Mapping[str, Array]], least: float) -> None:
    """Raises BuildError unless two texts have, beside others, what they have alone."""
    first, middle, together, _ = found
    for name in RESULTS:
        if name not in together:
            continue
        for one, i in ((first, 0), (middle, 2)):
            alone, beside = one[name][0], together[name][i]
            if name == "values":
                alone, beside = _opened(one["indices"][0], alone), _opened(together["indices"][i], beside)
            if name == "token_embeddings":
                alone, beside = alone.ravel(), beside[: len(alone)].ravel()
            likeness = 1 - abs(_share(alone) - _share(beside)) if name == "logit" else _cosine(alone, beside)
            if likeness < least:
                raise BuildError(
                    f"{family} gives a text other {name} beside longer texts than alone: they agree to "
                    f"{likeness:.4f}, and at least {least} is required"
                )


def _opened(indices: Array, values: Array) -> Array:
    """A sparse vector as one of all places that a vocabulary may have."""
    dense = np.zeros(1 << 20, np.float32)
    dense[indices[indices >= 0]] = values[indices >= 0]
    return dense


def _share(logit: Array) -> float:
    """The score that a logit makes, in 0..1."""
    return float(1 / (1 + np.exp(-logit[0])))


def _cosine(a: Array, b: Array) -> float:
    """1 for equal vectors, zeros included."""
    return 1.0 if (a == b).all() else float(a @ b / max(1e-12, float(np.linalg.norm(a) * np.linalg.norm(b))))


def cause(error: Exception) -> str:
    """The end of the engine's message, in one line; before it come the places in its sources."""
    return " ".join(str(error).split())[-300:]
