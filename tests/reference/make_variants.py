"""Write variants.npz: what tiny checkpoints give where their config.json says something else.

It reads variants.json: name -> the checkpoint, and the keys of its config.json that are changed. Each name gets
float32 [texts, dimension], the embeddings of every fourth text of tiny/texts.json, as sentence-transformers gives
them. It needs requirements.txt, which nothing else in this repository may need:

    python tests/reference/make_variants.py
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Writes the file beside this one."""
    torch.set_num_threads(1)
    texts = json.loads((HERE / "tiny" / "texts.json").read_text(encoding="utf-8"))[::4]
    found = {}
    for name, variant in json.loads((HERE / "variants.json").read_text()).items():
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(HERE / "tiny" / variant["fixture"], folder, dirs_exist_ok=True)
            path = Path(folder, "config.json")
            path.write_text(json.dumps(json.loads(path.read_text()) | variant["config"]))
            options = {"dtype": torch.float32}
            model = SentenceTransformer(folder, device="cpu", local_files_only=True, model_kwargs=options)
            found[name] = np.stack([model.encode(text) for text in texts])
    np.savez_compressed(HERE / "variants.npz", **found)


if __name__ == "__main__":
    main()
