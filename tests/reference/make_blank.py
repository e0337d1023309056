"""Write blank.json and blank.npz: what the references give for odd texts.

Those are texts without a visible character, and one that spells out special tokens.

It reads the tiny checkpoints beside it and that of all-MiniLM-L6-v2. It needs torch, transformers,
sentence-transformers and model2vec, which nothing else in this repository may need. To run it:

    python tests/reference/make_blank.py <checkpoint folder of all-MiniLM-L6-v2>

Each text or pair is run alone, so nothing is padded, in float32 on one thread of the CPU.

blank.json holds the texts, the query whose documents they are, and the packages' versions. blank.npz holds:
    NAME             float32 [texts, dimension], of each embedding model by its name
    NAME             float32 [documents], logits of the query with "" and with each text, of each reranker
    binary, ubinary  int8 and uint8 [texts, 384 / 8], minilm's as sentence-transformers quantises them
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from model2vec import StaticModel
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.util import quantize_embeddings

HERE = Path(__file__).resolve().parent
TINY = HERE / "tiny"
sys.path.insert(0, str(TINY))

from make_tiny import BODY, LOAD, LOADERS, NEMOTRON_BODY, PREFIX, SUFFIX, TASK, mxbai_logits, nemotron_logits  # noqa: E402

PACKAGES = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy", "model2vec")
EMBEDDERS = (
    "bert-cls",
    "camembert",
    "deberta",
    "distilbert",
    "electra",
    "gemma3",
    "gte",
    "jina-bert",
    "jina-bert-code",
    "jina-v3",
    "llama",
    "mistral",
    "modernbert",
    "mpnet",
    "new",
    "nomic-bert",
    "nomic-bert-moe",
    "qwen2",
    "qwen3-embedding",
    "roberta",
    "static",
    "t5",
    "t5-gated",
    "voyage",
    "xlm-roberta",
)
STATIC_MODELS = ("model2vec", "model2vec-mapped")
CROSS_ENCODERS = (
    "bert-cross-encoder",
    "camembert-cross-encoder",
    "cross-encoder",
    "deberta-cross-encoder",
    "distilbert-cross-encoder",
    "electra-cross-encoder",
    "jina-flash-reranker",
    "jina-reranker",
    "modernbert-reranker",
    "mpnet-cross-encoder",
    "new-reranker",
    "qwen3-vl-reranker",
    "roberta-cross-encoder",
)
TEXTS = [" ", "\n\t\r\n", "\u00a0\u3000", "\0", "\u200b\u200d\ufeff", "\ue000\uf8ff", "\u0301\u0301", "\u2028"]
TEXTS.append("of <pad> and <pad><pad> or [PAD], [MASK] and <mask>, </s> with <s>, [SEP] <|endoftext|> and <pad>")
QUERY = "How do plants make sugar?"


@torch.inference_mode()
def qwen_logits(folder: Path, documents: list[str]) -> list[float]:
    """As the sample for transformers on the model card of Qwen3-Reranker scores pairs, or by a classifier."""
    kind = getattr(hf, json.loads((folder / "config.json").read_text())["architectures"][0])
    model = kind.from_pretrained(folder, dtype=torch.float32)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    ends = [tokenizer.encode(text, add_special_tokens=False) for text in (PREFIX, SUFFIX)]
    logits = []
    for document in documents:
        ids = ends[0] + tokenizer(BODY.format(TASK, QUERY, document))["input_ids"] + ends[1]
        found = model(torch.tensor([ids])).logits[0]
        logits.append(float(found[-1, yes] - found[-1, no] if found.ndim == 2 else found[0]))
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description="Write blank.json and blank.npz.")
    parser.add_argument("checkpoint", type=Path, help="folder of the all-MiniLM-L6-v2 checkpoint")
    checkpoint: Path = parser.parse_args().checkpoint
    torch.set_num_threads(1)
    arrays: dict[str, Any] = {}
    for name, folder in {"minilm": checkpoint, **{name: TINY / name for name in EMBEDDERS}}.items():
        model = LOADERS.get(name, SentenceTransformer)(str(folder), **LOAD)
        arrays[name] = np.stack([model.encode(text, batch_size=1, show_progress_bar=False) for text in TEXTS])
    for name in STATIC_MODELS:
        static = StaticModel.from_pretrained(TINY / name)
        arrays[name] = np.stack([static.encode(text) for text in TEXTS]).astype(np.float32)
    for precision in ("binary", "ubinary"):
        arrays[precision] = quantize_embeddings(arrays["minilm"], precision=precision)
    documents = ["", *TEXTS]
    for name in CROSS_ENCODERS:
        scorer = LOADERS.get(name, CrossEncoder)(str(TINY / name), **LOAD)
        identity = torch.nn.Identity()
        arrays[name] = np.concatenate(
            [scorer.predict([(QUERY, one)], activation_fn=identity) for one in documents]
        )
    for name in ("qwen3-classifier", "qwen3-reranker"):
        arrays[name] = np.array(qwen_logits(TINY / name, documents), np.float32)
    pairs = [NEMOTRON_BODY.format(QUERY, one) for one in documents]
    with torch.inference_mode():
        arrays["nemotron-reranker"] = nemotron_logits(TINY / "nemotron-reranker", pairs)[0].numpy()
    logits, _, _ = mxbai_logits(TINY / "mxbai-reranker", [(QUERY, one) for one in documents])
    arrays["mxbai-reranker"] = logits.numpy()
    facts = {"texts": TEXTS, "query": QUERY, "versions": {name: version(name) for name in PACKAGES}}
    (HERE / "blank.json").write_text(json.dumps(facts, indent=2) + "\n")
    np.savez(HERE / "blank.npz", **arrays)


if __name__ == "__main__":
    main()
