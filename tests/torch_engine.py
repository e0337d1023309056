"""Runs encoders on packed tokens for test_torch.py, in the environment that has torch: JSON of what they give.

`python tests/torch_engine.py FOLDER ...` takes version folders of torch's encoders and, from stdin, rows of token
ids for each. `--compiled` compiles them, as on a GPU. `--memory TOKENS` lets larger micro-batches find no memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from build.steps.packed_encoder import Array, PackedEncoder


class Limited(PackedEncoder):
    """On a device that has memory for so many tokens at once."""

    memory = sys.maxsize

    def _launch(self, rows: Sequence[Array], kept: Sequence[Array]) -> dict[str, torch.Tensor]:
        if sum(map(len, rows)) > self.memory:
            raise torch.OutOfMemoryError
        return super()._launch(rows, kept)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--memory", type=int, default=sys.maxsize)
    options = parser.parse_args()
    torch.set_num_threads(1)  # two have nothing to share in models as tiny
    answers = []
    for folder, ids in zip(options.folders, json.load(sys.stdin), strict=True):
        rows = [np.array(row, np.int32) for row in ids]
        encoder = Limited(folder, torch.device("cpu"), 512, options.compiled)
        encoder.memory = options.memory
        together = encoder.run(rows)
        alone = [encoder.run([row])[0] for row in rows]
        answers.append(
            {
                "together": [plain(row) for row in together],
                "alone": [plain(row) for row in alone],
                "functions": len(encoder._encoder.modules),
                "budget": encoder.token_budget,
            }
        )
    print(json.dumps(answers))


def plain(row: dict[str, Array] | str) -> object:
    return row if isinstance(row, str) else {name: values.tolist() for name, values in row.items()}


if __name__ == "__main__":
    main()
