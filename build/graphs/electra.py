"""ELECTRA (Clark et al., 2020, arXiv:2003.10555), its discriminator: BERT whose embeddings may be narrower."""

from __future__ import annotations

from dataclasses import replace

from build.graphs.bert import Bert
from build.sources.settings import Settings


def read_electra(config: Settings) -> Bert:
    """Reads the configuration, with transformers' defaults; BuildError on what is not written, naming the key."""
    bert = Bert.of(config, hidden_size=256, heads=4, inner=1024)
    return replace(bert, embedding_size=config.integer("embedding_size", default=128))
