"""The graphs that sentence-transformers itself exports of a checkpoint: ONNX, optimized and in int8, and OpenVINO.

It runs in an environment of its own: `optimize.py onnx|openvino CHECKPOINT FOLDER`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer


def main() -> None:
    """Exports and writes."""
    backend, checkpoint, folder = sys.argv[1:]
    model = SentenceTransformer(checkpoint, device="cpu", backend=backend)
    model.save_pretrained(folder)
    # Tokenizers of this kind carry a length of some training, too, which fastembed would cut at.
    settings = Path(folder, "tokenizer_config.json")
    kept = {key: value for key, value in json.loads(settings.read_bytes()).items() if key != "max_length"}
    settings.write_text(json.dumps(kept))
    if backend == "onnx":
        from sentence_transformers import export_dynamic_quantized_onnx_model, export_optimized_onnx_model

        export_optimized_onnx_model(model, "O2", folder)
        export_dynamic_quantized_onnx_model(model, "avx512_vnni", folder)


if __name__ == "__main__":
    main()
