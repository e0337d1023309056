"""Configuration files of published models: ours are read up to the weights, all others are refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY
from safetensors.numpy import save_file
from tokenizers import Tokenizer, normalizers, processors

from build import catalog
from build.catalog import Hub
from build.errors import BuildError
from build.graphs.architectures import ARCHITECTURES
from build.graphs.dimensions import any_dimensions
from build.rendering.model_folder import write_model
from build.rendering.models import models_of
from build.sources.checkpoint import Checkpoint
from build.sources.labels import labels
from build.sources.obtain import describe
from build.sources.settings import Settings
from build.target import Target

MODELS: dict[str, dict[str, Any]] = json.loads((ROOT / "tests" / "reference" / "published.json").read_text())[
    "models"
]
REFUSED = {
    "avsolatorio/NoInstruct-small-Embedding-v0": "lists Transformer, Pooling, Pooling, Normalize",
    "Hum-Works/lodestone-base-4096-v1": "has auto_map",
    # A copy without the configuration of its Dense module.
    "hkunlp/instructor-xl": "has no config.json (looked in ",
    "infgrad/Jasper-Token-Compression-600M": "has auto_map",
    # A copy that was made small, but for its pooling.
    "sentence-transformers/multi-qa-distilbert-dot-v1": "pools vectors of 768 values, but the encoder gives 32",
    # Text in lower case, which its tokenizer does not make.
    "sentence-transformers/stsb-roberta-large": "does not lower case",
    "xlm-roberta reranker with code of its own": "has auto_map",
}
"""Models of types that we write, which are other models all the same -> what the sentence names."""

UNQUOTED = {
    *("StaticEmbedding", "camembert", "deberta-v2", "gte", "jina_embeddings_v3", "llama", "llama_bidirec"),
    *("model2vec", "qwen3_vl", "t5"),
}
"""Types of which no copy of an embedding model's files was found."""
OTHER_NAMES = {"jina_bert", "xlm_roberta_flash"}
"""Types that files call by another's name, or by none: Jina's by BERT's and XLM-RoBERTa's."""

TASKS = {"Qwen/Qwen3-Reranker-0.6B": "rerank"}
"""What a language model must be told that it is for."""

UNNAMED = {"jinaai/jina-reranker-v2-base-multilingual"}
"""Whose type follows from the code that it names."""
OTHERS = [
    name
    for name, files in MODELS.items()
    if files["config.json"].get("model_type") not in ARCHITECTURES and name not in UNNAMED
]
WRITTEN = sorted(set(MODELS) - set(OTHERS) - set(REFUSED))
MODULES = [
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{path[2:] or 'Transformer'}"}
    for i, path in enumerate(["", "1_Pooling"])
]


def restored(value: Any) -> Any:
    """The fact as a file has it: an empty map or text where it was only counted."""
    if isinstance(value, dict):
        return {key: restored(part) for key, part in value.items()}
    counted = isinstance(value, str) and re.fullmatch(r"<\d+ (entries|characters|templates)>", value)
    return ({} if counted[1] == "entries" else "") if counted else value


def checkpoint(name: str, folder: Path) -> Checkpoint:
    """The model without a single weight; files that its copy lacks are as plain as can be."""
    files = {path: restored(content) for path, content in MODELS[name].items() if path != "source"}
    config = files["config.json"]
    files.setdefault("tokenizer_config.json", {})
    if not config["architectures"][0].endswith(("Classification", "CausalLM")):
        files.setdefault("modules.json", MODULES)
        width = config.get("hidden_size", config.get("n_embd"))
        files.setdefault("1_Pooling/config.json", {"word_embedding_dimension": width, "pooling_mode": "mean"})
    for path, content in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    save_file({}, folder / "model.safetensors")
    tokenizer_for(files["tokenizer_config.json"]).save(str(folder / "tokenizer.json"))
    return Checkpoint(folder)


def tokenizer_for(config: dict[str, Any]) -> Tokenizer:
    """A tokenizer that does what the file says: nobody quotes the real one's megabytes."""
    unknown = config.get("unk_token")
    unigram = (unknown["content"] if isinstance(unknown, dict) else unknown) == "<unk>"
    tokenizer = Tokenizer.from_file(str(TINY / ("xlm-roberta" if unigram else "bert-cls") / "tokenizer.json"))
    tokenizer.normalizer = None
    if not unigram and ("do_lower_case" in config or "Bert" in config.get("tokenizer_class", "Bert")):
        tokenizer.normalizer = normalizers.BertNormalizer(
            lowercase=config.get("do_lower_case", True), strip_accents=config.get("strip_accents")
        )
    said = {name: token for name, token in config.items() if name.endswith("_token") and token is not None}
    tokens = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in said.items()
        if not isinstance(token, bool)
    }
    extra = config.get("extra_special_tokens") or {}
    lists = [
        *(config.get("additional_special_tokens") or []),
        *(extra.values() if isinstance(extra, dict) else extra),
    ]
    tokenizer.add_special_tokens([*tokens.values(), *lists])
    ends = [tokens[f"{name}_token"] if config.get(f"add_{name}_token") else "" for name in ("bos", "eos")]
    if any(ends):
        ids = [(end, tokenizer.token_to_id(end)) for end in ends if end]
        tokenizer.post_processor = processors.TemplateProcessing(
            " ".join([ends[0], "$A", ends[1]]).strip(), None, ids
        )
    return tokenizer


def problems(name: str, folder: Path) -> list[str]:
    """What the build of each graph says, or of the family before there is one."""
    model = checkpoint(name, folder)
    said = []
    try:
        parts = models_of(describe(folder, "published", TASKS.get(name)), model, Target())
    except BuildError as error:
        return [str(error)]
    for part in parts:
        try:
            write_model(part, folder / "built" / part.config.name)
        except BuildError as error:
            said.append(str(error))
    return said


def test_there_are_enough() -> None:
    assert len(MODELS) > 70
    assert len(WRITTEN) > 50
    found = {MODELS[name]["config.json"]["model_type"] for name in set(WRITTEN) - UNNAMED}
    assert found == set(ARCHITECTURES) - UNQUOTED - OTHER_NAMES


@pytest.mark.parametrize("name", WRITTEN)
def test_nothing_but_weights_is_missing(name: str, tmp_path: Path) -> None:
    said = problems(name, tmp_path)
    assert [text for text in said if not re.search(r"have no tensor|has no \S*model\.safetensors", text)] == []
    assert said


@pytest.mark.parametrize("name", OTHERS)
def test_other_types_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (said,) = problems(name, tmp_path)
    model_type = MODELS[name]["config.json"].get("model_type", "")
    assert f"has model_type {model_type!r}" in said or "code of its own computes it" in said


def test_a_language_model_is_told_what_it_is_for(tmp_path: Path) -> None:
    model = checkpoint("Qwen/Qwen3-Reranker-0.6B", tmp_path)
    with pytest.raises(BuildError, match="say --task rerank if it answers yes or no"):
        describe(model.folder, "published")
    with pytest.raises(BuildError, match="say --task rerank if in those of Qwen3-Reranker"):
        describe(TINY / "qwen3-classifier", "published")


PUBLISHED_PAGES = [
    name
    for name in catalog.names()
    if isinstance(source := catalog.load(name).source, Hub) and source.repository in MODELS
]
OWN_WINDOWS = {"nomic-embed-text-v1.5"}
"""Pages whose window is not the one that sentence-transformers' file says: each says why."""
OTHER_LAYERS = {
    "e5-mistral-7b-instruct",
    "embeddinggemma-300m",
    "gte-large-en-v1.5",
    "gte-multilingual-base",
    "jina-embeddings-v2-base-en",
    "nomic-embed-text-v1.5",
    "nomic-embed-text-v2-moe",
    "qwen3-embedding-0.6b",
    "qwen3-reranker-0.6b",
}
"""Pages of models that are not made of BERT's layers."""


def test_enough_pages_have_published_files() -> None:
    assert len(PUBLISHED_PAGES) >= 20


@pytest.mark.parametrize("name", PUBLISHED_PAGES)
def test_a_page_agrees_with_the_published_files(name: str, tmp_path: Path) -> None:
    entry = catalog.load(name)
    assert isinstance(entry.source, Hub)
    assert entry.max_tokens
    files = MODELS[entry.source.repository]
    found = any_dimensions(Settings(tmp_path, files["config.json"]))
    assert entry.source.repository in UNNAMED or files["config.json"]["model_type"] in ARCHITECTURES
    assert entry.max_tokens <= found.positions
    assert entry.width in (None, found.hidden_size)
    window = files.get("sentence_bert_config.json", {}).get("max_seq_length")
    assert name in OWN_WINDOWS or window in (None, entry.max_tokens)
    kind, *_ = files["config.json"]["architectures"]
    assert kind.endswith("ForCausalLM") or (entry.tasks == ("rerank",)) == kind.endswith("Classification")


@pytest.mark.parametrize("name", sorted(set(PUBLISHED_PAGES) - OTHER_LAYERS))
def test_a_page_counts_its_weights(name: str) -> None:
    """Tables of embeddings, four projections and two layers of the feed-forward part: the rest is below 2 %."""
    entry = catalog.load(name)
    assert isinstance(entry.source, Hub)
    config = MODELS[entry.source.repository]["config.json"]
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    tables = config["vocab_size"] + config["max_position_embeddings"] + config.get("type_vocab_size", 0)
    count = width * (tables + layers * (4 * width + 2 * config["intermediate_size"]))
    assert entry.parameters == pytest.approx(count / 1e6, rel=0.02, abs=0.7)


SIZES = {
    # RoBERTa's positions are counted from the padding token's id on, which has the first row.
    "sentence-transformers/stsb-roberta-large": (1024, 50265, 512, 2, 1, 1),
    "sentence-transformers/all-mpnet-base-v2": (768, 30527, 512, 2, 1, 1),
    "intfloat/multilingual-e5-base": (768, 250002, 512, 2, 1, 1),
    "sentence-transformers/distilbert-base-nli-mean-tokens": (768, 30522, 512, 0, 1, 0),
    "google/electra-base-discriminator": (768, 30522, 512, 0, 2, 0),
    "nomic-ai/nomic-embed-text-v1.5": (768, 30528, 8192, 0, 2, 0),
    "hkunlp/instructor-xl": (1024, 32128, 512, 0, 1, 0),
    "hotchpotch/japanese-reranker-xsmall-v2": (256, 102400, 8192, 0, 1, 3),
}
"""Of models whose exported graphs may be adopted, by their papers and cards."""


@pytest.mark.parametrize("name", SIZES)
def test_dimensions_of_any_type(name: str, tmp_path: Path) -> None:
    found = any_dimensions(Settings(tmp_path, MODELS[name]["config.json"]))
    positions = found.positions, found.first_position
    assert (found.hidden_size, found.vocab_size, *positions, found.token_types, found.padding) == SIZES[name]


@pytest.mark.parametrize("model_type", ["camembert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"])
def test_positions_behind_the_padding_tokens(model_type: str, tmp_path: Path) -> None:
    """Whose id is 1 where the configuration says none, as in transformers' own for these."""
    config = {"model_type": model_type, "hidden_size": 8, "vocab_size": 9, "max_position_embeddings": 514}
    found = any_dimensions(Settings(tmp_path, config))
    assert (found.positions, found.first_position) == (512, 2)


@pytest.mark.parametrize(
    ("said", "count"), [({}, 2), ({"num_labels": 3}, 3), ({"_num_labels": 1}, 1), ({"id2label": {"0": "a"}}, 1)]
)
def test_labels_by_every_name(said: dict[str, Any], count: int, tmp_path: Path) -> None:
    """Without one transformers makes two."""
    assert labels(Settings(tmp_path, said)) == count


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_of_our_types_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (said,) = problems(name, tmp_path)
    assert REFUSED[name] in said
