"""The models of families that score: rerankers of pairs, and classifiers."""

from __future__ import annotations

import json
from dataclasses import replace

from build.errors import BuildError
from build.graphs.architectures import ARCHITECTURES
from build.graphs.dimensions import Dimensions
from build.graphs.scoring import (
    PROBABILITIES,
    Reranker,
    logit_score,
    score_activation,
    write_classifying,
    write_scoring,
)
from build.rendering import ensembles, repository
from build.rendering.contract import Family
from build.rendering.model_folder import Model, graph, tokenizer, with_head
from build.sources.checkpoint import Checkpoint
from build.sources.labels import label_names, labels
from build.sources.weights import Weights

LANGUAGE_MODELS = (
    *(f"{kind}ForCausalLM" for kind in ("Llama", "Mistral", "Qwen2", "Qwen3")),
    "Qwen3VLForConditionalGeneration",
)
"""Classes that LogitScore may follow."""

ENDS = ("prefix", "suffix")
"""Parts of a reranker's template that are never cut."""


def reranking_models(
    checkpoint: Checkpoint, family: Family, states: Model, encoder: Dimensions, weights: Weights
) -> list[Model]:
    """The family of a cross-encoder, or of a language model that is asked whether a passage answers."""
    reranker = reranker_of(checkpoint)
    if checkpoint.chat is not None:
        # Here, as few checkpoints have one, and Jinja takes time to load.
        from build.sources.chat_template import read_chat_template

        reranker = replace(reranker, template=read_chat_template(checkpoint, checkpoint.chat))
    activation = score_activation(checkpoint)
    family = replace(family, facts={**family.facts, "activation": activation})
    check_one_score(checkpoint, family, reranker)
    if reranker.template is None:
        config = repository.pair_tokenizer(family, encoder.segment_offset)
    else:
        config = repository.template_tokenizer(family, reranker.template)
    tokens = checkpoint.tokenizer
    return [
        Model(ensembles.rerank(family, reranker.is_instructed)),
        tokenizer(config, checkpoint),
        *with_head(
            states,
            graph(
                repository.scoring(family),
                family.target.head,
                lambda g: write_scoring(g, encoder, weights, tokens, reranker.logit, activation),
            ),
        ),
    ]


def classifying_models(
    checkpoint: Checkpoint, family: Family, states: Model, encoder: Dimensions, weights: Weights
) -> list[Model]:
    """The family of a classifier of texts or pairs."""
    reranker, config = reranker_of(checkpoint), checkpoint.config
    if not checkpoint.architecture.endswith("ForSequenceClassification"):
        raise BuildError(f"{config.path} is of {checkpoint.architecture}, which is no classifier")
    if reranker.template is not None and not reranker.is_worded:
        raise BuildError(f"{config.path} is of {checkpoint.architecture}, which is written as a reranker only")
    check_no_prompt(checkpoint)
    config.require("problem_type", *PROBABILITIES)
    problem = config.word("problem_type", default=next(iter(PROBABILITIES)))
    names, tokens = label_names(config), checkpoint.tokenizer
    if len(names) < 2:
        raise BuildError(f"{config.path} has one label, so it is no classifier but a reranker: say --task rerank")
    family = replace(family, facts={**family.facts, "labels": json.dumps(names), "problem_type": problem})
    scoring = graph(
        repository.classifying(family, len(names)),
        family.target.head,
        lambda g: write_classifying(g, encoder, weights, tokens, reranker.logit, len(names), problem),
    )
    return [
        Model(ensembles.classifier(family, len(names))),
        tokenizer(repository.classifier_tokenizer(family, encoder.segment_offset), checkpoint),
        *with_head(states, scoring),
    ]


def reranker_of(checkpoint: Checkpoint) -> Reranker:
    """What makes a score of the encoder's states; raises BuildError where that is not written."""
    kinds = [module.kind for module in checkpoint.modules] if checkpoint.is_cross_encoder else []
    if kinds == ["Transformer", "LogitScore"] and checkpoint.architecture in LANGUAGE_MODELS:
        return Reranker(logit_score(checkpoint, checkpoint.modules[1].path))
    if kinds not in ([], ["Transformer"]):
        raise BuildError(
            f"{checkpoint.folder / 'modules.json'} lists {', '.join(kinds)}; scores are written for a Transformer "
            f"that classifies, or one of {', '.join(LANGUAGE_MODELS)} and LogitScore"
        )
    reranker = ARCHITECTURES[checkpoint.model_type].rerankers.get(checkpoint.architecture)
    if reranker is None:
        known = [name for one in ARCHITECTURES.values() for name in one.rerankers]
        raise BuildError(
            f"{checkpoint.config.path} is of {checkpoint.architecture or 'no class'}; scores are written for "
            f"{', '.join(known)}, and with the modules Transformer and LogitScore for {', '.join(LANGUAGE_MODELS)}"
        )
    return reranker


def check_one_score(checkpoint: Checkpoint, family: Family, reranker: Reranker) -> None:
    """Raises BuildError where a pair gets another number of scores than one, or its prompt has no room."""
    if checkpoint.chat is None:  # which has its words for a prompt
        check_no_prompt(checkpoint)
    is_classifier = checkpoint.architecture.endswith("ForSequenceClassification")
    if is_classifier and (count := labels(checkpoint.config)) != 1:
        raise BuildError(
            f"{checkpoint.config.path} gives {count} labels, as a classifier; a reranker gives one score"
        )
    if reranker.template is None and reranker.is_worded:
        raise BuildError(
            f"{checkpoint.config.path} is of {checkpoint.architecture} with one label, and nothing says in what "
            "words it is asked: only classifiers of several labels are written for it"
        )
    if reranker.template is None:
        return
    ends = [checkpoint.tokenizer.encode(reranker.template.get(end, ""), add_special_tokens=False) for end in ENDS]
    if (taken := sum(len(end.ids) for end in ends) + len(reranker.template.get("tail", []))) >= family.max_tokens:
        raise BuildError(
            f"{family.max_tokens} tokens leave no room for a query: the words around it are {taken} tokens; "
            f"say --max-tokens {4 * taken} or more"
        )


def check_no_prompt(checkpoint: Checkpoint) -> None:
    """Raises BuildError where the reference puts words before each pair."""
    if "" in checkpoint.prompts:
        raise BuildError(f"{checkpoint.folder} has a prompt before each pair, which is not written for rerankers")
