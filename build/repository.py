"""Renders config.pbtxt files through Triton's own ModelConfig protobuf: every tensor of a family is declared here.

Names follow NVIDIA NIM's (`text`, `query`, `passage`, `embeddings`, `token_count`). Every model batches; shapes
below leave the batch dimension out, as config.pbtxt does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import (
    TYPE_BOOL,
    TYPE_FP32,
    TYPE_INT32,
    TYPE_STRING,
    BatchInput,
    BatchOutput,
    ModelConfig,
    ModelEnsembling,
    ModelInput,
    ModelInstanceGroup,
    ModelOutput,
)

MAX_BATCH_SIZE = 64
"""Texts in one batch: bounds the hidden states that pass through shared memory at once."""

TOKEN_BUDGET = 512
"""Tokens in one engine call: larger calls gain nothing on a CPU and leave less to share among its cores."""


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
PROMPT_NAME = Tensor("prompt_name", TYPE_STRING, optional=True)
QUERY = Tensor("query", TYPE_STRING)
PASSAGE = Tensor("passage", TYPE_STRING)
INSTRUCTION = Tensor("instruction", TYPE_STRING, optional=True)
INPUT_IDS = Tensor("input_ids", TYPE_INT32, (-1,), ragged=True)
TOKEN_COUNT = Tensor("token_count", TYPE_INT32)
TRUNCATED = Tensor("truncated", TYPE_BOOL)
SCORE = Tensor("score", TYPE_FP32)
LOGIT = Tensor("logit", TYPE_FP32)


def render(config: ModelConfig) -> str:
    """The text of a config.pbtxt file."""
    text: str = text_format.MessageToString(config)
    return text


def tokenizer(family: str, max_tokens: int, prompts: Mapping[str, str]) -> ModelConfig:
    """`<family>-tokenizer`: text -> input_ids, token_count, truncated."""
    return _python_model(
        f"{family}-tokenizer",
        inputs=[TEXT, PROMPT_NAME],
        outputs=[INPUT_IDS, TOKEN_COUNT, TRUNCATED],
        parameters={"max_tokens": str(max_tokens), "prompts": json.dumps(dict(prompts))},
    )


def pair_tokenizer(family: str, max_tokens: int, segment_offset: int) -> ModelConfig:
    """`<family>-tokenizer` of a cross-encoder: query, passage -> input_ids, token_count, truncated."""
    return _python_model(
        f"{family}-tokenizer",
        inputs=[QUERY, PASSAGE],
        outputs=[INPUT_IDS, TOKEN_COUNT, TRUNCATED],
        parameters={"max_tokens": str(max_tokens), "segment_offset": str(segment_offset)},
    )


def template_tokenizer(family: str, max_tokens: int, template: Mapping[str, str]) -> ModelConfig:
    """`<family>-tokenizer` of a reranker that is asked: query, passage, instruction -> input_ids, ..."""
    return _python_model(
        f"{family}-tokenizer",
        inputs=[QUERY, PASSAGE, INSTRUCTION],
        outputs=[INPUT_IDS, TOKEN_COUNT, TRUNCATED],
        parameters={"max_tokens": str(max_tokens), "template": json.dumps(dict(template))},
    )


def encoder(family: str, hidden_size: int) -> ModelConfig:
    """`<family>-encoder`: ragged input_ids -> last_hidden_state [-1, H]."""
    config = _python_model(
        f"{family}-encoder",
        inputs=[INPUT_IDS],
        outputs=[Tensor("last_hidden_state", TYPE_FP32, (-1, hidden_size))],
        parameters=_engine("auto", "auto", TOKEN_BUDGET),
    )
    _add_item_lengths(config)
    config.batch_output.add(
        kind=BatchOutput.BATCH_SCATTER_WITH_INPUT_SHAPE,
        target_name=["last_hidden_state"],
        source_input=[INPUT_IDS.name],
    )
    return config


def headless_encoder(family: str, dimensions: int | None) -> ModelConfig:
    """`<family>-encoder` that pools or scores by itself: ragged input_ids -> embeddings [D], or score, logit."""
    config = _python_model(
        f"{family}-encoder",
        inputs=[INPUT_IDS],
        outputs=[SCORE, LOGIT] if dimensions is None else [Tensor("embeddings", TYPE_FP32, (dimensions,))],
        parameters=_engine("auto", "auto", TOKEN_BUDGET),
    )
    _add_item_lengths(config)
    return config


def pooling(family: str, hidden_size: int, dimensions: int) -> ModelConfig:
    """`<family>-pooling`: ragged last_hidden_state and input_ids -> embeddings [D]."""
    config = _python_model(
        f"{family}-pooling",
        inputs=[_states(hidden_size), INPUT_IDS],
        outputs=[Tensor("embeddings", TYPE_FP32, (dimensions,))],
        parameters=_engine("fp32", "1", TOKEN_BUDGET),
    )
    _add_item_lengths(config)
    return config


def scoring(family: str, hidden_size: int) -> ModelConfig:
    """`<family>-scoring`: ragged last_hidden_state and input_ids -> score, logit."""
    config = _python_model(
        f"{family}-scoring",
        inputs=[_states(hidden_size), INPUT_IDS],
        outputs=[SCORE, LOGIT],
        parameters=_engine("fp32", "1", TOKEN_BUDGET),
    )
    _add_item_lengths(config)
    return config


def cosine_scoring(family: str, dimensions: int) -> ModelConfig:
    """`<family>-rerank-scoring`: the embeddings of query and passage -> score, logit."""
    inputs = [
        Tensor(f"{side}_{tensor.name}", tensor.data_type, tensor.dims)
        for tensor in (Tensor("embeddings", TYPE_FP32, (dimensions,)), TOKEN_COUNT, TRUNCATED)
        for side in ("query", "passage")
    ]
    return _python_model(
        f"{family}-rerank-scoring",
        inputs=inputs,
        outputs=[SCORE, LOGIT, TOKEN_COUNT, TRUNCATED],
        parameters=_engine("fp32", "1", TOKEN_BUDGET),
    )


def embed_ensemble(family: str, dimensions: int) -> ModelConfig:
    """`<family>`: text -> embeddings, token_count, truncated."""
    outputs = [Tensor("embeddings", TYPE_FP32, (dimensions,)), TOKEN_COUNT, TRUNCATED]
    config = _ensemble(family, [TEXT, PROMPT_NAME], outputs)
    steps = config.ensemble_scheduling.step
    steps.extend(_embedding_steps(family, text="text", prefix="", prompt_name="prompt_name"))
    return config


def rerank_ensemble(family: str, template: bool) -> ModelConfig:
    """`<family>`: query, passage, with a template also instruction -> score, logit, token_count, truncated."""
    inputs = [QUERY, PASSAGE, INSTRUCTION] if template else [QUERY, PASSAGE]
    outputs = [SCORE, LOGIT, TOKEN_COUNT, TRUNCATED]
    config = _ensemble(family, inputs, outputs)

    def same(tensors: Sequence[Tensor]) -> dict[str, str]:
        return {tensor.name: tensor.name for tensor in tensors}

    states = {"last_hidden_state": "last_hidden_state"}
    config.ensemble_scheduling.step.extend(
        [
            _step(f"{family}-tokenizer", same(inputs), same([INPUT_IDS, TOKEN_COUNT, TRUNCATED])),
            _step(f"{family}-encoder", same([INPUT_IDS]), states),
            _step(f"{family}-scoring", states | same([INPUT_IDS]), same([SCORE, LOGIT])),
        ]
    )
    return config


def headless_ensemble(tokenizer: ModelConfig, encoder: ModelConfig) -> ModelConfig:
    """`<family>` of an encoder that pools or scores by itself: the tokenizer's inputs -> the outputs of both."""
    config = ModelConfig(
        name=tokenizer.name.removesuffix("-tokenizer"),
        platform="ensemble",
        max_batch_size=MAX_BATCH_SIZE,
        input=tokenizer.input,
        output=[*encoder.output, *(tensor for tensor in tokenizer.output if tensor.name != INPUT_IDS.name)],
    )
    config.ensemble_scheduling.step.extend(
        _step(
            model.name,
            {tensor.name: tensor.name for tensor in model.input},
            {tensor.name: tensor.name for tensor in model.output},
        )
        for model in (tokenizer, encoder)
    )
    return config


def bi_encoder_ensemble(family: str) -> ModelConfig:
    """`<family>-rerank`, a bi-encoder: query, passage -> score, logit, token_count, truncated.

    The embedding family's own models are the steps, once for the query and once for the passage.
    """
    config = _ensemble(f"{family}-rerank", [QUERY, PASSAGE], [SCORE, LOGIT, TOKEN_COUNT, TRUNCATED])
    steps = config.ensemble_scheduling.step
    for side in ("query", "passage"):
        steps.extend(_embedding_steps(family, text=side, prefix=f"{side}_"))
    scoring = [
        f"{side}_{name}" for name in ("embeddings", "token_count", "truncated") for side in ("query", "passage")
    ]
    steps.append(
        _step(
            f"{family}-rerank-scoring",
            {name: name for name in scoring},
            {name: name for name in ("score", "logit", "token_count", "truncated")},
        )
    )
    return config


def _embedding_steps(
    family: str, text: str, prefix: str, prompt_name: str | None = None
) -> list[ModelEnsembling.Step]:
    """Tokenizer, encoder and pooling over the ensemble tensor `text`; results are named with `prefix`."""
    ids, states = f"{prefix}input_ids", f"{prefix}last_hidden_state"
    tokenized = {"input_ids": ids} | {n: f"{prefix}{n}" for n in ("token_count", "truncated")}
    prompt = {"prompt_name": prompt_name} if prompt_name else {}
    return [
        _step(f"{family}-tokenizer", {"text": text} | prompt, tokenized),
        _step(f"{family}-encoder", {"input_ids": ids}, {"last_hidden_state": states}),
        _step(
            f"{family}-pooling",
            {"last_hidden_state": states, "input_ids": ids},
            {"embeddings": f"{prefix}embeddings"},
        ),
    ]


def _python_model(
    name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], parameters: Mapping[str, str]
) -> ModelConfig:
    config = ModelConfig(
        name=name,
        backend="python",
        max_batch_size=MAX_BATCH_SIZE,
        input=[tensor.as_input() for tensor in inputs],
        output=[tensor.as_output() for tensor in outputs],
        instance_group=[ModelInstanceGroup(count=1, kind=ModelInstanceGroup.KIND_CPU)],
    )
    # No queue delay: while one batch runs, the next one gathers by itself.
    config.dynamic_batching.SetInParent()
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return config


def _states(hidden_size: int) -> Tensor:
    return Tensor("last_hidden_state", TYPE_FP32, (-1, hidden_size), ragged=True)


def _engine(precision: str, threads: str, token_budget: int) -> dict[str, str]:
    return {"precision": precision, "threads": threads, "token_budget": str(token_budget)}


def _add_item_lengths(config: ModelConfig) -> None:
    config.batch_input.add(
        kind=BatchInput.BATCH_ITEM_SHAPE_FLATTEN,
        target_name=["lengths"],
        data_type=TYPE_INT32,
        source_input=[INPUT_IDS.name],
    )


def _ensemble(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> ModelConfig:
    return ModelConfig(
        name=name,
        platform="ensemble",
        max_batch_size=MAX_BATCH_SIZE,
        input=[tensor.as_input() for tensor in inputs],
        output=[tensor.as_output() for tensor in outputs],
    )


def _step(model: str, input_map: Mapping[str, str], output_map: Mapping[str, str]) -> ModelEnsembling.Step:
    return ModelEnsembling.Step(model_name=model, model_version=-1, input_map=input_map, output_map=output_map)
