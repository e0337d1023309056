"""Write quantised.npz: the first vectors of minilm.npz as sentence-transformers' quantize_embeddings has them.

It reads minilm.npz beside it and writes its results there too. It needs sentence-transformers. To run it:

    python tests/reference/make_quantised.py

quantised.npz holds, of the first 64 texts:
    int8, uint8      int8 and uint8 [texts, 384], by ranges whose steps of 1/127 have their middles at 0 and at +-1
    binary, ubinary  int8 and uint8 [texts, 384 / 8]
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sentence_transformers.util import quantize_embeddings

HERE = Path(__file__).resolve().parent
TEXTS = 64
RANGES = (-128.5 / 127, 126.5 / 127)


def main() -> None:
    vectors = np.load(HERE / "minilm.npz")["embeddings"][:TEXTS]
    ranges = np.repeat(np.array(RANGES)[:, None], vectors.shape[1], axis=1)
    precisions = ("int8", "uint8", "binary", "ubinary")
    arrays = {one: quantize_embeddings(vectors, precision=one, ranges=ranges) for one in precisions}
    np.savez_compressed(HERE / "quantised.npz", **arrays)


if __name__ == "__main__":
    main()
