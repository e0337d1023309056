"""The tiny checkpoints with random weights: one or more of each architecture of the registry."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conftest import REFERENCE, TINY

from build import make
from build.catalog import CatalogEntry
from build.graphs.architectures import ARCHITECTURES
from build.sources.checkpoint import Checkpoint
from build.sources.obtain import describe

FIXTURES = {
    "StaticEmbedding": ("static",),
    "bert": ("bert-cls", "bert-cross-encoder"),
    "camembert": ("camembert", "camembert-cross-encoder"),
    "deberta-v2": ("deberta", "deberta-cross-encoder"),
    "distilbert": ("distilbert", "distilbert-cross-encoder"),
    "electra": ("electra", "electra-cross-encoder"),
    "gemma3_text": ("gemma3",),
    "gte": ("gte",),
    "jina_bert": ("jina-bert", "jina-bert-code", "jina-reranker"),
    "jina_embeddings_v3": ("jina-v3",),
    "xlm_roberta_flash": ("jina-flash-reranker",),
    "llama": ("llama",),
    "llama_bidirec": ("nemotron-reranker",),
    "mistral": ("mistral",),
    "model2vec": ("model2vec", "model2vec-mapped"),
    "modernbert": ("modernbert", "modernbert-reranker"),
    "mpnet": ("mpnet", "mpnet-cross-encoder"),
    "new": ("new", "new-reranker"),
    "nomic_bert": ("nomic-bert", "nomic-bert-moe"),
    "qwen2": ("mxbai-reranker", "qwen2"),
    "qwen3": ("qwen3-classifier", "qwen3-embedding", "qwen3-reranker", "voyage"),
    "qwen3_vl": ("qwen3-vl-reranker",),
    "roberta": ("roberta", "roberta-cross-encoder"),
    "t5": ("t5", "t5-gated"),
    "xlm-roberta": ("xlm-roberta", "cross-encoder"),
}
"""Key of ARCHITECTURES -> its tiny checkpoints; each has at least one."""
assert FIXTURES.keys() == ARCHITECTURES.keys()

NAMES = sorted(name for names in FIXTURES.values() for name in names)


def is_reranker(name: str) -> bool:
    """Of what its own files say: a module scores, or it has a head by its class, and nothing pools behind it."""
    checkpoint = Checkpoint(TINY / name)
    heads = [reranker for one in ARCHITECTURES.values() for reranker in one.rerankers]
    kinds = [module.kind for module in checkpoint.modules]
    return "LogitScore" in kinds or (checkpoint.architecture in heads and "Pooling" not in kinds)


STATIC = [name for kind, one in ARCHITECTURES.items() if one.static for name in FIXTURES[kind]]
"""Those without layers."""
PACKED = [name for kind, one in ARCHITECTURES.items() if one.packed_attention for name in FIXTURES[kind]]
"""Those whose attention also runs on packed tokens."""
RERANKERS = [name for name in NAMES if is_reranker(name)]
EMBEDDERS = [name for name in NAMES if name not in RERANKERS]


def task(name: str) -> str:
    """A language model does not say it by itself."""
    return "rerank" if name in RERANKERS else "embed"


VARIANTS: dict[str, dict[str, Any]] = json.loads((REFERENCE / "variants.json").read_text())
"""Name -> a fixture, and the keys of its config.json that are changed."""


def variant(name: str, folder: Path) -> Path:
    """The checkpoint of a variant, written there."""
    shutil.copytree(TINY / VARIANTS[name]["fixture"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | VARIANTS[name]["config"]))
    return folder


def tiny_entry(name: str) -> CatalogEntry:
    """What a build of the checkpoint is asked for."""
    return describe(TINY / name, name, task(name))


def build_tiny(names: Iterable[str], *options: str) -> None:
    """Builds each by the command, with more of its options."""
    for name in names:
        assert make.main([str(TINY / name), "--task", task(name), *options]) == 0
