"""A library in a process of its own: calls on each line of stdin (JSON), and a line on stdout of what they took.

It runs in that library's environment, and its one argument is JSON: see `Library` in embedders.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def sentence_transformers(
    checkpoint: str, backend: str, batch: int, options: dict[str, Any]
) -> Callable[..., Any]:
    """Its `encode`; `options` go to what loads the model."""
    from sentence_transformers import SentenceTransformer

    if backend == "onnx":
        import onnxruntime

        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = options.pop("threads")
        options |= {"session_options": session, "provider": "CPUExecutionProvider"}
    model = SentenceTransformer(checkpoint, device="cpu", backend=backend, model_kwargs=options)
    return lambda texts: model.encode(texts, batch_size=batch, show_progress_bar=False)


def fastembed(checkpoint: str, backend: str, batch: int, options: dict[str, Any]) -> Callable[..., Any]:
    """Its `embed` of the graph `backend` in the folder `checkpoint`."""
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    TextEmbedding.add_custom_model(
        model="checkpoint",
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="checkpoint"),
        dim=384,
        model_file=backend,
    )
    model = TextEmbedding("checkpoint", specific_model_path=checkpoint, **options)
    return lambda texts: list(model.embed(texts, batch_size=batch))


def main() -> None:
    """Answers until stdin ends."""
    settings = json.loads(sys.argv[1])
    encode = {"sentence-transformers": sentence_transformers, "fastembed": fastembed}[settings.pop("library")](
        **settings
    )
    print("ready", flush=True)
    for line in sys.stdin:
        calls = json.loads(line)
        milliseconds: list[float] = []
        vectors: list[Any] = []
        for texts in calls["texts"]:
            start = time.perf_counter()
            vectors.append(encode(texts))
            milliseconds.append(1000 * (time.perf_counter() - start))
        answer: dict[str, Any] = {"milliseconds": milliseconds}
        if calls["vectors"]:
            answer["vectors"] = [[float(number) for number in row] for rows in vectors for row in rows]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
