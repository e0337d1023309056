"""The ensembles of families: what callers send, get, and which models it goes through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tritonclient.grpc.model_config_pb2 import (
    TYPE_FP32,
    ModelConfig,
    ModelEnsembling,
)

from build.rendering.contract import (
    INPUT_IDS,
    INSTRUCTION,
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


def embed(family: Family, dimensions: int) -> ModelConfig:
    """`<family>`: text -> embeddings, token_count, truncated."""
    return _text_ensemble(family, [Tensor("embeddings", TYPE_FP32, (dimensions,))])


def sparse(family: Family) -> ModelConfig:
    """`<family>` of a sparse model: text -> indices, values, token_count, truncated."""
    return _text_ensemble(family, SPARSE)


def vectors(family: Family, dimensions: int, sided: bool) -> ModelConfig:
    """`<family>` of a multi-vector model: text -> token_embeddings, vector_count, token_count, truncated."""
    outputs = [token_embeddings(dimensions), VECTOR_COUNT, TOKEN_COUNT, TRUNCATED]
    config = _ensemble(family, family.name, [TEXT, PROMPT_NAME], outputs)
    steps = config.ensemble_scheduling.step
    steps.extend(_vector_steps(family, "text", sided=sided, prompt_name="prompt_name"))
    return config


def maxsim(family: Family) -> ModelConfig:
    """`<family>-rerank`, by the vectors of tokens: query, passage -> score, logit, token_count, truncated."""
    config = _ensemble(family, f"{family.name}-rerank", [QUERY, PASSAGE], [SCORE, LOGIT, TOKEN_COUNT, TRUNCATED])
    steps = config.ensemble_scheduling.step
    for side in ("query", "passage"):
        steps.extend(_vector_steps(family, side, sided=True, prefix=f"{side}_", source=side))
    compared = ("token_embeddings", "vector_count", "token_count", "truncated")
    steps.append(_two_sided_step(family, compared))
    return config


def bi_encoder(family: Family) -> ModelConfig:
    """`<family>-rerank`, a bi-encoder: query, passage -> score, logit, token_count, truncated.

    The embedding family's own models are the steps, once for the query and once for the passage.
    """
    config = _ensemble(family, f"{family.name}-rerank", [QUERY, PASSAGE], [SCORE, LOGIT, TOKEN_COUNT, TRUNCATED])
    steps = config.ensemble_scheduling.step
    for side in ("query", "passage"):
        steps.extend(_pooling_steps(family, side, ["embeddings"], prefix=f"{side}_"))
    steps.append(_two_sided_step(family, ("embeddings", "token_count", "truncated")))
    return config


def rerank(family: Family, is_instructed: bool) -> ModelConfig:
    """`<family>`: query, passage, perhaps instruction -> score, logit, token_count, truncated."""
    inputs = [QUERY, PASSAGE, INSTRUCTION] if is_instructed else [QUERY, PASSAGE]
    return _scoring_ensemble(family, inputs, [SCORE, LOGIT])


def classifier(family: Family, labels: int) -> ModelConfig:
    """`<family>`: text and, of pairs, text_pair -> probabilities, logits [labels], token_count, truncated."""
    return _scoring_ensemble(family, [TEXT, TEXT_PAIR], classes(labels))


def headless(family: Family, tokenizer: ModelConfig, encoder: ModelConfig) -> ModelConfig:
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


def _ensemble(family: Family, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> ModelConfig:
    config = ModelConfig(
        name=name,
        platform="ensemble",
        # BATCH_MAX_ELEMENT_COUNT_AS_SHAPE counts all rows of a request as one, so each text comes in its own.
        max_batch_size=1 if family.target.traits.needs_width else family.max_batch_size,
        input=[tensor.as_input() for tensor in inputs],
        output=[tensor.as_output() for tensor in outputs],
    )
    add_parameters(config, family.facts)
    return config


def _step(model: str, input_map: Mapping[str, str], output_map: Mapping[str, str]) -> ModelEnsembling.Step:
    return ModelEnsembling.Step(model_name=model, model_version=-1, input_map=input_map, output_map=output_map)
