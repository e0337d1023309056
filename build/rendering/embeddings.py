"""The models of families that give one vector a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from build.catalog import CatalogEntry
from build.graphs.pooling import Pooling, write_pooling
from build.graphs.scoring import write_cosine_scoring
from build.rendering import ensembles, repository
from build.rendering.contract import Family
from build.rendering.model_folder import Model, graph, tokenizer, with_head
from build.sources.checkpoint import Checkpoint

NONE: Mapping[str, str] = {}


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
    called = [Model(ensembles.embed(family, dimensions))]
    steps = [
        tokenizer(repository.tokenizer(family, checkpoint.prompts | entry.prompts, reading), checkpoint),
        *with_head(
            encoder, graph(repository.pooling(family, dimensions), head, lambda g: write_pooling(g, pooling))
        ),
    ]
    if "rerank" in entry.tasks:
        scoring = repository.cosine_scoring(family, dimensions)
        called.append(Model(ensembles.bi_encoder(family)))
        steps.append(graph(scoring, head, lambda g: write_cosine_scoring(g, dimensions)))
    return called + steps
