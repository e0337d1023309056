"""The Triton models of one family: which there are, and what each of them holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from build import repository
from build.architectures import ARCHITECTURES, HARMLESS, Architecture, Reranker
from build.catalog import CatalogEntry, Hub, Wheel
from build.checkpoint import Checkpoint, own_code
from build.errors import BuildError, NotPackedError
from build.files import GRAPHS, SHARDS, WEIGHTS, is_listed
from build.graphs.adopted import Adopted
from build.graphs.colbert import read_multi_vector
from build.graphs.dimensions import Dimensions, any_dimensions, label_names, labels
from build.graphs.multi_vector import MultiVector, Side, write_maxsim, write_vectors
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.pooling import Pooling, write_pooling
from build.graphs.scoring import (
    PROBABILITIES,
    logit_score,
    score_activation,
    write_classifying,
    write_cosine_scoring,
    write_scoring,
)
from build.graphs.sparse import Splade, is_tied, lexical_weights, unweighed, write_lexical, write_splade
from build.graphs.static import Static, measured
from build.quantised import Quantised
from build.repository import Family
from build.settings import check_nothing_is_left
from build.target import RUNTIMES, Target
from build.tokenization import check_tokenizer
from build.weights import Weights

SOURCES = Path(__file__).parent
TOKENIZER_STEP = SOURCES / "steps" / "tokenizer.py"
LONG_TEXT, DEADLINE = SOURCES / "steps" / "long_text.py", SOURCES / "steps" / "deadline.py"
REQUESTS, MEMORY = SOURCES / "steps" / "requests.py", SOURCES / "steps" / "memory.py"
ONNX_RUNNER_STEP = SOURCES / "steps" / "onnx_runner.py"
TORCH_RUNNER_STEP = SOURCES / "steps" / "torch_runner.py"
TORCH = (SOURCES / "steps" / "torch_graph.py", SOURCES / "steps" / "packed_encoder.py")

LANGUAGE_MODELS = (
    *(f"{kind}ForCausalLM" for kind in ("Llama", "Mistral", "Qwen2", "Qwen3")),
    "Qwen3VLForConditionalGeneration",
)
"""Classes that LogitScore may follow."""

ENDS = ("prefix", "suffix")
"""Parts of a reranker's template that are never cut."""

NONE: Mapping[str, str] = {}

PACKED_TEXTS = 256
"""In one batch of packed tokens at least, so that short ones fill a GPU too; its step cuts batches by tokens."""

SCALES_BY_BATCH = (
    "its graph is quantised dynamically, so a text's result depends a little on what it is computed beside; "
    "for the same bits in any batch take an fp32 or fp16 graph"
)


@dataclass(frozen=True)
class Model:
    """One Triton model of a family and what its version folder holds."""

    config: ModelConfig
    step: Path | None = None
    """The source of `model.py`; an ensemble has none."""
    write_graph: Callable[[OnnxGraph], None] | None = None
    """Writes `model.onnx`."""
    head: Model | None = None
    """Of which only the graph is used, as the `head.onnx` that the same step runs behind it."""
    target: Target = field(default_factory=Target)
    """What the graph is written for."""
    files: tuple[Path, ...] = ()
    """Files of the checkpoint to copy."""
    made: Mapping[str, str] = field(default_factory=dict)
    """Files that are made of it: name -> content."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Files beside the version folder, which Triton passes over: path -> content."""
    write: Callable[[Path], None] | None = None
    """Writes what else its version folder holds."""


def models_of(entry: CatalogEntry, checkpoint: Checkpoint, target: Target) -> list[Model]:
    """Every model of the family, the ensembles that callers use first.

    Raises BuildError for what the checkpoint says and nothing here reads. Of its weights nothing is opened yet.
    """
    exported = graph_to_adopt(entry, checkpoint, files_of(checkpoint.folder))
    if exported is not None and entry.adapter is not None:
        raise BuildError(
            f"{entry.name} would be adopted from {exported}, and adapters are added to weights only: leave "
            "--adapter out"
        )
    if exported is None and entry.output is not None:
        raise BuildError(
            f"{entry.name} is built from its weights, which have no output to choose: add --onnx FILE"
        )
    if "embed" not in entry.tasks and (entry.pooling, entry.normalise) != (None, None):
        kinds = {"embed_all": "of vectors of tokens", "embed_sparse": "sparse", "classify": "a classifier"}
        what = kinds.get(entry.tasks[0], "a reranker")
        raise BuildError(
            f"{entry.name} is {what}, so its tokens' vectors are not pooled: leave --pooling and --normalise out"
        )
    if {"embed_all", "embed_sparse"} & set(entry.tasks):
        check_ragged_results(entry, target, exported)
    if "classify" in entry.tasks and exported is not None:
        raise BuildError(
            f"{entry.name} would be adopted from {exported}, and classifiers of several labels are written from "
            "weights only: take a checkpoint that has model.safetensors"
        )
    if exported is None:
        parts = written_models(entry, checkpoint, target)
    else:
        parts = adopted_models(entry, checkpoint, target, checkpoint.folder / exported, exported)
    check_nothing_is_left(checkpoint.unread_settings(), entry.ignore)
    return parts


def written_models(entry: CatalogEntry, checkpoint: Checkpoint, target: Target) -> list[Model]:
    """The family of a graph that is written from the weights."""
    architecture = ARCHITECTURES[checkpoint.model_type]
    if target.feed.packed and not architecture.packed:
        raise NotPackedError(
            f"{entry.name} is of {architecture.model_type!r}, whose biases in attention are not written for "
            f"{target.runtime}: build it for {others_than_packed()}"
        )
    check_weights_are_plain(checkpoint, architecture)
    quantised = Quantised.of(checkpoint.config)
    encoder = architecture.read(checkpoint.config)
    if entry.adapter is not None:
        if entry.adapter not in encoder.adapters:
            choice = f"choose {' or '.join(encoder.adapters)}" if encoder.adapters else "leave --adapter out"
            raise BuildError(f"{entry.name} has no adapter {entry.adapter!r}: {choice}")
        encoder = replace(encoder, adapter=entry.adapter)
    inner = checkpoint.config.inner(architecture.text) if architecture.text else None
    for said in (checkpoint.config, inner):
        if said is not None:
            said.skip((*HARMLESS, *architecture.harmless))
    weights = checkpoint.weights(checkpoint.transformer, architecture.prefixes, architecture.unused, quantised)
    if isinstance(encoder, Static):
        encoder = measured(encoder, checkpoint, weights)
    is_pair = entry.tasks[0] in ("rerank", "classify") and checkpoint.architecture in architecture.rerankers
    if is_pair and encoder.token_types > 1 and checkpoint.feeds_token_types:
        encoder = replace(encoder, segment_offset=encoder.vocab_size)
    vectors = None
    if "embed_all" in entry.tasks:
        vectors = read_multi_vector(checkpoint, encoder, weights, architecture.lexical)
        encoder = replace(encoder, unseen_offset=encoder.vocab_size if vectors.unseen else 0)
        if vectors.unseen and not architecture.unseen:
            raise BuildError(
                f"{checkpoint.transformer} fills queries up with tokens that are seen by none, which is not "
                f"written for {architecture.model_type!r}"
            )
        if vectors.unseen and 0 < encoder.window < vectors.query.least:
            raise BuildError(
                f"{checkpoint.transformer} fills queries up to {vectors.query.least} tokens that see no further "
                f"than {encoder.window - 1} places, where there may be none to see: make queries as short"
            )
    longest = vectors.longest if vectors is not None else 0
    if longest > encoder.positions:
        raise BuildError(
            f"{checkpoint.transformer} reads queries or documents of {longest} tokens, over its window of "
            f"{encoder.positions}: make their lengths as short"
        )
    facts = {"precision": target.precision}
    if quantised is not None:
        facts["dequantised"] = quantised.name
        print(f"{entry.name}: {dequantised(quantised, target.precision)}", flush=True)
    if architecture.text:
        facts["left_out"] = "pictures and videos"
        print(f"{entry.name}: its half that sees pictures and videos is left out; it reads texts", flush=True)
    family = family_of(entry, checkpoint, target, encoder, facts, longest)
    encoder = replace(encoder, longest=family.max_tokens)
    states = graph(repository.encoder(family), target, lambda g: architecture.write(g, encoder, weights))
    if "embed" in entry.tasks:
        reading = reading_of(encoder, family) if isinstance(encoder, Static) else {}
        return embedding_models(entry, checkpoint, family, states, reading)
    if vectors is not None:
        plain = min(checkpoint.max_tokens(encoder.positions), family.max_tokens)
        return multi_vector_models(entry, checkpoint, family, states, vectors, plain, encoder.vocab_size)
    if "embed_sparse" in entry.tasks:
        return sparse_models(checkpoint, family, states, encoder, weights)
    if "classify" in entry.tasks:
        return classifying_models(checkpoint, family, states, encoder, weights)
    return reranking_models(checkpoint, family, states, encoder, weights)


def dequantised(quantised: Quantised, precision: str) -> str:
    """What is computed in place of a model's own arithmetic."""
    weights = f"its weights are kept in {quantised.name} and computed with in {precision}"
    if not quantised.rounds_activations:
        return weights
    return (
        f"{weights}, as transformers' dequantize does it; kernels of {quantised.name} round what the weights are "
        "multiplied by as well, so their results are a little different"
    )


def adopted_models(
    entry: CatalogEntry, checkpoint: Checkpoint, target: Target, path: Path, name: str
) -> list[Model]:
    """The family of a graph that somebody else exported, which is all that says how it computes."""
    if target.feed.packed:
        raise NotPackedError(
            f"{entry.name} would be adopted from {name}, and {target.runtime} runs only graphs that are written "
            f"here from the weights: build it for {others_than_packed()}"
        )
    encoder = any_dimensions(checkpoint.config)
    checkpoint.config.skip(checkpoint.config)
    adopted = Adopted.of(entry, checkpoint, encoder, path)
    facts = {"onnx": name, "precision": adopted.precision}
    if adopted.quantisation:
        facts |= {"quantisation": adopted.quantisation}
    if adopted.quantisation == "dynamic":
        print(f"{entry.name}: {SCALES_BY_BATCH}", flush=True)
    # What is written around the old graph; inside it keeps its own precision.
    target = replace(target, precision="fp32")
    encoder = adopted.encoder
    family = family_of(entry, checkpoint, target, encoder, facts)
    if adopted.gives != "last_hidden_state":
        return headless_models(entry, checkpoint, family, adopted)
    states = graph(repository.encoder(family), target, adopted.write)
    return embedding_models(entry, checkpoint, family, states)


def others_than_packed(with_width: bool = True) -> str:
    """The runtimes that run a graph of rows; without those that must know shapes beforehand, if asked."""
    others = [
        name
        for name, runtime in RUNTIMES.items()
        if not runtime.packed and (with_width or not runtime.needs_width)
    ]
    return f"{', '.join(others[:-1])} or {others[-1]}"


def family_of(
    entry: CatalogEntry,
    checkpoint: Checkpoint,
    target: Target,
    encoder: Dimensions,
    facts: Mapping[str, str],
    longest: int = 0,
) -> Family:
    """What the models have in common; raises BuildError where tokenizer and encoder do not fit each other.

    Queries or documents have up to `longest` tokens, where they are read otherwise than other texts.
    """
    check_tokenizer(checkpoint)
    max_tokens = checkpoint.max_tokens(encoder.positions, entry.max_tokens, longest)
    texts = entry.batching.texts
    if target.feed.backend != "python":
        # Triton counts texts, and all of them may be as long as the longest or take its width in attention.
        texts = min(texts, max(1, entry.batching.tokens // max_tokens))
    elif target.feed.packed:
        texts = max(texts, PACKED_TEXTS)
    if entry.ignore:
        facts = {**facts, "ignored": ", ".join(entry.ignore)}
    known, beyond = known_ids(checkpoint, encoder.vocab_size), max(encoder.segment_offset, encoder.unseen_offset)
    if isinstance(encoder, Static):
        beyond = encoder.vocab_size + 1 - known  # the row behind the table is that of a text without tokens
    return Family(
        entry.name,
        target,
        encoder.hidden_size,
        max_tokens,
        known,
        beyond,
        texts,
        {**facts_of(entry), **facts},
    )


def known_ids(checkpoint: Checkpoint, rows: int) -> int:
    """How many token ids there are, from 0; raises BuildError where words have ids past the table of `rows`.

    Tokens that stand for no text, such as EmbeddingGemma's for an image, may have: a text that has one all the
    same is refused when it comes.
    """
    tokenizer = checkpoint.tokenizer
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    ids = {i for content, i in tokenizer.get_vocab().items() if content not in special or i < rows}
    if not ids:
        raise BuildError(f"{checkpoint.transformer / 'tokenizer.json'} has no tokens")
    if (last := max(ids)) >= rows:
        raise BuildError(
            f"{checkpoint.transformer / 'tokenizer.json'} has token id {last}, but {checkpoint.config.path} "
            f"says that the encoder knows {rows}: the two are of different checkpoints"
        )
    return last + 1


def check_weights_are_plain(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Raises BuildError where the tensors are not the whole model, or are not what the page computes with."""
    config, folder = checkpoint.config, checkpoint.transformer
    if not own_code(config) <= architecture.own_code:
        raise BuildError(
            f"{config.path} has auto_map: code of its own computes this checkpoint, which is never run, and the "
            f"graph of {architecture.model_type!r} is not written for it: build it from an exported graph"
        )
    for key in ("quantization", "compression_config"):
        if key in config:
            raise BuildError(
                f"{config.path} has {key}: quantised weights of MLX or of an old compressed-tensors are not read; "
                "take the checkpoint that they were made from, or an exported graph with --onnx"
            )
    if is_listed(folder / "adapter_config.json"):
        raise BuildError(
            f"{folder} has an adapter (adapter_config.json), which changes the weights beside it: merge the two "
            "with peft, merge_and_unload() and save_pretrained(), and build what that writes"
        )


def graph_to_adopt(entry: CatalogEntry, checkpoint: Checkpoint, names: Collection[str]) -> str | None:
    """The exported graph among the `names` of the checkpoint's files that is built from, None for our own.

    It is the one that is asked for, or stands in where ours cannot be written from architecture and weights.
    Raises BuildError where there is neither.
    """
    exported = sorted(name for name in names if name.endswith(".onnx"))
    there_are = f"; it has {', '.join(exported)}" if exported else ""
    if entry.onnx is not None:
        if entry.onnx not in names:
            raise BuildError(f"the checkpoint has no {entry.onnx}{there_are}")
        return entry.onnx
    is_written = checkpoint.model_type in ARCHITECTURES
    in_folder = checkpoint.transformer.relative_to(checkpoint.folder)
    if is_written and any(str(in_folder / name) in names for name in (WEIGHTS, SHARDS)):
        return None
    if usual := next((name for name in GRAPHS if name in names), None):
        return usual
    if is_written and not exported:
        return None  # that there are no weights is said where they are read
    raise BuildError(
        f"{checkpoint.config.path} has model_type {checkpoint.model_type!r}; graphs are written for "
        f"{', '.join(ARCHITECTURES)} from safetensors, and others are adopted from {' or '.join(GRAPHS)}, or "
        f"the file that --onnx names{there_are}"
    )


def reading_of(static: Static, family: Family) -> dict[str, str]:
    """What the tokenizer's step is told of static embeddings."""
    return {
        "characters": str(static.characters * family.max_tokens),
        "dropped": json.dumps([] if static.dropped is None else [static.dropped]),
        "nothing": str(static.vocab_size),
    }


def embedding_models(
    entry: CatalogEntry, checkpoint: Checkpoint, family: Family, encoder: Model, reading: Mapping[str, str] = NONE
) -> list[Model]:
    """The family of an embedding model; where it also reranks, it does so as a bi-encoder.

    `reading` are more parameters of the tokenizer's step.
    """
    pooling = Pooling.of(checkpoint, family.hidden_size, entry.pooling, entry.normalise, entry.dimensions)
    dimensions, head = pooling.width, family.target.head
    facts = {"pooling": ", ".join(pooling.modes), "unit_length": "true" if pooling.unit_length else "false"}
    family = replace(family, facts={**family.facts, **facts})
    ensembles = [Model(repository.embed_ensemble(family, dimensions))]
    steps = [
        tokenizer(repository.tokenizer(family, checkpoint.prompts | entry.prompts, reading), checkpoint),
        *with_head(
            encoder, graph(repository.pooling(family, dimensions), head, lambda g: write_pooling(g, pooling))
        ),
    ]
    if "rerank" in entry.tasks:
        scoring = repository.cosine_scoring(family, dimensions)
        ensembles.append(Model(repository.bi_encoder_ensemble(family)))
        steps.append(graph(scoring, head, lambda g: write_cosine_scoring(g, dimensions)))
    return ensembles + steps


def check_ragged_results(entry: CatalogEntry, target: Target, exported: str | None) -> None:
    """Raises BuildError where nothing gives a text as many numbers as it happens to have."""
    if exported is not None:
        raise BuildError(
            f"{entry.name} would be adopted from {exported}, and {entry.tasks[0]} is written from weights only: "
            "take a checkpoint that has model.safetensors"
        )
    if target.feed.needs_width:
        raise NotPackedError(
            f"{entry.name} gives as many values as a text happens to have, which is not written for "
            f"{target.runtime}: build it for {others_than_packed(with_width=False)}"
        )


def multi_vector_models(
    entry: CatalogEntry,
    checkpoint: Checkpoint,
    family: Family,
    states: Model,
    vectors: MultiVector,
    plain: int,
    vocabulary: int,
) -> list[Model]:
    """The family of a model that gives a vector for each token, and reranks by them if asked to.

    Texts that are neither query nor document have `plain` tokens at most. Ids that are raised by `vocabulary` are
    of tokens that are seen by none.
    """
    if vectors.longest > family.max_tokens:
        raise BuildError(
            f"{checkpoint.transformer} reads queries or documents of {vectors.longest} tokens, over the "
            f"{family.max_tokens} that were asked for: say --max-tokens {vectors.longest} or more"
        )
    if "rerank" in entry.tasks and not vectors.has_sides:
        raise BuildError(
            f"{checkpoint.folder} says of no token that its vector counts in a score: leave rerank out"
        )
    if "rerank" in entry.tasks:
        if not vectors.unit_length:
            raise BuildError(
                f"{checkpoint.folder} gives vectors that need not have length 1, of which no score of 0 to 1 can "
                "be made: build it with --task embed_all"
            )
        checkpoint.library.require("similarity_fn_name", None, "maxsim", "MaxSim", "cosine", "dot")
    family = replace(family, facts={**family.facts, "dimensions": str(vectors.width)})
    prompts, window = checkpoint.prompts, family.max_tokens
    text = Side(plain, skipped=vectors.document.skipped, leading=vectors.document.leading)
    sides = {"": text, "query": vectors.query, "document": vectors.document} if vectors.has_sides else {}
    words = repository.sided_tokenizer(
        family, prompts, {name: one.parameter(window) for name, one in sides.items()}
    )
    if vectors.unseen and family.target.feed.packed:
        states = replace(states, config=repository.with_unseen(states.config, vocabulary))
    head = family.target.head
    ensembles = [Model(repository.vectors_ensemble(family, vectors.width, bool(sides)))]
    steps = [
        tokenizer(words if sides else repository.tokenizer(family, prompts), checkpoint),
        *with_head(
            states,
            graph(repository.vectors(family, vectors.width), head, lambda g: write_vectors(g, vectors)),
            sided=bool(sides),
        ),
    ]
    if "rerank" in entry.tasks:
        ensembles.append(Model(repository.maxsim_ensemble(family)))
        scoring = repository.maxsim_scoring(family, vectors.width)
        steps.append(graph(scoring, head, lambda g: write_maxsim(g, vectors.width)))
    return ensembles + steps


def sparse_models(
    checkpoint: Checkpoint, family: Family, states: Model, encoder: Dimensions, weights: Weights
) -> list[Model]:
    """The family of a model that weighs the words of its vocabulary, by a language model's head or by bge-m3's."""
    architecture = ARCHITECTURES[checkpoint.model_type]
    head = architecture.masked.get(checkpoint.architecture)
    facts = {"pooling": "splade" if head else "lexical", "dimensions": str(encoder.vocab_size)}
    family = replace(family, facts={**family.facts, **facts})
    write: Callable[[OnnxGraph], None]
    if head is not None:
        checkpoint.config.require("decoder_bias", True)
        write = partial(
            write_splade,
            encoder=encoder,
            weights=weights,
            head=head,
            splade=Splade.of(checkpoint, encoder.vocab_size),
            tied=is_tied(checkpoint.config),
        )
    elif architecture.lexical or architecture.weighs:
        layer = architecture.weighs
        write = partial(
            write_lexical,
            encoder=encoder,
            weights=weights if layer else lexical_weights(checkpoint),
            layer=layer,
            dropped=unweighed(checkpoint),
        )
    else:
        known = [name for one in ARCHITECTURES.values() for name in one.masked]
        raise BuildError(
            f"{checkpoint.config.path} is of {checkpoint.architecture or 'no class'}; sparse vectors are written "
            f"for {', '.join(known)}"
        )
    pooling = graph(repository.sparse_pooling(family), family.target.head, write)
    return [
        Model(repository.sparse_ensemble(family)),
        tokenizer(repository.tokenizer(family, checkpoint.prompts), checkpoint),
        *with_head(states, pooling),
    ]


def reranking_models(
    checkpoint: Checkpoint, family: Family, states: Model, encoder: Dimensions, weights: Weights
) -> list[Model]:
    """The family of a cross-encoder, or of a language model that is asked whether a passage answers."""
    reranker = reranker_of(checkpoint)
    if checkpoint.chat is not None:
        # Here, as few checkpoints have one, and Jinja takes time to load.
        from build.chat_template import read_chat_template

        reranker = replace(reranker, template=read_chat_template(checkpoint, checkpoint.chat))
    activation = score_activation(checkpoint)
    family = replace(family, facts={**family.facts, "activation": activation})
    check_one_score(checkpoint, family, reranker)
    if reranker.template is None:
        config = repository.pair_tokenizer(family)
    else:
        config = repository.template_tokenizer(family, reranker.template)
    tokens = checkpoint.tokenizer
    return [
        Model(repository.rerank_ensemble(family, reranker.is_instructed)),
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
        Model(repository.classifier_ensemble(family, len(names))),
        tokenizer(repository.classifier_tokenizer(family), checkpoint),
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


def with_head(encoder: Model, head: Model, sided: bool = False) -> list[Model]:
    """Encoder and head as the models that they are, or as one; `sided`, where the head reads ids of its own."""
    if not encoder.target.feed.one_step:
        return [encoder, head]
    return [replace(encoder, config=repository.with_head(encoder.config, head.config, sided), head=head)]


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


def headless_models(entry: CatalogEntry, checkpoint: Checkpoint, family: Family, adopted: Adopted) -> list[Model]:
    """The family of a graph that pools or scores by itself: nothing follows the encoder."""
    dimensions = None
    if adopted.gives == "embeddings":
        dimensions = adopted.dimensions(entry.dimensions)
        if adopted.normalise:  # if not, they may come so all the same
            family = replace(family, facts={**family.facts, "unit_length": "true"})
        words = repository.tokenizer(family, checkpoint.prompts | entry.prompts)
    else:
        check_no_prompt(checkpoint)
        family = replace(family, facts={**family.facts, "activation": adopted.activation})
        words = repository.pair_tokenizer(family)
    encoder = repository.headless_encoder(family, dimensions)
    return [
        Model(repository.headless_ensemble(family, words, encoder)),
        tokenizer(words, checkpoint),
        graph(encoder, family.target, lambda g: adopted.write(g, dimensions)),
    ]


def tokenizer(config: ModelConfig, checkpoint: Checkpoint) -> Model:
    """The tokenizer model with the checkpoint's tokenizer.json, or the one that is made of its words."""
    path, files = checkpoint.transformer / "tokenizer.json", (LONG_TEXT, DEADLINE, MEMORY)
    if checkpoint.made_tokenizer is None:
        return Model(config, step=TOKENIZER_STEP, files=(path, *files))
    return Model(config, step=TOKENIZER_STEP, files=files, made={path.name: checkpoint.made_tokenizer})


def graph(config: ModelConfig, target: Target, write_graph: Callable[[OnnxGraph], None]) -> Model:
    """A model of `model.onnx`, with the step that runs it where no backend of Triton's does."""
    step, files = None, tuple[Path, ...]()
    if target.feed.backend == "python":
        step, files = (TORCH_RUNNER_STEP, TORCH) if target.feed.packed else (ONNX_RUNNER_STEP, ())
        files = (REQUESTS, DEADLINE, MEMORY, *files)
    return Model(config, step, files=files, write_graph=write_graph, target=target)


def write_model(model: Model, folder: Path) -> None:
    """Writes one model folder as Triton mounts it."""
    # An ensemble has nothing to put there, yet Triton wants the version folder.
    version = folder / "1"
    version.mkdir(parents=True)
    (folder / "config.pbtxt").write_text(repository.render(model.config))
    if model.step is not None:
        shutil.copyfile(model.step, version / "model.py")
    for file in model.files:
        shutil.copyfile(file, version / file.name)
    for name, content in model.made.items():
        (version / name).write_text(content, encoding="utf-8")
    for name, content in model.beside.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    if model.write is not None:
        model.write(version)
    if model.write_graph is not None:
        with OnnxGraph(model.config.name, version / "model.onnx", model.target) as g:
            model.write_graph(g)
    if model.head is not None and model.head.write_graph is not None:
        with OnnxGraph(model.head.config.name, version / "head.onnx", model.head.target) as g:
            model.head.write_graph(g)


def facts_of(entry: CatalogEntry) -> dict[str, str]:
    """What the catalog says of the checkpoint that a caller may want to know."""
    if isinstance(entry.source, Path):
        facts = {"source": entry.source.name}
    else:
        name, _, revision = source_name(entry.source).replace("==", "@").partition("@")
        facts = {"source": name, "revision": revision}
    if entry.minimum_dimensions is not None:
        facts["minimum_dimensions"] = str(entry.minimum_dimensions)
    if entry.adapter is not None:
        facts["adapter"] = entry.adapter
    return facts


def files_of(folder: Path) -> set[str]:
    """Every file in a folder, by its path there."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def source_name(source: Wheel | Hub | Path) -> str:
    """Where a checkpoint is from, with its revision."""
    if isinstance(source, Hub):
        return f"{source.repository}@{source.revision}"
    return source.requirement if isinstance(source, Wheel) else source.name
