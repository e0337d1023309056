"""The models of families that give a text as many numbers as its tokens ask for: vectors, or weights of words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from build.catalog import CatalogEntry
from build.errors import BuildError
from build.graphs.architectures import ARCHITECTURES
from build.graphs.dimensions import Dimensions
from build.graphs.multi_vector import MultiVector, Side, write_maxsim, write_vectors
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.sparse import Splade, is_tied, lexical_weights, unweighed, write_lexical, write_splade
from build.rendering import ensembles, repository
from build.rendering.contract import Family
from build.rendering.model_folder import Model, graph, tokenizer, with_head
from build.sources.checkpoint import Checkpoint
from build.sources.weights import Weights


def check_has_weights(entry: CatalogEntry, exported: str | None) -> None:
    """Raises BuildError where an `exported` graph is all that there is: it gives every text as many numbers."""
    if exported is not None:
        raise BuildError(
            f"{entry.name} would be built from the exported graph {exported}, and {entry.tasks[0]} is written "
            "from weights only: take a checkpoint that has model.safetensors"
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
    if vectors.unseen and family.target.traits.packed_attention:
        states = replace(states, config=repository.with_unseen(states.config, vocabulary))
    head = family.target.head
    called = [Model(ensembles.vectors(family, vectors.width, bool(sides)))]
    steps = [
        tokenizer(words if sides else repository.tokenizer(family, prompts), checkpoint),
        *with_head(
            states,
            graph(repository.vectors(family, vectors.width), head, lambda g: write_vectors(g, vectors)),
            sided=bool(sides),
        ),
    ]
    if "rerank" in entry.tasks:
        called.append(Model(ensembles.maxsim(family)))
        scoring = repository.maxsim_scoring(family, vectors.width)
        steps.append(graph(scoring, head, lambda g: write_maxsim(g, vectors.width)))
    return called + steps


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
    elif architecture.lexical or architecture.word_classifier:
        layer = architecture.word_classifier
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
        Model(ensembles.sparse(family)),
        tokenizer(repository.tokenizer(family, checkpoint.prompts), checkpoint),
        *with_head(states, pooling),
    ]
