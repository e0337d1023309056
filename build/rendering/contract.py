"""The tensors of a family's models, and what the models have in common.

Names follow NVIDIA NIM's (`text`, `query`, `passage`, `embeddings`, `token_count`). Every model batches, so shapes
leave the batch dimension out, as config.pbtxt does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tritonclient.grpc.model_config_pb2 import (
    TYPE_BOOL,
    TYPE_FP32,
    TYPE_INT32,
    TYPE_STRING,
    ModelConfig,
    ModelInput,
    ModelOutput,
)

from build.target import Target


@dataclass(frozen=True)
class Tensor:
    """An input or output of a model."""

    name: str
    data_type: int
    dims: Sequence[int] = (1,)
    ragged: bool = False
    optional: bool = False

    def as_input(self) -> ModelInput:
        """The tensor as a `ModelInput`."""
        return ModelInput(
            name=self.name,
            data_type=self.data_type,
            dims=self.dims,
            allow_ragged_batch=self.ragged,
            optional=self.optional,
        )

    def as_output(self) -> ModelOutput:
        """The tensor as a `ModelOutput`."""
        return ModelOutput(name=self.name, data_type=self.data_type, dims=self.dims)


TEXT = Tensor("text", TYPE_STRING)
TEXT_PAIR = Tensor("text_pair", TYPE_STRING, optional=True)
PROMPT_NAME = Tensor("prompt_name", TYPE_STRING, optional=True)
QUERY = Tensor("query", TYPE_STRING)
PASSAGE = Tensor("passage", TYPE_STRING)
INSTRUCTION = Tensor("instruction", TYPE_STRING, optional=True)
INPUT_IDS = Tensor("input_ids", TYPE_INT32, (-1,), ragged=True)
KEPT_IDS = Tensor("kept_ids", TYPE_INT32, (-1,), ragged=True)
VECTOR_COUNT = Tensor("vector_count", TYPE_INT32)
TOKEN_COUNT = Tensor("token_count", TYPE_INT32)
TRUNCATED = Tensor("truncated", TYPE_BOOL)
TOKENS = Tensor("tokens", TYPE_STRING)
SCORE = Tensor("score", TYPE_FP32)
LOGIT = Tensor("logit", TYPE_FP32)
SPARSE = (Tensor("indices", TYPE_INT32, (-1,)), Tensor("values", TYPE_FP32, (-1,)))


def token_embeddings(dimensions: int) -> Tensor:
    """The vectors of a text's tokens, each of so many dimensions."""
    return Tensor("token_embeddings", TYPE_FP32, (-1, dimensions))


def classes(labels: int) -> list[Tensor]:
    """What a classifier of so many labels gives."""
    return [Tensor(name, TYPE_FP32, (labels,)) for name in ("probabilities", "logits")]


@dataclass(frozen=True)
class Family:
    """What the models of one family have in common."""

    name: str
    target: Target
    hidden_size: int
    max_tokens: int
    """The longest text."""
    vocabulary: int
    """Token ids that the encoder has vectors for, from 0."""
    extra_ids: int
    """Number of legal ids from `vocabulary` on: a pair's second text, tokens that none sees, or the row of a text
    without tokens."""
    max_batch_size: int
    """Texts in one batch: bounds the hidden states that pass from encoder to head at once."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What callers may want to know of the checkpoint, kept in the ensemble's parameters."""


def add_parameters(config: ModelConfig, parameters: Mapping[str, str]) -> None:
    """Adds parameters to a model's configuration, over those of the same key."""
    for key, value in parameters.items():
        config.parameters[key].string_value = value
