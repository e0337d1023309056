"""Renders config.pbtxt files through Triton's own ModelConfig protobuf: every tensor of a family is declared here.

Names follow NVIDIA NIM's (`text`, `query`, `passage`, `embeddings`, `token_count`). Every model batches; shapes
below leave the batch dimension out, as config.pbtxt does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import (
    TYPE_BF16,
    TYPE_BOOL,
    TYPE_FP16,
    TYPE_FP32,
    TYPE_INT32,
    TYPE_STRING,
    TYPE_UINT32,
    TYPE_UINT64,
    BatchInput,
    BatchOutput,
    ModelConfig,
    ModelEnsembling,
    ModelInput,
    ModelInstanceGroup,
    ModelOutput,
    ModelWarmup,
)

from build.graphs.ragged import WIDEST
from build.runtimes import token_limits
from build.target import Target

SPREAD, SPREAD_ADOPTED = 3.0, 1.5
"""The widest row of one engine call over its narrowest. Our own graphs pad in attention only, which costs less
than one more call does. An adopted graph computes all of its padding."""

WARM_UP = {"short": (1, 16), "long": (1, 512), "batch": (8, 64)}
"""Sample -> (texts, tokens each) that every graph runs once before its model is ready."""


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
    segment_offset: int
    """How far ids go past the vocabulary: those of a pair's second text, of tokens that are seen by none, or of a
    text without tokens; 0 where there are none."""
    max_batch_size: int
    """Texts in one batch: bounds the hidden states that pass from encoder to head at once."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What callers may want to know of the checkpoint, kept in the ensemble's parameters."""


def render(config: ModelConfig) -> str:
    """The text of a config.pbtxt file."""
    text: str = text_format.MessageToString(config)
    return text


def tokenizer(family: Family, prompts: Mapping[str, str], reading: Mapping[str, str] | None = None) -> ModelConfig:
    """`<family>-tokenizer`: text -> input_ids, token_count, truncated, and tokens for who asks for them.

    `reading` are more parameters of its step.
    """
    config = _tokenizer(family, [TEXT, PROMPT_NAME], {"prompts": json.dumps(dict(prompts)), **(reading or {})})
    config.output.append(TOKENS.as_output())
    return config


def pair_tokenizer(family: Family) -> ModelConfig:
    """`<family>-tokenizer` of a cross-encoder: query, passage -> input_ids, token_count, truncated."""
    return _tokenizer(family, [QUERY, PASSAGE], {"segment_offset": str(family.segment_offset)})


def classifier_tokenizer(family: Family) -> ModelConfig:
    """`<family>-tokenizer` of a classifier: text and, of pairs, text_pair -> input_ids, token_count, truncated."""
    return _tokenizer(family, [TEXT, TEXT_PAIR], {"segment_offset": str(family.segment_offset)})


def sided_tokenizer(
    family: Family, prompts: Mapping[str, str], sides: Mapping[str, Mapping[str, object]]
) -> ModelConfig:
    """`<family>-tokenizer` that reads queries and documents unlike: text, query or passage -> kept_ids, too."""
    inputs = [replace(tensor, optional=True) for tensor in (TEXT, PROMPT_NAME, QUERY, PASSAGE)]
    parameters = {"prompts": json.dumps(dict(prompts)), "sides": json.dumps(dict(sides))}
    config = _tokenizer(family, inputs, parameters)
    config.output.extend([KEPT_IDS.as_output(), TOKENS.as_output()])
    return config


def template_tokenizer(family: Family, template: Mapping[str, Any]) -> ModelConfig:
    """`<family>-tokenizer` of a reranker that is asked: query, passage, perhaps instruction -> input_ids, ..."""
    is_instructed = not {"instruction", "instructed"}.isdisjoint(template)
    inputs = [QUERY, PASSAGE, *([INSTRUCTION] if is_instructed else [])]
    return _tokenizer(family, inputs, {"template": json.dumps(dict(template))})


def generator(name: str, parameters: Mapping[str, str], kind: int) -> ModelConfig:
    """`<family>` that writes: text_input or chat -> text_output, finish_reason, counts: `steps/generator.py`.

    It has one instance, of a `ModelInstanceGroup.Kind`: of several GPUs, on the first.
    """
    gpus = [0] if kind == ModelInstanceGroup.KIND_GPU else []
    inputs = [
        *(Tensor(one, TYPE_STRING, optional=True) for one in ("text_input", "chat")),
        Tensor("stream", TYPE_BOOL, optional=True),
        Tensor("max_tokens", TYPE_INT32, optional=True),
        Tensor("stop_words", TYPE_STRING, (-1,), optional=True),
        *(Tensor(one, TYPE_FP32, optional=True) for one in ("temperature", "top_p")),
        Tensor("seed", TYPE_UINT64, optional=True),
        *(Tensor(one, TYPE_FP32, optional=True) for one in ("frequency_penalty", "presence_penalty")),
        *(Tensor(f"guided_decoding_guide{one}", TYPE_STRING, optional=True) for one in ("_type", "")),
        Tensor("return_log_probs", TYPE_BOOL, optional=True),
    ]
    outputs = [
        *(Tensor(one, TYPE_STRING) for one in ("text_output", "finish_reason")),
        *(Tensor(one, TYPE_UINT32) for one in ("num_input_tokens", "num_output_tokens")),
        Tensor("output_tokens", TYPE_STRING, (-1,)),
        Tensor("output_log_probs", TYPE_FP32, (-1,)),
    ]
    config = ModelConfig(
        name=name,
        backend="python",
        max_batch_size=1,  # its step batches token by token
        input=[tensor.as_input() for tensor in inputs],
        output=[tensor.as_output() for tensor in outputs],
        instance_group=[ModelInstanceGroup(count=1, kind=kind, gpus=gpus)],
    )
    config.model_transaction_policy.decoupled = True
    _add_parameters(config, parameters)
    return config


def encoder(family: Family) -> ModelConfig:
    """`<family>-encoder`: ragged input_ids -> last_hidden_state [-1, H]."""
    config = _graph_model(family, "encoder", [INPUT_IDS], [_states(family)], "auto", "auto")
    config.batch_output.add(
        kind=BatchOutput.BATCH_SCATTER_WITH_INPUT_SHAPE,
        target_name=["last_hidden_state"],
        source_input=[INPUT_IDS.name],
    )
    return config


def headless_encoder(family: Family, dimensions: int | None) -> ModelConfig:
    """`<family>-encoder` that pools or scores by itself: ragged input_ids -> embeddings [D], or score, logit."""
    outputs = [SCORE, LOGIT] if dimensions is None else [Tensor("embeddings", TYPE_FP32, (dimensions,))]
    return _graph_model(family, "encoder", [INPUT_IDS], outputs, "auto", "auto")


def with_head(encoder: ModelConfig, head: ModelConfig, sided: bool) -> ModelConfig:
    """`<family>-encoder` with its head: ragged input_ids, and kept_ids if `sided` -> what the head gives."""
    config = ModelConfig()
    config.CopyFrom(encoder)
    del config.output[:], config.batch_output[:]
    config.output.extend(head.output)
    if "precision" in head.parameters:
        _add_parameters(config, {"head_precision": head.parameters["precision"].string_value})
    if sided:
        config.input.append(KEPT_IDS.as_input())
        for sample in config.model_warmup:
            sample.inputs[KEPT_IDS.name].CopyFrom(sample.inputs[INPUT_IDS.name])
    return config


def with_unseen(encoder: ModelConfig, offset: int) -> ModelConfig:
    """`<family>-encoder` whose step takes apart the ids of tokens that are seen by none, raised by `offset`."""
    config = ModelConfig()
    config.CopyFrom(encoder)
    _add_parameters(config, {"unseen_offset": str(offset)})
    return config


def pooling(family: Family, dimensions: int) -> ModelConfig:
    """`<family>-pooling`: ragged last_hidden_state and input_ids -> embeddings [D]."""
    outputs = [Tensor("embeddings", TYPE_FP32, (dimensions,))]
    return _graph_model(family, "pooling", [_states(family), INPUT_IDS], outputs)


def sparse_pooling(family: Family) -> ModelConfig:
    """`<family>-pooling` of a sparse model: ragged last_hidden_state and input_ids -> indices, values [-1].

    The head of a language model is as heavy as layers of its encoder, so it gets the encoder's arithmetic.
    """
    return _graph_model(family, "pooling", [_states(family), INPUT_IDS], SPARSE, "auto", "auto")


def vectors(family: Family, dimensions: int) -> ModelConfig:
    """`<family>-vectors`: ragged last_hidden_state and input_ids -> token_embeddings [-1, D], vector_count."""
    outputs = [_vectors(dimensions), VECTOR_COUNT]
    return _graph_model(family, "vectors", [_states(family), INPUT_IDS], outputs)


def _vectors(dimensions: int) -> Tensor:
    return Tensor("token_embeddings", TYPE_FP32, (-1, dimensions))


def maxsim_scoring(family: Family, dimensions: int) -> ModelConfig:
    """`<family>-rerank-scoring`: the token_embeddings of query and passage -> score, logit."""
    return _two_sided_scoring(family, [_vectors(dimensions), VECTOR_COUNT])


def scoring(family: Family) -> ModelConfig:
    """`<family>-scoring`: ragged last_hidden_state and input_ids -> score, logit."""
    return _graph_model(family, "scoring", [_states(family), INPUT_IDS], [SCORE, LOGIT])


def classifying(family: Family, labels: int) -> ModelConfig:
    """`<family>-scoring` of a classifier: ragged last_hidden_state and input_ids -> probabilities, logits."""
    return _graph_model(family, "scoring", [_states(family), INPUT_IDS], _classes(labels))


def _classes(labels: int) -> list[Tensor]:
    return [Tensor(name, TYPE_FP32, (labels,)) for name in ("probabilities", "logits")]


def cosine_scoring(family: Family, dimensions: int) -> ModelConfig:
    """`<family>-rerank-scoring`: the embeddings of query and passage -> score, logit."""
    return _two_sided_scoring(family, [Tensor("embeddings", TYPE_FP32, (dimensions,))])


def _two_sided_scoring(family: Family, compared: Sequence[Tensor]) -> ModelConfig:
    inputs = [
        Tensor(f"{side}_{tensor.name}", tensor.data_type, tensor.dims)
        for tensor in (*compared, TOKEN_COUNT, TRUNCATED)
        for side in ("query", "passage")
    ]
    return _graph_model(family, "rerank-scoring", inputs, [SCORE, LOGIT, TOKEN_COUNT, TRUNCATED])


def embed_ensemble(family: Family, dimensions: int) -> ModelConfig:
    """`<family>`: text -> embeddings, token_count, truncated."""
    return _text_ensemble(family, [Tensor("embeddings", TYPE_FP32, (dimensions,))])


def sparse_ensemble(family: Family) -> ModelConfig:
    """`<family>` of a sparse model: text -> indices, values, token_count, truncated."""
    return _text_ensemble(family, SPARSE)


def vectors_ensemble(family: Family, dimensions: int, sided: bool) -> ModelConfig:
    """`<family>` of a multi-vector model: text -> token_embeddings, vector_count, token_count, truncated."""
    outputs = [_vectors(dimensions), VECTOR_COUNT, TOKEN_COUNT, TRUNCATED]
    config = _ensemble(family, family.name, [TEXT, PROMPT_NAME], outputs)
    steps = config.ensemble_scheduling.step
    steps.extend(_vector_steps(family, "text", sided=sided, prompt_name="prompt_name"))
    return config


def maxsim_ensemble(family: Family) -> ModelConfig:
    """`<family>-rerank`, by the vectors of tokens: query, passage -> score, logit, token_count, truncated."""
    config = _ensemble(family, f"{family.name}-rerank", [QUERY, PASSAGE], [SCORE, LOGIT, TOKEN_COUNT, TRUNCATED])
    steps = config.ensemble_scheduling.step
    for side in ("query", "passage"):
        steps.extend(_vector_steps(family, side, sided=True, prefix=f"{side}_", source=side))
    compared = ("token_embeddings", "vector_count", "token_count", "truncated")
    steps.append(_two_sided_step(family, compared))
    return config


def _vector_steps(
    family: Family, text: str, sided: bool, prefix: str = "", source: str = "text", prompt_name: str | None = None
) -> list[ModelEnsembling.Step]:
    """Tokenizer, encoder and vectors over the ensemble tensor `text`, the tokenizer's input `source`."""
    tokenizer, *others = _pooling_steps(family, text, ["token_embeddings", "vector_count"], prefix, prompt_name)
    head = others[-1]
    if not family.target.traits.joins_head:
        head.model_name = f"{family.name}-vectors"
    if sided:
        tokenizer.input_map[source] = text
        if source != "text":
            del tokenizer.input_map["text"]
        kept = "kept_ids" if family.target.traits.joins_head else "input_ids"
        tokenizer.output_map["kept_ids"] = head.input_map[kept] = f"{prefix}kept_ids"
    return [tokenizer, *others]


def _two_sided_step(family: Family, compared: Sequence[str]) -> ModelEnsembling.Step:
    """`<family>-rerank-scoring` over what there is of query and passage."""
    names = [f"{side}_{name}" for name in compared for side in ("query", "passage")]
    results = [tensor.name for tensor in (SCORE, LOGIT, TOKEN_COUNT, TRUNCATED)]
    return _step(f"{family.name}-rerank-scoring", {n: n for n in names}, {n: n for n in results})


def _text_ensemble(family: Family, results: Sequence[Tensor]) -> ModelConfig:
    """`<family>`: text -> the `results` of tokenizer, encoder and pooling, token_count, truncated."""
    config = _ensemble(family, family.name, [TEXT, PROMPT_NAME], [*results, TOKEN_COUNT, TRUNCATED])
    names = [tensor.name for tensor in results]
    steps = config.ensemble_scheduling.step
    steps.extend(_pooling_steps(family, "text", names, prompt_name="prompt_name"))
    return config


def rerank_ensemble(family: Family, is_instructed: bool) -> ModelConfig:
    """`<family>`: query, passage, perhaps instruction -> score, logit, token_count, truncated."""
    inputs = [QUERY, PASSAGE, INSTRUCTION] if is_instructed else [QUERY, PASSAGE]
    return _scoring_ensemble(family, inputs, [SCORE, LOGIT])


def classifier_ensemble(family: Family, labels: int) -> ModelConfig:
    """`<family>`: text and, of pairs, text_pair -> probabilities, logits [labels], token_count, truncated."""
    return _scoring_ensemble(family, [TEXT, TEXT_PAIR], _classes(labels))


def _scoring_ensemble(family: Family, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> ModelConfig:
    """`<family>`: the inputs of its tokenizer -> the `results` of its scoring, token_count, truncated."""
    config = _ensemble(family, family.name, inputs, [*results, TOKEN_COUNT, TRUNCATED])

    def same(tensors: Sequence[Tensor]) -> dict[str, str]:
        return {tensor.name: tensor.name for tensor in tensors}

    steps = config.ensemble_scheduling.step
    steps.append(_step(f"{family.name}-tokenizer", same(inputs), same([INPUT_IDS, TOKEN_COUNT, TRUNCATED])))
    if family.target.traits.joins_head:
        steps.append(_step(f"{family.name}-encoder", same([INPUT_IDS]), same(results)))
        return config
    states = {"last_hidden_state": "last_hidden_state"}
    steps.append(_step(f"{family.name}-encoder", same([INPUT_IDS]), states))
    steps.append(_step(f"{family.name}-scoring", states | same([INPUT_IDS]), same(results)))
    return config


def headless_ensemble(family: Family, tokenizer: ModelConfig, encoder: ModelConfig) -> ModelConfig:
    """`<family>` of an encoder that pools or scores by itself: the tokenizer's inputs -> the outputs of both."""
    config = _ensemble(family, family.name, [], [])
    config.input.extend(tokenizer.input)
    config.output.extend(
        [*encoder.output, *(t for t in tokenizer.output if t.name in (TOKEN_COUNT.name, TRUNCATED.name))]
    )
    config.ensemble_scheduling.step.extend(
        _step(
            model.name,
            {tensor.name: tensor.name for tensor in model.input},
            {tensor.name: tensor.name for tensor in model.output if tensor.name != TOKENS.name},
        )
        for model in (tokenizer, encoder)
    )
    return config


def bi_encoder_ensemble(family: Family) -> ModelConfig:
    """`<family>-rerank`, a bi-encoder: query, passage -> score, logit, token_count, truncated.

    The embedding family's own models are the steps, once for the query and once for the passage.
    """
    config = _ensemble(family, f"{family.name}-rerank", [QUERY, PASSAGE], [SCORE, LOGIT, TOKEN_COUNT, TRUNCATED])
    steps = config.ensemble_scheduling.step
    for side in ("query", "passage"):
        steps.extend(_pooling_steps(family, side, ["embeddings"], prefix=f"{side}_"))
    steps.append(_two_sided_step(family, ("embeddings", "token_count", "truncated")))
    return config


def _pooling_steps(
    family: Family, text: str, results: Sequence[str], prefix: str = "", prompt_name: str | None = None
) -> list[ModelEnsembling.Step]:
    """Tokenizer, encoder and pooling over the ensemble tensor `text`; results are named with `prefix`."""
    ids, states = (f"{prefix}{name}" for name in ("input_ids", "last_hidden_state"))
    given = {name: f"{prefix}{name}" for name in results}
    tokenized = {"input_ids": ids} | {n: f"{prefix}{n}" for n in ("token_count", "truncated")}
    prompt = {"prompt_name": prompt_name} if prompt_name else {}
    tokenizer = _step(f"{family.name}-tokenizer", {"text": text} | prompt, tokenized)
    if family.target.traits.joins_head:
        return [tokenizer, _step(f"{family.name}-encoder", {"input_ids": ids}, given)]
    return [
        tokenizer,
        _step(f"{family.name}-encoder", {"input_ids": ids}, {"last_hidden_state": states}),
        _step(f"{family.name}-pooling", {"last_hidden_state": states, "input_ids": ids}, given),
    ]


def _tokenizer(family: Family, inputs: Sequence[Tensor], parameters: Mapping[str, str]) -> ModelConfig:
    outputs = [INPUT_IDS, TOKEN_COUNT, TRUNCATED]
    config = _model(family, "tokenizer", "python", inputs, outputs, ModelInstanceGroup.KIND_CPU)
    limits = {"max_tokens": str(family.max_tokens), "vocabulary": str(family.vocabulary)}
    _add_parameters(config, {**limits, **parameters})
    return config


def _graph_model(
    family: Family,
    step: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    precision: str = "fp32",
    threads: str = "1",
) -> ModelConfig:
    """A model of `model.onnx`; precision and threads are what `onnx_runner.py` computes it with."""
    runtime = family.target.traits
    config = _model(family, step, runtime.backend, inputs, outputs, family.target.kind)
    if runtime.step:
        known = {
            "precision": precision,
            "threads": threads,
            "token_budget": str(runtime.token_budget),
            "spread": str(SPREAD_ADOPTED if "onnx" in family.facts else SPREAD),
        }
        own = {key: known[key] for key in runtime.parameters}
        _add_parameters(config, {"runtime": family.target.runtime} | own)
        if step == "encoder":
            limits = {
                "max_tokens": str(family.max_tokens),
                "vocabulary": str(family.vocabulary + family.segment_offset),
            }
            _add_parameters(config, limits)
            # The one place for Triton's response cache, whose key is a request's inputs alone, neither its
            # parameters nor the outputs that it asks for. Nothing is kept unless the server is given a cache.
            config.response_cache.enable = True
    else:
        config.default_model_filename = runtime.file
    if not any(tensor.ragged for tensor in inputs):
        if runtime.step:  # a few numbers for each text, which are in the CPU's memory
            config.instance_group[0].kind = ModelInstanceGroup.KIND_CPU
        return config
    _add_batch_input(config, BatchInput.BATCH_ITEM_SHAPE_FLATTEN, "lengths")
    if runtime.needs_width:
        _add_batch_input(config, BatchInput.BATCH_MAX_ELEMENT_COUNT_AS_SHAPE, WIDEST)
        profiles = token_limits(family.max_batch_size, family.max_tokens)
        config.instance_group[0].profile.extend(map(str, range(len(profiles))))
    for name, (texts, tokens) in WARM_UP.items():
        _add_warm_up(config, name, min(texts, family.max_batch_size), min(tokens, family.max_tokens))
    return config


def _model(
    family: Family,
    step: str,
    backend: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    kind: int,
) -> ModelConfig:
    config = ModelConfig(
        name=f"{family.name}-{step}",
        backend=backend,
        max_batch_size=family.max_batch_size,
        input=[tensor.as_input() for tensor in inputs],
        output=[tensor.as_output() for tensor in outputs],
        # One, on a host of any size: an engine has all cores as it is. A tokenizer has one core, and keeps some 25
        # busy that encode with MiniLM, more with larger models. A second one is another process with its memory.
        instance_group=[ModelInstanceGroup(count=1, kind=kind)],
    )
    # No queue delay: while one batch runs, the next one gathers by itself.
    config.dynamic_batching.SetInParent()
    return config


def _states(family: Family) -> Tensor:
    types = {"fp32": TYPE_FP32, "fp16": TYPE_FP16, "bf16": TYPE_BF16}
    return Tensor("last_hidden_state", types[family.target.states], (-1, family.hidden_size), ragged=True)


def _add_parameters(config: ModelConfig, parameters: Mapping[str, str]) -> None:
    for key, value in parameters.items():
        config.parameters[key].string_value = value


def _add_batch_input(config: ModelConfig, kind: int, target: str) -> None:
    config.batch_input.add(kind=kind, target_name=[target], data_type=TYPE_INT32, source_input=[INPUT_IDS.name])


def _add_warm_up(config: ModelConfig, name: str, texts: int, tokens: int) -> None:
    """Adds a sample of `texts` rows of `tokens` zeros each, which are ids like any other."""
    sample = ModelWarmup(name=name, batch_size=texts, count=1)
    for tensor in config.input:
        dims = [tokens, *tensor.dims[1:]]
        sample.inputs[tensor.name].MergeFrom(
            ModelWarmup.Input(data_type=tensor.data_type, dims=dims, zero_data=True)
        )
    config.model_warmup.append(sample)


def _ensemble(family: Family, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> ModelConfig:
    config = ModelConfig(
        name=name,
        platform="ensemble",
        # BATCH_MAX_ELEMENT_COUNT_AS_SHAPE counts all rows of a request as one, so each text comes in its own.
        max_batch_size=1 if family.target.traits.needs_width else family.max_batch_size,
        input=[tensor.as_input() for tensor in inputs],
        output=[tensor.as_output() for tensor in outputs],
    )
    _add_parameters(config, family.facts)
    return config


def _step(model: str, input_map: Mapping[str, str], output_map: Mapping[str, str]) -> ModelEnsembling.Step:
    return ModelEnsembling.Step(model_name=model, model_version=-1, input_map=input_map, output_map=output_map)
