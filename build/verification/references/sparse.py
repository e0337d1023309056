"""Sparse vectors: sentence-transformers' SparseEncoder, and bge-m3's weights of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from build.errors import BuildError
from build.verification.references.embeddings import prompt_of
from build.verification.references.loading import (
    BATCH,
    FP32,
    Embedder,
    Expected,
    architecture,
    check_class,
    find,
    loaded,
    package,
    pretrained,
)

LEXICAL = "sparse_linear.safetensors"
"""bge-m3's layer that weighs words."""


def sparse_embedder(checkpoint: str, prompts: Mapping[str, str], max_tokens: int) -> Embedder:
    """The sparse model in the folder or of the Hub's name `checkpoint`, of whichever kind its files say."""
    kind = architecture(checkpoint)
    if not kind.endswith("ForMaskedLM"):
        if (linear := find(checkpoint, LEXICAL)) is not None:
            return _lexical(checkpoint, linear, prompts, max_tokens)
        raise BuildError(
            f"the reference {checkpoint} is of {kind or 'no class'} and has no {LEXICAL}: it weighs no words"
        )
    check_class(checkpoint, "AutoModelForMaskedLM")
    model = loaded("SparseEncoder", checkpoint)

    def embed(texts: Sequence[str], prompt_name: str) -> Expected:
        prompt = prompt_of(model, prompts, prompt_name)
        ids = [model.preprocess([prompt + text])["input_ids"][0].tolist() for text in texts]
        options = {"convert_to_sparse_tensor": False, "save_to_cpu": True, "show_progress_bar": False}
        values = model.encode(list(texts), prompt=prompt, batch_size=BATCH, **options)
        return Expected(values.float().numpy(), ids)

    return embed


def _lexical(checkpoint: str, linear: Path, prompts: Mapping[str, str], max_tokens: int) -> Embedder:
    """As FlagEmbedding's BGEM3FlagModel does: max(w h + b, 0) of each token, of those with one id the largest.

    Special tokens have no weight. FlagEmbedding itself reads the layer from a pickle, and needs older libraries.
    """
    torch = package("torch")
    model = pretrained("AutoModel", checkpoint, **FP32).eval()
    tokenizer = pretrained("AutoTokenizer", checkpoint)
    weigh = package("safetensors.torch").load_file(linear)
    unweighed = {tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}

    def embed(texts: Sequence[str], prompt_name: str) -> Expected:
        prompt = prompts.get(prompt_name, "")
        values = np.zeros((len(texts), model.config.vocab_size), np.float32)
        fed: list[list[int]] = []
        for row, text in zip(values, texts, strict=True):
            ids = tokenizer(prompt + text, truncation=True, max_length=max_tokens)["input_ids"]
            with torch.inference_mode():
                states = model(torch.tensor([ids])).last_hidden_state[0]
                weights = torch.relu(states @ weigh["weight"].float()[0] + weigh["bias"].float())
            for token, weight in zip(ids, weights.tolist(), strict=True):
                if token not in unweighed:
                    row[token] = max(row[token], weight)
            fed.append(ids)
        return Expected(values, fed)

    return embed
