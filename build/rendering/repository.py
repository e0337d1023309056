"""The configurations of a family's models but its ensembles, through Triton's own ModelConfig protobuf.

The models of families that read documents are in `documents.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
    ModelInstanceGroup,
    ModelWarmup,
)

from build.graphs.ragged import WIDEST
from build.rendering.contract import (
    INPUT_IDS,
    INSTRUCTION,
    KEPT_IDS,
    LOGIT,
    PASSAGE,
    PROMPT_NAME,
    QUERY,
    SCORE,
    SPARSE,
    TEXT,
    TEXT_PAIR,
    TOKEN_COUNT,
    TOKENS,
    TRUNCATED,
    VECTOR_COUNT,
    Family,
    Tensor,
    add_parameters,
    classes,
    token_embeddings,
)
from build.runtimes import token_limits

SPREAD, SPREAD_ADOPTED = 3.0, 1.5
"""The widest row of one engine call over its narrowest. Our own graphs pad in attention only, which costs less
than one more call does. An adopted graph computes all of its padding."""

WARM_UP = {"short": (1, 16), "long": (1, 512), "batch": (8, 64)}
"""Sample -> (texts, tokens each) that every graph runs once before its model is ready."""


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


def pair_tokenizer(family: Family, segment_offset: int) -> ModelConfig:
    """`<family>-tokenizer` of a cross-encoder: query, passage -> input_ids, token_count, truncated."""
    return _tokenizer(family, [QUERY, PASSAGE], {"segment_offset": str(segment_offset)})


def classifier_tokenizer(family: Family, segment_offset: int) -> ModelConfig:
    """`<family>-tokenizer` of a classifier: text and, of pairs, text_pair -> input_ids, token_count, truncated."""
    return _tokenizer(family, [TEXT, TEXT_PAIR], {"segment_offset": str(segment_offset)})


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
    add_parameters(config, parameters)
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
        add_parameters(config, {"head_precision": head.parameters["precision"].string_value})
    if sided:
        config.input.append(KEPT_IDS.as_input())
        for sample in config.model_warmup:
            sample.inputs[KEPT_IDS.name].CopyFrom(sample.inputs[INPUT_IDS.name])
    return config


def with_unseen(encoder: ModelConfig, offset: int) -> ModelConfig:
    """`<family>-encoder` whose step takes apart the ids of tokens that are seen by none, raised by `offset`."""
    config = ModelConfig()
    config.CopyFrom(encoder)
    add_parameters(config, {"unseen_offset": str(offset)})
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
    outputs = [token_embeddings(dimensions), VECTOR_COUNT]
    return _graph_model(family, "vectors", [_states(family), INPUT_IDS], outputs)


def maxsim_scoring(family: Family, dimensions: int) -> ModelConfig:
    """`<family>-rerank-scoring`: the token_embeddings of query and passage -> score, logit."""
    return _two_sided_scoring(family, [token_embeddings(dimensions), VECTOR_COUNT])


def scoring(family: Family) -> ModelConfig:
    """`<family>-scoring`: ragged last_hidden_state and input_ids -> score, logit."""
    return _graph_model(family, "scoring", [_states(family), INPUT_IDS], [SCORE, LOGIT])


def classifying(family: Family, labels: int) -> ModelConfig:
    """`<family>-scoring` of a classifier: ragged last_hidden_state and input_ids -> probabilities, logits."""
    return _graph_model(family, "scoring", [_states(family), INPUT_IDS], classes(labels))


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


def _tokenizer(family: Family, inputs: Sequence[Tensor], parameters: Mapping[str, str]) -> ModelConfig:
    outputs = [INPUT_IDS, TOKEN_COUNT, TRUNCATED]
    config = _model(family, "tokenizer", "python", inputs, outputs, ModelInstanceGroup.KIND_CPU)
    limits = {"max_tokens": str(family.max_tokens), "vocabulary": str(family.vocabulary)}
    add_parameters(config, {**limits, **parameters})
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
        add_parameters(config, {"runtime": family.target.runtime} | own)
        if step == "encoder":
            limits = {
                "max_tokens": str(family.max_tokens),
                "vocabulary": str(family.vocabulary + family.extra_ids),
            }
            add_parameters(config, limits)
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
    # No queue delay: while a step is busy with one batch, the next one gathers by itself.
    config.dynamic_batching.SetInParent()
    return config


def _states(family: Family) -> Tensor:
    types = {"fp32": TYPE_FP32, "fp16": TYPE_FP16, "bf16": TYPE_BF16}
    return Tensor("last_hidden_state", types[family.target.states], (-1, family.hidden_size), ragged=True)


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
