"""Write heads.json and heads.npz: what sentence-transformers saves behind a transformer, and what it then gives.

Each head stands behind the tiny checkpoint bert-cls in place of its own modules. heads.json has the files that say
so, by their path in the checkpoint; heads.npz the tensors of its modules as NAME/FOLDER/TENSOR, and as NAME the
vectors of the first texts of tiny/texts.json, each run alone in float32 on one thread.

scores.json and scores.npz are the same of rerankers: files of a tiny checkpoint, changed, and as NAME what
CrossEncoder.predict then gives for the first pairs of tiny/pairs.json; of language models also NAME/token_ids and
NAME/token_counts.

classes.json and classes.npz are the same of classifiers of three labels, which cross-encoders become by another
last layer: NAME/tensors/TENSOR; and of the first pairs, and of the first texts alone, NAME/KIND/logits and what
transformers' pipeline makes of them, NAME/KIND/probabilities. It needs requirements.txt:

    python tests/reference/make_heads.py
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from safetensors.numpy import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Normalize, Pooling
from torch import nn

HERE = Path(__file__).resolve().parent
BASE = HERE / "tiny" / "bert-cls"
TEXTS: list[str] = json.loads((HERE / "tiny" / "texts.json").read_text(encoding="utf-8"))[:12]
PAIRS: list[list[str]] = json.loads((HERE / "tiny" / "pairs.json").read_text(encoding="utf-8"))[:12]
HIDDEN = 48
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
SPELLED_OUT = {"word_embedding_dimension": HIDDEN} | {
    f"pooling_mode_{flag}": True for flag in ("mean_tokens", "lasttoken", "cls_token", "max_tokens")
}
"""Several modes as older versions wrote them, in another order than their vectors'."""


def pooled(*modes: Any) -> Pooling:
    return Pooling(HIDDEN, modes or "mean")


def dense(activation: nn.Module | None, inputs: int = HIDDEN, outputs: int = 40, **options: Any) -> Dense:
    return Dense(inputs, outputs, activation_function=activation, **options)


HEADS: dict[str, Callable[[], list[nn.Module]]] = {
    **{mode: lambda mode=mode: [pooled(mode)] for mode in MODES},
    "several": lambda: [pooled("weightedmean", "max", "cls")],
    "several, by flags": lambda: [pooled()],
    "unit tokens": lambda: [Normalize("token_embeddings"), pooled("mean", "max")],
    "Identity": lambda: [pooled(), dense(None)],
    "Tanh": lambda: [pooled(), dense(nn.Tanh(), bias=False)],
    "ReLU": lambda: [pooled(), dense(nn.ReLU())],
    "GELU": lambda: [pooled(), dense(nn.GELU())],
    "Sigmoid": lambda: [pooled(), dense(nn.Sigmoid())],
    "SiLU": lambda: [pooled(), dense(nn.SiLU())],
    "residual": lambda: [pooled(), dense(nn.GELU(), outputs=HIDDEN, use_residual=True)],
    "projected residual": lambda: [pooled(), dense(nn.Tanh(), use_residual=True, bias=False)],
    "norm": lambda: [pooled(), LayerNorm(HIDDEN)],
    "many": lambda: [
        *(pooled("cls", "mean"), Normalize(), dense(nn.SiLU(), 2 * HIDDEN, 56), Dropout(0.5)),
        *(LayerNorm(56), dense(nn.Tanh(), 56, 24), Normalize()),
    ],
    "cut": lambda: [pooled(), Normalize()],
}
CUT = {"cut": 20}
"""What `truncate_dim` says."""


def randomise(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        scale = 1.5 / parameter.shape[1] ** 0.5 if parameter.ndim == 2 else 0.3
        parameter.data.copy_(values * scale + (1.0 if name == "norm.weight" else 0.0))
    return module


def make(name: str, modules: list[nn.Module], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Has the reference save a checkpoint and load it again: its files, and its tensors and vectors."""
    after = [randomise(module, seed) for seed, module in enumerate(modules)]
    whole = SentenceTransformer(modules=[Transformer(str(BASE)), *after], device="cpu", truncate_dim=CUT.get(name))
    whole.save(str(folder), create_model_card=False)
    if name == "several, by flags":
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(SPELLED_OUT))
    listed = json.loads((folder / "modules.json").read_text())
    paths = ["modules.json", *(f"{one['path']}/config.json" for one in listed if one["path"])]
    if name in CUT:
        paths.append("config_sentence_transformers.json")
    files = {path: json.loads((folder / path).read_text()) for path in paths}
    weights = {
        f"{name}/{file.parent.name}/{tensor}": values
        for file in sorted(folder.glob("*_*/model.safetensors"))
        for tensor, values in load_file(file).items()
    }
    loaded = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return files, weights | {name: np.stack([loaded.encode(text) for text in TEXTS])}


IDENTITY, SIGMOID, TANH = (
    f"torch.nn.modules.{name}" for name in ("linear.Identity", "activation.Sigmoid", "activation.Tanh")
)
CLASSIFIERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "nothing said": ("cross-encoder", "config.json", {}),
    "Identity": ("cross-encoder", "config.json", {"sentence_transformers": {"activation_fn": IDENTITY}}),
    "Tanh": ("cross-encoder", "config.json", {"sentence_transformers": {"activation_fn": TANH}}),
    "Identity, of old": ("cross-encoder", "config.json", {"sbert_ce_default_activation_function": IDENTITY}),
    "two words": (
        "cross-encoder",
        "config.json",
        {
            "sentence_transformers": {"activation_fn": SIGMOID, "version": "4.1.0"},
            "sbert_ce_default_activation_function": IDENTITY,
        },
    ),
    "no class of torch": (
        "cross-encoder",
        "config.json",
        {"sentence_transformers": {"activation_fn": "str"}, "sbert_ce_default_activation_function": IDENTITY},
    ),
    "Identity, beside modules": (
        "bert-cross-encoder",
        "config_sentence_transformers.json",
        {"activation_fn": IDENTITY},
    ),
    "no class of torch, beside modules": (
        "bert-cross-encoder",
        "config_sentence_transformers.json",
        {"activation_fn": "custom.Identity"},
    ),
}
"""Name -> checkpoint, its file, and what that says more."""
ASKED = {
    "one token over another": LogitScore(true_token_id=300, false_token_id=271),
    "one token": LogitScore(true_token_id=300),
}


def classifier(base: str, path: str, more: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Files that change, and scores."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(HERE / "tiny" / base, Path(scratch) / base)
        content = json.loads((folder / path).read_text()) | more
        (folder / path).write_text(json.dumps(content))
        return {path: content}, scores(folder)


def asked(score: LogitScore) -> tuple[dict[str, Any], dict[str, Any]]:
    """Files of a language model that gives scores, them and its tokens."""
    with tempfile.TemporaryDirectory() as folder:
        base = str(HERE / "tiny" / "qwen3-reranker")
        model = Transformer(base, transformer_task="text-generation", model_kwargs={"dtype": torch.float32})
        CrossEncoder(modules=[model, score], device="cpu").save(folder, create_model_card=False)
        paths = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
        files = {
            path: json.loads((Path(folder) / path).read_text()) for path in (*paths, "1_LogitScore/config.json")
        }
        fed = [model.preprocess([pair])["input_ids"][0].tolist() for pair in PAIRS]
        return files, {
            "": scores(Path(folder)),
            "/token_ids": np.array([i for ids in fed for i in ids], np.int32),
            "/token_counts": np.array([len(ids) for ids in fed], np.int32),
        }


def scores(folder: Path) -> Any:
    """Of each pair alone."""
    model = CrossEncoder(str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32})
    return np.concatenate([model.predict([pair]) for pair in PAIRS])


LABELS = {"0": "contradiction", "1": "entailment", "2": "neutral"}
SINGLE = {"id2label": LABELS, "label2id": {label: int(i) for i, label in LABELS.items()}}
MULTI = SINGLE | {"problem_type": "multi_label_classification"}
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert-cross-encoder", "classifier", SINGLE | {"problem_type": "single_label_classification"}),
    "camembert": ("camembert-cross-encoder", "classifier.out_proj", SINGLE),
    "deberta-v2": ("deberta-cross-encoder", "classifier", SINGLE),
    "distilbert": ("distilbert-cross-encoder", "classifier", SINGLE),
    "electra": ("electra-cross-encoder", "classifier.out_proj", SINGLE),
    "modernbert": ("modernbert-reranker", "classifier", MULTI),
    # Decoders; two of their tokenizers end a text with the token for padding.
    "llama": ("llama", "score", SINGLE | {"architectures": ["LlamaForSequenceClassification"]}),
    "mistral": ("mistral", "score", SINGLE | {"architectures": ["MistralForSequenceClassification"]}),
    "qwen2": ("qwen2", "score", MULTI | {"architectures": ["Qwen2ForSequenceClassification"]}),
    "qwen3": ("qwen3-reranker", "score", SINGLE | {"architectures": ["Qwen3ForSequenceClassification"]}),
    "mpnet": ("mpnet-cross-encoder", "classifier.out_proj", SINGLE),
    "roberta": ("roberta-cross-encoder", "classifier.out_proj", SINGLE),
    "xlm-roberta": ("cross-encoder", "classifier.out_proj", MULTI),
}
"""Name -> checkpoint, its last layer, and what its configuration says more."""


@torch.inference_mode()
def classes(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Files that change, and tensors and results."""
    base, layer, more = CLASSES[name]
    shutil.copytree(HERE / "tiny" / base, folder)
    content = json.loads((folder / "config.json").read_text()) | more
    (folder / "config.json").write_text(json.dumps(content))
    generator = torch.Generator().manual_seed(len(name))
    tensors = {
        f"{layer}.weight": torch.randn(len(LABELS), HIDDEN, generator=generator) * 0.3,
        f"{layer}.bias": torch.randn(len(LABELS), generator=generator),
    }
    if layer == "score":  # which has none
        del tensors["score.bias"]
    save_file(
        {**load_file(folder / "model.safetensors"), **{key: one.numpy() for key, one in tensors.items()}},
        folder / "model.safetensors",
    )
    arrays = {f"{name}/tensors/{key}": one.numpy() for key, one in tensors.items()}
    words = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    pipeline = hf.pipeline("text-classification", model=model, tokenizer=words, device="cpu")
    for kind, inputs in (("pairs", PAIRS), ("texts", [[text] for text in TEXTS])):
        logits = [model(**words(*texts, truncation=True, return_tensors="pt")).logits[0] for texts in inputs]
        arrays[f"{name}/{kind}/logits"] = torch.stack(logits).numpy()
        found = [
            pipeline([dict(zip(("text", "text_pair"), texts, strict=False))], top_k=None, truncation=True)[0]
            for texts in inputs
        ]
        by_label = [{one["label"]: one["score"] for one in row} for row in found]
        arrays[f"{name}/{kind}/probabilities"] = np.array(
            [[row[label] for label in LABELS.values()] for row in by_label], np.float32
        )
    return {"config.json": content}, arrays


def main() -> None:
    """Writes the files beside this one."""
    torch.set_num_threads(1)
    files: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    for name, head in HEADS.items():
        folder = Path(tempfile.mkdtemp())
        files[name], found = make(name, head(), folder)
        arrays |= found
        shutil.rmtree(folder)
    write("heads", files, arrays)
    files, arrays = {}, {}
    for name, (base, path, more) in CLASSIFIERS.items():
        changed, arrays[name] = classifier(base, path, more)
        files[name] = {"checkpoint": base, "files": changed}
    for name, score in ASKED.items():
        changed, found = asked(score)
        arrays |= {name + key: values for key, values in found.items()}
        files[name] = {"checkpoint": "qwen3-reranker", "files": changed}
    write("scores", files, arrays)
    files, arrays = {}, {}
    for name, (base, _, _) in CLASSES.items():
        with tempfile.TemporaryDirectory() as scratch:
            changed, found = classes(name, Path(scratch) / name)
        files[name] = {"checkpoint": base, "files": changed}
        arrays |= found
    write("classes", files, arrays)


def write(name: str, files: dict[str, Any], arrays: dict[str, Any]) -> None:
    (HERE / f"{name}.json").write_text(json.dumps(files, indent=1, sort_keys=True) + "\n")
    np.savez_compressed(HERE / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
