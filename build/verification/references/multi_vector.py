"""A vector for each token: sentence-transformers' MultiVectorEncoder, bge-m3's vectors, or hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from build.verification.references.embeddings import prompt_of
from build.verification.references.loading import (
    BATCH,
    FP32,
    Expected,
    ExpectedVectors,
    MultiEmbedder,
    Pair,
    Scorer,
    architecture,
    check_class,
    content,
    find,
    loaded,
    package,
    pretrained,
)

BGE_M3 = "colbert_linear.safetensors"
"""bge-m3's layer behind each token."""


def multi_embedder(checkpoint: str, prompts: Mapping[str, str], max_tokens: int) -> MultiEmbedder:
    """The model in the folder or of the Hub's name `checkpoint`, of whichever kind its files say."""
    if is_colbert(checkpoint):
        return _colbert(checkpoint)
    if (linear := find(checkpoint, BGE_M3)) is not None:
        return _bge_m3(checkpoint, linear, prompts, max_tokens)
    return _hidden_states(checkpoint, prompts)


def maxsim_scorer(checkpoint: str, max_tokens: int) -> Scorer:
    """What a model's vectors make of pairs: (1 + MaxSim / vectors of the query) / 2."""
    embed = multi_embedder(checkpoint, {}, max_tokens)

    def score(pairs: Sequence[Pair]) -> Expected:
        queries, passages = zip(*pairs, strict=True)
        both = (embed(queries, "query").values, embed(passages, "document").values)
        means = [(query @ passage.T).max(axis=1).mean() for query, passage in zip(*both, strict=True)]
        return Expected(np.asarray([(1 + mean) / 2 for mean in means], np.float32))

    return score


def is_colbert(checkpoint: str) -> bool:
    """Whether sentence-transformers, PyLate or Stanford's code saved it as one."""
    kinds = [str(module["type"]) for module in content(checkpoint, "modules.json") or []]
    library = content(checkpoint, "config_sentence_transformers.json").get("model_type")
    return (
        any(kind.endswith("MultiVectorMask") for kind in kinds)
        or library in ("ColBERT", "MultiVectorEncoder")
        or architecture(checkpoint) == "HF_ColBERT"
    )


def _colbert(checkpoint: str) -> MultiEmbedder:
    model = loaded("MultiVectorEncoder", checkpoint)

    def embed(texts: Sequence[str], prompt_name: str) -> ExpectedVectors:
        task = prompt_name or None
        encode = {"query": model.encode_query, "document": model.encode_document}.get(prompt_name, model.encode)
        values = encode(list(texts), batch_size=BATCH, show_progress_bar=False, convert_to_numpy=True)
        prompt = model.prompts.get(prompt_name, "")
        fed = [model.preprocess([text], prompt=prompt, task=task)["input_ids"][0].tolist() for text in texts]
        return ExpectedVectors(values, fed, int(model[0].model.config.vocab_size))

    return embed


def _bge_m3(checkpoint: str, linear: Path, prompts: Mapping[str, str], max_tokens: int) -> MultiEmbedder:
    """As FlagEmbedding's BGEM3FlagModel does: w h + b of all tokens but the first, of length 1."""
    torch = package("torch")
    model = pretrained("AutoModel", checkpoint, **FP32).eval()
    tokenizer = pretrained("AutoTokenizer", checkpoint)
    layer = {name: tensor.float() for name, tensor in package("safetensors.torch").load_file(linear).items()}

    def vectors(ids: list[int]) -> Any:
        with torch.inference_mode():
            states = model(torch.tensor([ids])).last_hidden_state[0, 1:]
            functional = torch.nn.functional
            return functional.normalize(functional.linear(states, layer["weight"], layer["bias"]), dim=-1).numpy()

    def embed(texts: Sequence[str], prompt_name: str) -> ExpectedVectors:
        prompt = prompts.get(prompt_name, "")
        fed = [tokenizer(prompt + one, truncation=True, max_length=max_tokens)["input_ids"] for one in texts]
        return ExpectedVectors([vectors(ids) for ids in fed], fed, int(model.config.vocab_size))

    return embed


def _hidden_states(checkpoint: str, prompts: Mapping[str, str]) -> MultiEmbedder:
    """Of a model that pools: what it pools."""
    check_class(checkpoint, "AutoModel")
    model = loaded("SentenceTransformer", checkpoint)

    def embed(texts: Sequence[str], prompt_name: str) -> ExpectedVectors:
        prompt = prompt_of(model, prompts, prompt_name)
        options = {"output_value": "token_embeddings", "show_progress_bar": False}
        values = [
            one.cpu().numpy() for one in model.encode(list(texts), prompt=prompt, batch_size=BATCH, **options)
        ]
        fed = [model.preprocess([prompt + text])["input_ids"][0].tolist() for text in texts]
        return ExpectedVectors(values, fed, int(model[0].model.config.vocab_size))

    return embed
