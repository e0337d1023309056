"""The Triton models of one family: which there are, and what they have in common."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from build.catalog import CatalogEntry
from build.errors import BuildError, UnsupportedRuntimeError
from build.graphs.adopted import Adopted
from build.graphs.architectures import ARCHITECTURES, Architecture
from build.graphs.colbert import read_multi_vector
from build.graphs.dimensions import Dimensions, any_dimensions
from build.graphs.multi_vector import MultiVector
from build.graphs.static import Static, measured
from build.graphs.unread import HARMLESS
from build.rendering import ensembles, repository
from build.rendering.contract import Family
from build.rendering.embeddings import embedding_models
from build.rendering.model_folder import Model, graph, tokenizer
from build.rendering.scores import check_no_prompt, classifying_models, reranking_models
from build.rendering.tokens import check_has_weights, multi_vector_models, sparse_models
from build.runtimes import runtimes_for
from build.sources.checkpoint import Checkpoint, own_code
from build.sources.files import GRAPHS, SHARDS, WEIGHTS, files_of, is_listed
from build.sources.quantised import Quantised
from build.sources.settings import check_nothing_is_left
from build.sources.tokenization import check_tokenizer
from build.target import Target

SCALES_BY_BATCH = (
    "its graph is quantised dynamically, so a text's result depends a little on what it is computed beside; "
    "for the same bits in any batch take an fp32 or fp16 graph"
)


def models_of(entry: CatalogEntry, checkpoint: Checkpoint, target: Target) -> list[Model]:
    """Every model of the family, the ensembles that callers use first.

    Raises BuildError for what the checkpoint says and nothing here reads. Of its weights nothing is opened yet.
    """
    exported = graph_to_adopt(entry, checkpoint, files_of(checkpoint.folder))
    if exported is not None and entry.adapter is not None:
        raise BuildError(
            f"{entry.name} would be built from the exported graph {exported}, and adapters are added to weights "
            "only: leave --adapter out"
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
        check_has_weights(entry, exported)
    if "classify" in entry.tasks and exported is not None:
        raise BuildError(
            f"{entry.name} would be built from the exported graph {exported}, and classifiers of several labels "
            "are written from weights only: take a checkpoint that has model.safetensors"
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
    if target.traits.packed_attention and not architecture.packed_attention:
        raise UnsupportedRuntimeError(
            f"{entry.name} is of {architecture.model_type!r}, whose biases in attention are not written for "
            f"{target.runtime}: build it for {runtimes_for(entry.tasks, rows=True)}"
        )
    check_weights_are_plain(checkpoint, architecture)
    quantised = Quantised.of(checkpoint.config)
    encoder = read_encoder(entry, checkpoint, architecture)
    weights = checkpoint.weights(checkpoint.transformer, architecture.prefixes, architecture.unused, quantised)
    if isinstance(encoder, Static):
        encoder = measured(encoder, checkpoint, weights)
    vectors, longest = None, 0
    if "embed_all" in entry.tasks:
        vectors = read_multi_vector(checkpoint, encoder, weights, architecture.lexical)
        check_queries(checkpoint, architecture, encoder, vectors)
        encoder = replace(encoder, unseen_offset=encoder.vocab_size if vectors.unseen else 0)
        longest = vectors.longest
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


def read_encoder(entry: CatalogEntry, checkpoint: Checkpoint, architecture: Architecture) -> Dimensions:
    """The sizes of the encoder, as the entry wants it; raises BuildError where it cannot be had so."""
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
    is_pair = entry.tasks[0] in ("rerank", "classify") and checkpoint.architecture in architecture.rerankers
    if is_pair and encoder.token_types > 1 and checkpoint.feeds_token_types:
        encoder = replace(encoder, segment_offset=encoder.vocab_size)
    return encoder


def check_queries(
    checkpoint: Checkpoint, architecture: Architecture, encoder: Dimensions, vectors: MultiVector
) -> None:
    """Raises BuildError where the encoder cannot read queries and documents as the checkpoint has them read."""
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
    if vectors.longest > encoder.positions:
        raise BuildError(
            f"{checkpoint.transformer} reads queries or documents of {vectors.longest} tokens, over its window of "
            f"{encoder.positions}: make their lengths as short"
        )


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
    if target.traits.packed_attention:
        raise UnsupportedRuntimeError(
            f"{entry.name} would be built from the exported graph {name}, and {target.runtime} runs only graphs "
            f"that are written here from the weights: build it for {runtimes_for(entry.tasks, rows=True)}"
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
    texts = max(entry.batching.texts, target.traits.least_texts)
    if not target.traits.step:
        # Triton counts texts, and all of them may be as long as the longest or take its width in attention.
        texts = min(texts, max(1, entry.batching.tokens // max_tokens))
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
        {**entry.facts, **facts},
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
    """Raises BuildError where the tensors are not the whole model, or are not what the graph computes with."""
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
        words = repository.pair_tokenizer(family, adopted.encoder.segment_offset)
    encoder = repository.headless_encoder(family, dimensions)
    return [
        Model(ensembles.headless(family, words, encoder)),
        tokenizer(words, checkpoint),
        graph(encoder, family.target, lambda g: adopted.write(g, dimensions)),
    ]
