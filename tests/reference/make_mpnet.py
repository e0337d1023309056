"""Write mpnet.npz and mpnet.json, the reference results of all-mpnet-base-v2.

It reads every sixth text of texts.json beside it. It needs torch and sentence-transformers, which nothing else in
this repository may need. To run it:

    python tests/reference/make_mpnet.py <checkpoint folder>

Each text is encoded alone, so nothing is padded, in float32 on one thread of the CPU.

mpnet.npz holds:
    embeddings     float32 [texts, 768], as the checkpoint's own modules pool and normalise them
    token_ids      int32, the ids of all texts one after another, truncated, with <s> and </s>
    token_counts   int32 [texts], how many of token_ids belong to each text
    truncated      bool [texts], whether the text was longer than the checkpoint's max_seq_length
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from make_minilm import HERE, PACKAGES, encode, sha256, token_ids
from sentence_transformers import SentenceTransformer


def main() -> None:
    parser = argparse.ArgumentParser(description="Write mpnet.npz and mpnet.json.")
    parser.add_argument("checkpoint", type=Path, help="folder of the all-mpnet-base-v2 checkpoint")
    checkpoint: Path = parser.parse_args().checkpoint
    texts: list[str] = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))[::6]
    torch.set_num_threads(1)
    model = SentenceTransformer(
        str(checkpoint), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
    )
    tokens = [token_ids(model, text) for text in texts]
    np.savez_compressed(
        HERE / "mpnet.npz",
        embeddings=np.stack([encode(model, text) for text in texts]),
        token_ids=np.concatenate([np.asarray(ids, dtype=np.int32) for ids, _ in tokens]),
        token_counts=np.asarray([len(ids) for ids, _ in tokens], dtype=np.int32),
        truncated=np.asarray([cut for _, cut in tokens], dtype=np.bool_),
    )
    made_with = {
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "sha256": {
            "model.safetensors": sha256(checkpoint / "model.safetensors"),
            "texts.json": sha256(HERE / "texts.json"),
        },
    }
    (HERE / "mpnet.json").write_text(json.dumps(made_with, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
