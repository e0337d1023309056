"""transformers or sentence-transformers on the same device: answers the questions of `worker.py`.

It runs in an environment of its own: `python -m tools.bench.gpu.peer CHECKPOINT PACKAGE fp32|bf16`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import IO, Any

import torch

from tools.bench.gpu.worker import answer, take_stdout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Answers until stdin ends."""
    answers = take_stdout()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    checkpoint, package, precision = sys.argv[1:]
    load = {"transformers": transformers, "sentence-transformers": sentence_transformers}[package]
    load(answers, checkpoint, DTYPES[precision])


def transformers(answers: IO[str], checkpoint: str, dtype: torch.dtype) -> None:
    """Token ids, each row alone and without padding: the last token's state, of unit length."""
    from transformers import AutoModel, __version__

    model = AutoModel.from_pretrained(checkpoint, dtype=dtype).to(DEVICE).eval()

    def state(row: list[int]) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([row], device=DEVICE)).last_hidden_state[0, -1].float()

    def prepare(rows: list[list[int]], _: int) -> Callable[[], list[Any]]:
        return lambda: [torch.nn.functional.normalize(state(row), dim=0) for row in rows]

    answer(answers, {"version": __version__}, prepare)


def sentence_transformers(answers: IO[str], checkpoint: str, dtype: torch.dtype) -> None:
    """Texts, so many at once."""
    from sentence_transformers import SentenceTransformer, __version__

    model = SentenceTransformer(checkpoint, device=DEVICE, model_kwargs={"dtype": dtype})

    def prepare(rows: list[str], batch: int) -> Callable[[], Any]:
        return lambda: model.encode(rows, batch_size=batch, show_progress_bar=False)

    answer(answers, {"version": __version__}, prepare)


if __name__ == "__main__":
    main()
