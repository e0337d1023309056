"""Write minilm.npz and minilm.json, the reference results of all-MiniLM-L6-v2.

It reads texts.json and rerank.json beside it, and writes its results there too. It needs torch and
sentence-transformers, which nothing else in this repository may need. To run it:

    python tests/reference/make_minilm.py <checkpoint folder>

Each text is encoded alone, so nothing is padded, in float32 on one thread of the CPU.

minilm.npz holds:
    embeddings     float32 [texts, 384], as the checkpoint's own modules pool and normalise them
    token_ids      int32, the ids of all texts one after another, truncated, with [CLS] and [SEP]
    token_counts   int32 [texts], how many of token_ids belong to each text
    truncated      bool [texts], whether the text was longer than the checkpoint's max_seq_length
    rerank_scores  float32, cosine of query and document, for all documents of all sets in order
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy")
MARGIN = 0.05


class RerankSet(TypedDict):
    """A query, its candidate documents, and the index of the one that answers it."""

    query: str
    documents: list[str]
    relevant: int


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def encode(model: SentenceTransformer, text: str) -> NDArray[np.float32]:
    vector = np.asarray(model.encode(text, batch_size=1, show_progress_bar=False))
    if vector.dtype != np.float32:
        raise TypeError(f"the model gave {vector.dtype}, not float32")
    return vector


def token_ids(model: SentenceTransformer, text: str) -> tuple[list[int], bool]:
    """The ids that the model is fed for a text, and whether they were cut short."""
    fed: list[int] = model.preprocess([text])["input_ids"][0].tolist()
    whole: list[int] = model.tokenizer(text, padding=False, truncation=False, verbose=False)["input_ids"]
    limit = model.max_seq_length
    if limit is None or len(whole) <= 2 or len(fed) != min(len(whole), limit):
        raise ValueError(f"{len(fed)} of {len(whole)} tokens at a limit of {limit}: {text[:60]!r}")
    return fed, len(whole) > limit


def rerank(model: SentenceTransformer, item: RerankSet) -> NDArray[np.float32]:
    """The cosine of each document with the query; the relevant one must be clearly the best."""
    documents = np.stack([encode(model, document) for document in item["documents"]])
    scores: NDArray[np.float32] = documents @ encode(model, item["query"])
    margin = scores[item["relevant"]] - np.delete(scores, item["relevant"]).max()
    if not margin >= MARGIN:
        raise ValueError(f"a margin of {margin:.3f} is too small: {item['query']!r}")
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description="Write minilm.npz and minilm.json.")
    parser.add_argument("checkpoint", type=Path, help="folder of the all-MiniLM-L6-v2 checkpoint")
    checkpoint: Path = parser.parse_args().checkpoint

    texts: list[str] = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))
    sets: list[RerankSet] = json.loads((HERE / "rerank.json").read_text(encoding="utf-8"))
    if len(set(texts)) != len(texts):
        raise ValueError("texts.json holds a text twice")

    torch.set_num_threads(1)
    model = SentenceTransformer(
        str(checkpoint), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
    )
    tokens = [token_ids(model, text) for text in texts]
    np.savez_compressed(
        HERE / "minilm.npz",
        embeddings=np.stack([encode(model, text) for text in texts]),
        token_ids=np.concatenate([np.asarray(ids, dtype=np.int32) for ids, _ in tokens]),
        token_counts=np.asarray([len(ids) for ids, _ in tokens], dtype=np.int32),
        truncated=np.asarray([cut for _, cut in tokens], dtype=np.bool_),
        rerank_scores=np.concatenate([rerank(model, item) for item in sets]),
    )
    made_with = {
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "sha256": {
            "model.safetensors": sha256(checkpoint / "model.safetensors"),
            "texts.json": sha256(HERE / "texts.json"),
            "rerank.json": sha256(HERE / "rerank.json"),
        },
    }
    (HERE / "minilm.json").write_text(json.dumps(made_with, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
