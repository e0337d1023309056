"""What transformers and sentence-transformers give for a checkpoint: the references that `build.verify` asks.

Both are imported only here and only when asked for: neither building nor serving needs them, or torch. References
compute in FP32 whatever the checkpoint was saved in.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from build.errors import BuildError
from build.templates import QWEN3_RERANKER

PACKAGES = ("sentence_transformers", "transformers", "torch")
BATCH = 8
LOAD: dict[str, Any] = {"model_kwargs": {"dtype": "float32"}}

Pair: TypeAlias = tuple[str, str]


@dataclass(frozen=True)
class Expected:
    """What a reference gives for some texts or pairs."""

    values: npt.NDArray[np.float32]
    """Embeddings [n, D], or scores [n] in 0..1."""
    token_ids: list[list[int]] | None = None
    """Of each, special tokens included, or None where the reference reads a pair as two texts."""
    token_types: list[list[int]] | None = None
    """0 for the first text of a pair and 1 for the second, where the model tells them apart."""


Embedder: TypeAlias = Callable[[Sequence[str], str], Expected]
"""(texts, prompt name or "") -> embeddings."""

Scorer: TypeAlias = Callable[[Sequence[Pair]], Expected]
"""[(query, passage)] -> scores."""


def versions() -> dict[str, str]:
    """Package -> version of everything the references are made of."""
    return {name: str(_package(name).__version__) for name in PACKAGES}


def embedder(checkpoint: str) -> Embedder:
    """The embedding model in the folder or of the Hub's name `checkpoint`, by sentence-transformers."""
    model = _load(_package("sentence_transformers").SentenceTransformer, checkpoint, **LOAD)

    def embed(texts: Sequence[str], prompt_name: str) -> Expected:
        own = model.prompts
        # Nomic's names for the two; an empty one beside them is only sentence-transformers' default.
        prompt = own.get(prompt_name) or own.get(f"search_{prompt_name}", "")
        # One at a time, so that none is padded.
        ids = [model.preprocess([prompt + text])["input_ids"][0].tolist() for text in texts]
        values = model.encode(list(texts), prompt=prompt, batch_size=BATCH, show_progress_bar=False)
        return Expected(np.asarray(values, np.float32), ids)

    return embed


def scorer(checkpoint: str, max_tokens: int) -> Scorer:
    """The reranker in the folder or of the Hub's name `checkpoint`, of whichever kind its configuration says."""
    config = _load(_package("transformers").AutoConfig.from_pretrained, checkpoint)
    architecture = str((config.architectures or ["?"])[0])
    modules = _package("sentence_transformers").util.load_file_path(checkpoint, "modules.json")
    if architecture.endswith("ForCausalLM") and modules is None:
        return _asked(checkpoint, max_tokens)
    if architecture.endswith(("ForSequenceClassification", "ForCausalLM")):
        return _cross_encoder(checkpoint)
    return _bi_encoder(checkpoint)


def _cross_encoder(checkpoint: str) -> Scorer:
    model = _load(_package("sentence_transformers").CrossEncoder, checkpoint, **LOAD)

    def score(pairs: Sequence[Pair]) -> Expected:
        features = [model.preprocess([pair]) for pair in pairs]
        ids, types = (
            [feature[name][0].tolist() for feature in features] if name in features[0] else None
            for name in ("input_ids", "token_type_ids")
        )
        values = model.predict(list(pairs), batch_size=BATCH, show_progress_bar=False)
        return Expected(np.asarray(values, np.float32), ids, types)

    return score


def _bi_encoder(checkpoint: str) -> Scorer:
    embed = embedder(checkpoint)

    def score(pairs: Sequence[Pair]) -> Expected:
        queries, passages = (embed([pair[side] for pair in pairs], "").values for side in (0, 1))
        return Expected(((1 + cosines(queries, passages)) / 2).astype(np.float32))

    return score


def _asked(checkpoint: str, max_tokens: int) -> Scorer:
    """Qwen3-Reranker, as the sample for transformers on its model card does: the share of "yes" against "no"."""
    transformers, torch = _package("transformers"), _package("torch")
    model = _load(transformers.AutoModelForCausalLM.from_pretrained, checkpoint, dtype="float32").eval()
    tokenizer = _load(transformers.AutoTokenizer.from_pretrained, checkpoint)
    template = QWEN3_RERANKER
    prefix, suffix = (tokenizer.encode(template[end], add_special_tokens=False) for end in ("prefix", "suffix"))
    yes_no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    room = max_tokens - len(prefix) - len(suffix)

    def score(pairs: Sequence[Pair]) -> Expected:
        bodies = [
            template["body"].format(instruction=template["instruction"], query=query, passage=passage)
            for query, passage in pairs
        ]
        cut = tokenizer(bodies, truncation=True, max_length=room)["input_ids"]
        ids = [prefix + body + suffix for body in cut]
        with torch.inference_mode():
            last = [model(torch.tensor([row], device=model.device)).logits[0, -1, yes_no] for row in ids]
        values = torch.stack(last).softmax(dim=1)[:, 0].cpu().numpy()
        return Expected(values, ids)

    return score


def cosines(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Cosine of each row of `a` with the same row of `b`; -1 where either has no direction."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(all="ignore"):
        found = (a64 * b64).sum(axis=1) / (np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1))
    return np.where(np.isfinite(found), found, -1.0)


def _load(loader: Callable[..., Any], checkpoint: str, **options: Any) -> Any:
    try:
        return loader(checkpoint, **options)
    except (OSError, ValueError) as error:
        raise BuildError(f"the reference {checkpoint} cannot be loaded: {' '.join(str(error).split())}") from None


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise BuildError(
            f"{name} is not installed: run this with the Python of an environment that has it "
            "(pip install 'sentence-transformers>=6' 'tritonclient[grpc]'); nothing else here needs it"
        ) from None
