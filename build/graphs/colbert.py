"""How checkpoints of ColBERT (Khattab, 2020, arXiv:2004.12832) say what they are, other than by modules alone.

PyLate lists a Transformer and Dense modules, and says in `config_sentence_transformers.json` how either side is
read. Stanford's own files are a BERT of class HF_ColBERT with a matrix `linear.weight`, and `artifact.metadata`.
bge-m3 (Chen et al., 2024, arXiv:2402.03216) keeps a layer in a file of its own, and drops the vector of the first
token. Norm and skiplist are in the code of each, so they are added here.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Iterator
from dataclasses import replace

from build.errors import BuildError
from build.graphs.dimensions import Dimensions
from build.graphs.modules import Dense, Module, Normalize
from build.graphs.multi_vector import VECTORS, MultiVector, Side, filling, ids_of
from build.sources.checkpoint import METADATA, Checkpoint
from build.sources.files import COLBERT_LINEAR, is_listed
from build.sources.settings import Settings
from build.sources.weights import Weights

HARMLESS = (
    # What is written for people beside the ids of both markers.
    *("query_token", "doc_token", "meta", "version"),
    # How it was trained.
    *("bsize", "accumsteps", "lr", "maxsteps", "save_every", "resume", "warmup", "warmup_bert", "relu", "nway"),
    *("use_ib_negatives", "reranker", "distillation_alpha", "ignore_scores", "model_name", "checkpoint"),
    *("triples", "collection", "queries", "overwrite", "root", "experiment", "index_root", "name", "rank"),
    *("nranks", "amp", "gpus", "avoid_fork_if_possible", "total_visible_gpus"),
    # How documents are indexed and searched for.
    *("index_name", "index_path", "index_bsize", "nbits", "kmeans_niters", "ncells", "ndocs"),
    *("centroid_score_threshold", "load_index_with_mmap", "pool_factor", "clustering_mode", "protected_tokens"),
)
"""Keys of `artifact.metadata` that change no vector."""


def read_multi_vector(checkpoint: Checkpoint, encoder: Dimensions, weights: Weights, lexical: bool) -> MultiVector:
    """Reads what stands behind the transformer, in whichever of the ways; BuildError on what is not written."""
    hidden, size = encoder.hidden_size, encoder.vocab_size
    if checkpoint.is_stanford:
        return _stanford(checkpoint, hidden, size, weights)
    if checkpoint.is_pylate:
        return _pylate(checkpoint, hidden, size)
    if lexical and is_listed(checkpoint.transformer / f"{COLBERT_LINEAR}.safetensors"):
        return _bge_m3(checkpoint, hidden)
    return MultiVector.of(checkpoint, hidden, size)


def pickled_head(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """bge-m3's layer, with a sentence on it, where the `names` of a checkpoint's files only have it pickled."""
    pickle = f"{COLBERT_LINEAR}.pt"
    if pickle in names and f"{COLBERT_LINEAR}.safetensors" not in names:
        yield (
            pickle,
            f"the checkpoint has {pickle}, the layer behind each token, which is a pickle and can run code when "
            f"it is read: save what it holds as {COLBERT_LINEAR}.safetensors; or take the states without it",
        )


def _stanford(checkpoint: Checkpoint, hidden: int, vocabulary: int, weights: Weights) -> MultiVector:
    said = checkpoint.settings(checkpoint.transformer / METADATA)
    said.skip(HARMLESS)
    said.require("similarity", "cosine")
    said.require("interaction", "colbert")
    dense = Dense("linear", weights, hidden, said.integer("dim", default=128), False, "Identity", False)
    skipped = list(string.punctuation) if said.flag("mask_punctuation", default=True) else []
    query, document = (
        Side(
            said.integer(f"{name}_maxlen"),
            marker=_marker(checkpoint, said, f"{name}_token_id", said.word(f"{name}_token_id", default=usual)),
        )
        for name, usual in (("query", "[unused0]"), ("doc", "[unused1]"))
    )
    attend = said.flag("attend_to_mask_tokens", default=False)
    query = replace(
        query, least=query.max_tokens or 0, filling=filling(checkpoint, said) + vocabulary * (not attend)
    )
    document = replace(document, skipped=ids_of(checkpoint, skipped))
    return MultiVector(hidden, (dense, Normalize(dense.width)), query, document, not attend)


def _pylate(checkpoint: Checkpoint, hidden: int, vocabulary: int) -> MultiVector:
    kinds = [module.kind for module in checkpoint.modules]
    if kinds[:1] != ["Transformer"] or set(kinds[1:]) != {"Dense"}:
        raise BuildError(
            f"{checkpoint.folder / 'modules.json'} lists {', '.join(kinds)}; PyLate's vectors of tokens are "
            "written for Transformer and Dense"
        )
    modules: list[Module] = []
    for module in checkpoint.modules[1:]:
        width = modules[-1].width if modules else hidden
        modules.append(Dense.of(checkpoint, module.path, width, VECTORS))
    said = checkpoint.library
    query, document = (
        Side(
            said.integer(f"{name}_length"),
            marker=_marker(checkpoint, said, f"{name}_prefix", said.word(f"{name}_prefix")),
        )
        for name in ("query", "document")
    )
    expands = said.flag("do_query_expansion", default=True)
    attend = said.flag("attend_to_expansion_tokens", default=False) or not expands
    if expands:
        own = filling(checkpoint, said) + vocabulary * (not attend)
        query = replace(query, least=query.max_tokens or 0, filling=own)
    words = said.words("skiplist_words", default=list(string.punctuation))
    document = replace(document, skipped=ids_of(checkpoint, words))
    norm = Normalize(modules[-1].width)
    return MultiVector(hidden, (*modules, norm), query, document, not attend)


def _bge_m3(checkpoint: Checkpoint, hidden: int) -> MultiVector:
    weights = checkpoint.weights(checkpoint.transformer, file=f"{COLBERT_LINEAR}.safetensors")
    width = weights.shape("weight")[0]
    dense = Dense(COLBERT_LINEAR, weights, hidden, width, True, "Identity", False, layer="")
    side = Side(leading=1)
    return MultiVector(hidden, (dense, Normalize(width)), side, side)


def _marker(checkpoint: Checkpoint, said: Settings, key: str, word: str) -> int | None:
    """The id that is put behind a text's first token; None for no word."""
    if not word:
        return None
    marker = checkpoint.tokenizer.token_to_id(word)
    if marker is None:
        raise BuildError(
            f"{said.path} has {key} = {word!r}, which is no token of tokenizer.json, so that it has no vector: "
            "add it there as the one that it was trained as"
        )
    if checkpoint.tokenizer.encode("a").special_tokens_mask[:1] != [1]:
        raise BuildError(
            f"{said.path} has {key} = {word!r}, but tokenizer.json puts no special token before a text: libraries "
            "differ in where they put the marker then"
        )
    return marker
