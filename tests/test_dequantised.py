"""Checkpoints whose weights are kept in a byte each, against what transformers makes of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import REFERENCE, TINY, cosines
from engines import OpenVino, requests, token_ids
from safetensors.numpy import load_file, save_file
from test_graphs import answers, graphs

from build import make
from build.errors import BuildError
from build.sources.checkpoint import Checkpoint
from build.sources.quantised import Quantised
from build.target import Target

FOLDER = REFERENCE / "dequantised"
WAYS: dict[str, dict[str, Any]] = json.loads((FOLDER / "checkpoints.json").read_text())["ways"]
NAME = "qwen3-embedding"
MATRIX = "layers.1.mlp.down_proj.weight"
COMPRESSED = [way for way in WAYS if WAYS[way]["quant_method"] == "compressed-tensors"]
Change = Callable[[dict[str, Any]], object]


def kept(way: str, folder: Path, change: Change = len) -> Path:
    """The checkpoint with its weights kept so, and what its configuration says of them changed."""
    shutil.copytree(TINY / NAME, folder)
    shutil.copyfile(FOLDER / f"{way}.safetensors", folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = json.loads(json.dumps(WAYS[way]))
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def matrix(folder: Path) -> Any:
    checkpoint = Checkpoint(folder)
    return checkpoint.weights(folder, quantised=Quantised.of(checkpoint.config)).tensor(MATRIX, 48, 96)


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_those_of_transformers(way: str, tmp_path: Path) -> None:
    expected = np.load(FOLDER / "expected.npz")[f"{way}/weight"]
    np.testing.assert_array_equal(matrix(kept(way, tmp_path / way)), expected)


@pytest.mark.parametrize("way", WAYS)
def test_vectors_are_those_of_transformers(way: str, tmp_path: Path) -> None:
    folder = kept(way, tmp_path / way)
    encoder, head = map(OpenVino, graphs(NAME, Target(precision="fp32"), tmp_path / "found", folder))
    expected = np.load(FOLDER / "expected.npz")[way]
    plain = np.load(TINY / NAME / "expected.npz")["embeddings"]
    for texts, batch in requests(token_ids(NAME)):
        found = answers(Target(precision="fp32"), encoder, head, batch)["embeddings"]
        assert cosines(found, expected[texts]).min() >= 0.999999
        assert cosines(found, plain[texts]).max() < 0.99999  # which a test of lower cosines would not tell apart


@pytest.mark.parametrize("way", ["fp8-blocks", "int8-groups"])
def test_a_build_says_what_it_computes(way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = kept(way, tmp_path / "mine")
    assert make.main([str(folder), "--precision", "bf16", "--repository", str(tmp_path / "found")]) == 0
    kind = way.split("-")[0]
    said = f"mine: its weights are kept in {kind} and computed with in bf16, as transformers' dequantize does it; "
    assert f"{said}kernels of {kind} round what the weights are multiplied by as well" in capsys.readouterr().out
    record = json.loads((tmp_path / "found" / "mine" / "build.json").read_text())
    assert record["facts"]["dequantised"] == kind


def test_weights_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where activations were never rounded there is no difference to tell of."""
    folder = kept("fp8-channels", tmp_path / "mine", group(input_activations=None))
    assert make.main([str(folder), "--precision", "fp32", "--repository", str(tmp_path / "found")]) == 0
    assert "mine: its weights are kept in fp8 and computed with in fp32\n" in capsys.readouterr().out


def test_scales_of_activations_are_passed_over(tmp_path: Path) -> None:
    folder = kept("int8-tensors", tmp_path / "mine", group(input_activations={"num_bits": 8, "dynamic": False}))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{MATRIX.removesuffix('weight')}input_scale"] = np.ones(1, np.float32)
    save_file(tensors, folder / "model.safetensors")
    options = ["--precision", "fp32", "--repository", str(tmp_path / "found")]
    assert make.main([str(folder), *options]) == 0
    edited = kept("int8-tensors", tmp_path / "other", group(input_activations=None))
    shutil.copyfile(folder / "model.safetensors", edited / "model.safetensors")
    assert make.main([str(edited), *options]) == 1


def group(**values: Any) -> Change:
    return lambda config: config["config_groups"]["group_0"].update(values)


def weights(**values: Any) -> Change:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(values)


def also(**values: Any) -> Change:
    return lambda config: config.update(values)


INSTEAD = "are not read; take the checkpoint that they were made from, or one in transformers' fp8 or"

# name: (way, change, words of the sentence)
REFUSED: dict[str, tuple[str, Change, str]] = {
    **{
        method: ("fp8-blocks", also(quant_method=method), f"weights of {method} {INSTEAD}")
        for method in ("gptq", "awq", "bitsandbytes", "mxfp4", "modelopt", "torchao", "fbgemm_fp8")
    },
    "no method": (
        "fp8-blocks",
        lambda config: config.pop("quant_method"),
        f"weights of no quant_method {INSTEAD}",
    ),
    "fp8, static": ("fp8-blocks", also(activation_scheme="static"), 'activation_scheme = "static"'),
    "fp8, e5m2": ("fp8-blocks", also(fmt="e5m2"), 'fmt = "e5m2"'),
    "fp8, powers of two": ("fp8-blocks", also(scale_fmt="ue8m0"), 'scale_fmt = "ue8m0"'),
    "fp8, no block": (
        "fp8-blocks",
        also(weight_block_size=[16]),
        "weight_block_size that is not two whole",
    ),
    "fp8, another block": ("fp8-blocks", also(weight_block_size=[16, 32]), r"blocks of \[16, 32\] in .* need"),
    "fp8, more": ("fp8-blocks", also(expert_dtype="fp4"), 'expert_dtype = "fp4", which is not read'),
    "packed": ("int8-groups", also(format="pack-quantized"), f"compressed-tensors' 'pack-quantized' {INSTEAD}"),
    "packed, in a group": ("int8-groups", group(format="nvfp4-pack-quantized"), "'nvfp4-pack-quantized' are not"),
    "four bits": ("int8-groups", weights(num_bits=4), "weights.num_bits = 4"),
    "two groups": (
        "int8-groups",
        lambda config: config["config_groups"].update(group_1=config["config_groups"]["group_0"]),
        f"2 config_groups of compressed-tensors, where one is read, {INSTEAD}",
    ),
    "outputs": ("int8-groups", group(output_activations={"num_bits": 8}), "output_activations of compressed"),
    "a cache": ("int8-groups", also(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme of compressed-tensors"),
    "rotated": ("int8-groups", also(transform_config={"config_groups": {}}), "transform_config = "),
    "sparse": ("int8-groups", also(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config.format = "),
    "other groups": ("int8-groups", weights(group_size=32), r"blocks of \[1, 32\] in .* need"),
    "a scale a token": ("int8-groups", weights(strategy="token", group_size=None), "a scale for each 'token'"),
    "groups of no number": (
        "int8-groups",
        weights(strategy=None, group_size=[16]),
        "group_size = .* whole number",
    ),
    "no zeros": ("int8-tensors", weights(symmetric=False), "as I8, but no .*_zero_point"),
    "zeros unread": ("int8-groups", weights(symmetric=True), "_zero_point, which is not read and may change"),
    "another type": ("int8-groups", weights(type="float"), "as I8, and config.json has no quantization_config"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    way, change, words = REFUSED[case]
    folder = kept(way, tmp_path / "mine", change)
    assert make.main([str(folder), "--precision", "fp32", "--repository", str(tmp_path / "found")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line), line


def test_scales_that_are_missing_or_of_another_shape(tmp_path: Path) -> None:
    folder = kept("fp8-blocks", tmp_path / "mine")
    values = np.ones((48, 96), np.float32)
    for scales, words in (
        (None, "has .*down_proj.weight as I8, but no .*_scale"),
        (np.ones((6, 3), np.float32), r"weight_scale has shape \[6, 3\]"),
        (np.ones(48, np.int32), "weight_scale as I32"),
        (np.full((48, 1), np.nan, np.float32), "values .* not finite"),
    ):
        tensors: dict[str, Any] = {MATRIX: values.astype(np.int8)}
        save_file(tensors | ({} if scales is None else {f"{MATRIX}_scale": scales}), folder / "model.safetensors")
        weights = Checkpoint(folder).weights(folder, quantised=Quantised("I8", "_scale", (1, 0), in_fp32=False))
        with pytest.raises(BuildError, match=words):
            weights.tensor(MATRIX, 48, 96)


def test_a_block_may_be_larger_than_the_matrix() -> None:
    values, scales = np.arange(6, dtype=np.int8).reshape(2, 3), np.array([[2]], np.float32)
    found = Quantised("I8", "_scale", (2**24, 2**24), in_fp32=False).dequantised("w", values, scales, None)
    np.testing.assert_array_equal(found, [[0, 2, 4], [6, 8, 10]])


def test_every_fp8_number() -> None:
    """By the format's own definition: 4 bits of exponent, 3 of fraction, no infinity."""
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(16, 16)
    sign, exponent, fraction = (np.arange(256) >> 7, (np.arange(256) >> 3) & 15, np.arange(256) & 7)
    expected = np.where(exponent, (1 + fraction / 8) * 2.0 ** (exponent - 7), fraction / 8 * 2.0**-6)
    expected = (np.where(sign, -expected, expected) * 3).reshape(16, 16)
    way = Quantised("F8_E4M3", "_scale_inv", (0, 0), in_fp32=True)
    found = way.dequantised("w", numbers, np.array(3, np.float32), None)
    finite = (np.arange(256) & 127).reshape(16, 16) != 127
    assert (found[finite] == expected[finite]).all()
    assert np.isnan(found[~finite]).all()
