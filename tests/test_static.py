"""Static embeddings beside their fixtures: layouts, refusals, and texts without tokens or past any window."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, Stack
from safetensors.numpy import load_file, save_file
from test_accounts import copied, edit, graphs
from tokenizers import Tokenizer, processors

from build import make
from build.errors import BuildError
from build.rendering.models import models_of
from build.sources.checkpoint import Checkpoint
from build.sources.obtain import describe
from build.target import Target


def parameters(folder: Path) -> dict[str, str]:
    """What the tokenizer's step of a family is told."""
    entry = describe(folder, "static")
    (config,) = (
        model.config
        for model in models_of(entry, Checkpoint(folder), Target())
        if model.config.name == "static-tokenizer"
    )
    return {key: item.string_value for key, item in config.parameters.items()}


def in_root(folder: Path) -> None:
    """As sentence-transformers 5 and later save it, beside a configuration that it does not read."""
    for path in (folder / "0_StaticEmbedding").iterdir():
        path.rename(folder / path.name)
    (folder / "0_StaticEmbedding").rmdir()
    (folder / "config.json").write_text('{"model_type": "bert", "hidden_size": 7}')
    edit(folder / "modules.json", lambda modules: modules[0].update(path=""))


def without_modules(folder: Path) -> None:
    """As model2vec's first versions saved it."""
    (folder / "modules.json").unlink()


def with_other_files(folder: Path) -> None:
    """Those of a tokenizer's class, which neither reference reads."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "sentence_bert_config.json"):
        (folder / name).write_text('{"unk_token": "<x>", "max_seq_length": 7, "tokenizer_class": "BertTokenizer"}')


SAME: dict[str, tuple[str, Callable[[Path], None]]] = {
    "static in the root": ("static", in_root),
    "model2vec without modules": ("model2vec", without_modules),
    "model2vec with other files": ("model2vec", with_other_files),
}


@pytest.mark.parametrize("case", SAME)
def test_layouts_give_the_same_bytes(case: str, tmp_path: Path) -> None:
    name, change = SAME[case]
    expected = graphs(copied(name, tmp_path / "one"), tmp_path / "expected")
    folder = copied(name, tmp_path / "other")
    change(folder)
    assert graphs(folder, tmp_path / "found") == expected


def test_names_of_sentence_transformers_are_read_of_model2vec_too(tmp_path: Path) -> None:
    """The other library reads either table by either name."""
    expected = graphs(copied("static", tmp_path / "one"), tmp_path / "expected")
    folder = copied("static", tmp_path / "other")
    file = folder / "0_StaticEmbedding" / "model.safetensors"
    save_file({"embeddings": load_file(file)["embedding.weight"]}, file)
    assert graphs(folder, tmp_path / "found") == expected


def test_weights_and_rows_are_folded_into_a_table(tmp_path: Path) -> None:
    """The same vectors, whether a token shares its row and weighs less or has a row that says so."""
    expected = graphs(copied("model2vec-mapped", tmp_path / "one"), tmp_path / "expected")
    folder = copied("model2vec-mapped", tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    table = tensors["embeddings"][tensors["mapping"]].astype(np.float32) * tensors["weights"][:, None]
    save_file({"embeddings": table}, folder / "model.safetensors")
    assert graphs(folder, tmp_path / "found") == expected


REFUSED: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "two words on the norm": (
        "model2vec",
        r"lists StaticEmbedding, Normalize, but \S*config.json has normalize = false: libraries differ",
        lambda folder: edit(folder / "config.json", lambda values: values.update(normalize=False)),
    ),
    "rows that are not there": (
        "model2vec-mapped",
        r"has mapping with the rows 0 to 999, and embeddings has 265",
        lambda folder: save_file(
            (tensors := load_file(folder / "model.safetensors"))
            | {"mapping": np.where(np.arange(len(tensors["mapping"])) == 5, 999, tensors["mapping"] * 0)},
            folder / "model.safetensors",
        ),
    ),
    "no table": (
        "model2vec",
        r"has embeddings of shape \[48\], which is no table of vectors",
        lambda folder: save_file({"embeddings": np.zeros(48, np.float32)}, folder / "model.safetensors"),
    ),
    "fewer rows than words": (
        "model2vec",
        r"says that the encoder knows 48: the two are of different checkpoints",
        lambda folder: save_file({"embeddings": np.zeros((48, 48), np.float32)}, folder / "model.safetensors"),
    ),
    "a text's end is read": (
        "static",
        r"tokenizer.json has truncation.direction = \"Left\"",
        lambda folder: edit(
            folder / "0_StaticEmbedding" / "tokenizer.json",
            lambda values: values["truncation"].update(direction="Left"),
        ),
    ),
    "a transformer behind it": (
        "static",
        r"lists Transformer behind StaticEmbedding",
        lambda folder: edit(
            folder / "modules.json",
            lambda modules: modules[1].update(type="sentence_transformers.models.Transformer"),
        ),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    name, sentence, change = REFUSED[case]
    folder = copied(name, tmp_path)
    change(folder)
    with pytest.raises(BuildError, match=sentence):
        graphs(folder, tmp_path / "found")


def test_another_pooling_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make.main([str(TINY / "static"), "--pooling", "cls", "--repository", str(tmp_path)]) == 1
    assert "which are pooled by their mean: leave --pooling out" in capsys.readouterr().err


def test_a_window_of_model2vec(tmp_path: Path) -> None:
    """In tokens and characters: 512 where nothing is said, none where null is."""
    median = int(parameters(TINY / "model2vec")["characters"]) // 64
    words = Tokenizer.from_file(str(TINY / "model2vec" / "tokenizer.json")).get_vocab()
    assert median == int(np.median([len(word) for word in words]))
    for said, tokens, characters in (({"max_length": None}, 32768, 0), ({}, 512, 512 * median)):
        folder = copied("model2vec", tmp_path / str(tokens))
        edit(folder / "config.json", lambda values, said=said: (values.pop("max_length"), values.update(said)))
        found = parameters(folder)
        assert (int(found["max_tokens"]), int(found["characters"])) == (tokens, characters)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """`static` without a window, and with tokens that its tokenizer would put around a text."""
    folder = tmp_path_factory.mktemp("static")
    checkpoint = copied("static", folder)
    tokenizer = Tokenizer.from_file(str(checkpoint / "0_StaticEmbedding" / "tokenizer.json"))
    tokenizer.no_truncation()
    ends = [(end, tokenizer.token_to_id(end)) for end in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    tokenizer.save(str(checkpoint / "0_StaticEmbedding" / "tokenizer.json"))
    repository = ["--repository", str(folder / "repository")]
    for path in (checkpoint, TINY / "model2vec"):
        assert make.main([str(path), *repository]) == 0
    stack = Stack(folder, [*repository, "--models", "static", "model2vec"]).start()
    yield stack
    assert stack.stop() == 0


def test_a_long_text_is_read_whole(stack: Stack) -> None:
    """Its vector is the mean of its tokens' rows, by arithmetic."""
    folder = TINY / "static" / "0_StaticEmbedding"
    table = load_file(folder / "model.safetensors")["embedding.weight"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    text = "The bees sleep when snow falls on the old harbour. " * 1200
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    mean = table[ids].mean(axis=0, dtype=np.float64)
    answer = stack.infer("static", text=[text])
    assert (answer["token_count"].item(), answer["truncated"].item()) == (len(ids), False)
    np.testing.assert_allclose(answer["embeddings"][0], mean / np.linalg.norm(mean), atol=1e-5)


def test_more_tokens_than_are_served_are_cut(stack: Stack) -> None:
    answer = stack.infer("static", text=["a " * 40000])
    assert (answer["token_count"].item(), answer["truncated"].item()) == (32768, True)


def test_a_text_without_tokens_has_zeros(stack: Stack) -> None:
    """Alone, beside others, and where each token stands for an unknown word."""
    for model, text in (("static", " "), ("model2vec", " "), ("model2vec", "\u16a0 \u16a1")):
        answer = stack.infer(model, text=[text, "snow", text])
        assert not answer["embeddings"][[0, 2]].any()
        np.testing.assert_allclose(np.linalg.norm(answer["embeddings"][1]), 1, atol=1e-6)
        assert (answer["token_count"][:, 0] > 0).tolist() == [False, True, False]
        assert not stack.embed([text], model).any()


def test_tokens_that_are_left_out_are_not_described(stack: Stack) -> None:
    answer = stack.infer("model2vec-tokenizer", text=["snow \u16a0 falls"])
    tokens = json.loads(answer["tokens"].item())
    assert [token["id"] for token in tokens] == answer["input_ids"][0].tolist()
    assert [token["text"] for token in tokens] == ["snow", "falls"]
