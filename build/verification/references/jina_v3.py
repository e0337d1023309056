"""Jina Embeddings v3 with the adapter of a task, whose published code is not run.

transformers has the model without adapters. Behind each layer and table that has one, what the adapter makes of
the same input is added (LoRA: Hu et al., 2021, arXiv:2106.09685); the published code adds it to the weights.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from build.errors import BuildError
from build.verification.references.loading import content, find, load, loaded, package

PARAMETRISED = ".parametrizations.weight."
KEPT = (
    *("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "type_vocab_size", "hidden_act", "layer_norm_eps", "pad_token_id"),
)
"""Keys that transformers' configuration has by the same names."""
NAMES = {"encoder.layers.": "layers.", "mixer.out_proj": "self_attn.o_proj", "mixer.Wqkv": "self_attn.{}_proj"}
"""What the published code calls a layer -> what transformers does, Q, K and V apart."""


def with_adapter(checkpoint: str, task: str) -> Any:
    """The SentenceTransformer of a checkpoint in the published layout with the adapter of `task`."""
    said = content(checkpoint, "config.json")
    tasks = said.get("lora_adaptations", [])
    if task not in tasks:
        raise BuildError(
            f"the reference {checkpoint} has no adapter {task!r}: it has {', '.join(tasks) or 'none'}"
        )
    weights = find(checkpoint, "model.safetensors")
    if weights is None:
        raise BuildError(f"the reference {checkpoint} has no model.safetensors, in which adapters are looked for")
    plain: dict[str, Any] = {}
    adapters: dict[str, dict[str, Any]] = {}
    for name, tensor in package("safetensors.torch").load_file(weights).items():
        layer, _, part = name.removeprefix("roberta.").partition(PARAMETRISED)
        if part in ("", "original"):
            plain[f"{layer}.weight" if part else layer] = tensor.float()
        else:
            adapters.setdefault(layer, {})[part.removeprefix("0.lora_")] = tensor[tasks.index(task)].float()
    model = _without(checkpoint, said, plain)
    for layer, matrices in adapters.items():
        if not layer.startswith("pooler"):
            _add(model[0].model, layer, matrices, said["lora_alpha"] / said["lora_rank"])
    return model


def _without(checkpoint: str, said: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    """The model that its adapters are added to, from a folder in transformers' layout."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        folder = Path(load(package("huggingface_hub").snapshot_download, checkpoint))
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(folder, scratch, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        modules = json.loads((folder / "modules.json").read_text())
        modules[0] |= {"type": "sentence_transformers.models.Transformer", "kwargs": []}
        Path(scratch, "modules.json").write_text(json.dumps(modules))
        rope = {"rope_type": "default", "rope_theta": said["rotary_emb_base"]}
        config = package("transformers").JinaEmbeddingsV3Config(
            **{key: said[key] for key in KEPT if key in said}, rope_parameters=rope
        )
        config.architectures = ["JinaEmbeddingsV3Model"]
        config.save_pretrained(scratch)
        package("safetensors.torch").save_file(dict(tensors), Path(scratch, "model.safetensors"), {"format": "pt"})
        return loaded("SentenceTransformer", scratch)


def _add(network: Any, layer: str, matrices: Mapping[str, Any], scale: float) -> None:
    """Has `layer` give what its adapter makes of the same input as well."""
    a, b = matrices["A"], matrices["B"]
    name = layer
    for published, own in NAMES.items():
        name = name.replace(published, own)
    if "{}" not in name:
        module = network.get_submodule(name)
        is_table = isinstance(module, package("torch").nn.Embedding)
        module.register_forward_hook(_table(a, b, scale) if is_table else _linear(a, b, scale))
        return
    for part, rows in zip("qkv", b.chunk(3), strict=True):
        network.get_submodule(name.format(part)).register_forward_hook(_linear(a, rows, scale))


def _linear(a: Any, b: Any, scale: float) -> Callable[..., Any]:
    return lambda _, given, result: result + scale * (given[0] @ a.T @ b.T)


def _table(a: Any, b: Any, scale: float) -> Callable[..., Any]:
    return lambda _, given, result: result + scale * (a[given[0]] @ b)
