"""Write qwen3-embedding of ../tiny with its weights in a byte each, kept in several ways, and what it must answer.

Weights are quantised by compressed-tensors, or here where transformers has a way of its own, and read again by
transformers. It needs ../requirements.txt. To run it:

    python tests/reference/dequantised/make_dequantised.py

It writes NAME.safetensors of each way; checkpoints.json, with the `quantization_config` of each and the packages'
versions; and expected.npz, which holds of each:

    NAME         float32 [texts, 48], the embeddings of ../tiny/texts.json by sentence-transformers in float32
    NAME/weight  float32 [48, 96], the matrix layers.1.mlp.down_proj.weight as transformers has read it
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "tiny"
SOURCE = TINY / "qwen3-embedding"
TEXTS: list[str] = json.loads((TINY / "texts.json").read_text(encoding="utf-8"))
PACKAGES = ("torch", "transformers", "sentence-transformers", "compressed-tensors", "safetensors", "numpy")
MATRIX = "layers.1.mlp.down_proj.weight"
Tensors = dict[str, Any]


def blocks(weight: Any, rows: int, columns: int) -> Any:
    """The smallest and the largest number of each block, of which the last ones may be cut: [2, R, C]."""
    height, width = (math.ceil(size / block) for size, block in zip(weight.shape, (rows, columns), strict=True))
    ends = torch.empty(2, height, width)
    for i in range(height):
        for j in range(width):
            part = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            ends[:, i, j] = torch.stack([part.min(), part.max()])
    return ends


def fp8(block: tuple[int, int]) -> tuple[dict[str, Any], Callable[[str, Any], Tensors]]:
    """Of transformers, as Qwen3's own FP8 checkpoints are."""

    def kept(name: str, weight: Any) -> Tensors:
        scale = blocks(weight, *block).abs().amax(0) / torch.finfo(torch.float8_e4m3fn).max
        spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        return {name: (weight / spread).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}

    config = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [*block]}
    return config, kept


def compressed(dtype: Any, **options: Any) -> tuple[dict[str, Any], Callable[[str, Any], Tensors]]:
    """Of compressed-tensors, as llm-compressor writes it, with scales of that type."""
    args = QuantizationArgs(num_bits=8, **options)
    rounded = QuantizationArgs(num_bits=8, type=args.type, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=rounded)
    form = "int-quantized" if args.type == "int" else "float-quantized"

    def kept(name: str, weight: Any) -> Tensors:
        shape = {"channel": (1, weight.shape[1]), "tensor": tuple(weight.shape), "group": (1, args.group_size)}
        scale, zero = calculate_qparams(*blocks(weight, *shape.get(args.strategy, args.block_structure)), args)
        if args.strategy == "tensor":
            scale, zero = scale.reshape(1), zero.reshape(1)
        parts = {"weight": weight.to(dtype), "weight_scale": scale.to(dtype), "weight_zero_point": zero}
        found = BaseCompressor.get_value_from_registry(form).compress(parts, scheme)
        return {name + key.removeprefix("weight"): value for key, value in found.items()}

    config = QuantizationConfig(config_groups={"group_0": scheme}, format=form, quantization_status="compressed")
    shown = json.loads(config.model_dump_json())
    return shown | {"sparsity_config": {}, "transform_config": {}, "version": version("compressed-tensors")}, kept


WAYS = {
    "fp8-blocks": fp8((16, 16)),
    "fp8-channels": compressed(torch.bfloat16, type="float", strategy="channel"),
    "fp8-cut-blocks": compressed(torch.float32, type="float", strategy="block", block_structure=[32, 40]),
    "int8-tensors": compressed(torch.float16, type="int", strategy="tensor"),
    "int8-groups": compressed(torch.float32, type="int", strategy="group", group_size=16, symmetric=False),
}


def main() -> None:
    torch.set_num_threads(1)
    arrays: dict[str, Any] = {}
    plain = load_file(SOURCE / "model.safetensors")
    for name, (config, kept) in WAYS.items():
        tensors: Tensors = {}
        for tensor, values in plain.items():
            is_linear = values.ndim == 2 and "embed" not in tensor
            tensors |= kept(tensor, values.float()) if is_linear else {tensor: values}
        save_file({key: value.contiguous() for key, value in tensors.items()}, HERE / f"{name}.safetensors")
        with tempfile.TemporaryDirectory() as there:
            folder = Path(there, name)
            shutil.copytree(SOURCE, folder)
            shutil.copyfile(HERE / f"{name}.safetensors", folder / "model.safetensors")
            said = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
            (folder / "config.json").write_text(json.dumps(said))
            kind: Any = hf.FineGrainedFP8Config if config["quant_method"] == "fp8" else hf.CompressedTensorsConfig
            options = {"dtype": torch.float32, "quantization_config": kind(dequantize=True)}
            model = SentenceTransformer(str(folder), device="cpu", local_files_only=True, model_kwargs=options)
        model.float()  # what was never quantised stays as it was saved
        arrays[name] = np.stack([model.encode(text, batch_size=1) for text in TEXTS])
        arrays[f"{name}/weight"] = model[0].auto_model.get_parameter(MATRIX).detach().numpy()
    facts = {"versions": {one: version(one) for one in PACKAGES}, "ways": {one: WAYS[one][0] for one in WAYS}}
    (HERE / "checkpoints.json").write_text(json.dumps(facts, indent=1) + "\n")
    np.savez_compressed(HERE / "expected.npz", **arrays)


if __name__ == "__main__":
    main()
