"""A build runs every graph once in its engine: what cannot serve is a sentence there, not at a server's start."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import ROOT, TINY, cosines
from engines import Array, OnnxRuntime, OpenVino, feeds, requests, token_ids
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from test_adoption import EXPORTED, answer, build, checkpoint, edit_onnx, graph_of, set_dim
from test_exported import refused
from test_families import expected
from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

from build import make
from build.check import families
from build.config import read_config
from build.errors import BuildError

AGAIN = "take another graph of the model, exported with dynamic axes for batch and sequence"


def of_seven_tokens(folder: Path) -> None:
    """Exported for one text of one length, whatever its inputs declare."""
    shutil.copy(EXPORTED / "bert-cls-fixed" / "model.onnx", graph_of(folder))

    def undeclare(model: onnx.ModelProto) -> None:
        for value in model.graph.input:
            set_dim(value, 0, "batch")
            set_dim(value, 1, "sequence")

    edit_onnx(folder, undeclare)


def of_sixteen_positions(folder: Path) -> None:
    """Short texts run, those of the window do not."""

    def shorten(model: onnx.ModelProto) -> None:
        (table,) = (tensor for tensor in model.graph.initializer if "position_embeddings" in tensor.name)
        table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table)[:16], table.name))

    edit_onnx(folder, shorten)


def without_mask(folder: Path) -> None:
    """Padding is attended to, as in an export that lost its mask."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.input[:] = ["all" if name == "attention_mask" else name for name in node.input]
        model.graph.node.insert(0, helper.make_node("Cast", ["same"], ["all"], to=TensorProto.INT64))
        model.graph.node.insert(0, helper.make_node("Equal", ["attention_mask", "attention_mask"], ["same"]))

    edit_onnx(folder, change)


def overflowing(folder: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        (table,) = (tensor for tensor in model.graph.initializer if "word_embeddings" in tensor.name)
        table.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(table), np.inf), table.name))

    edit_onnx(folder, change)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (of_seven_tokens, "bert-cls-encoder cannot be run by {} with texts of 1 tokens: "),
        (of_sixteen_positions, "bert-cls-encoder cannot be run by {} with texts of 48 tokens: "),
        (without_mask, "bert-cls gives a text other embeddings beside longer texts than alone: they agree to 0."),
        (overflowing, " that are not finite numbers for "),
    ],
)
@pytest.mark.parametrize(("runtime", "engine"), [("openvino", "OpenVINO"), ("onnxruntime", "ONNX Runtime")])
def test_a_graph_that_would_not_serve(
    tmp_path: Path,
    damage: Callable[[Path], None],
    words: str,
    runtime: str,
    engine: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = checkpoint("bert-cls", tmp_path)
    damage(folder)
    message = refused(folder, capsys, "--runtime", runtime)
    assert words.format(engine) in message
    assert message.strip().endswith(AGAIN)


class Texts(CalibrationDataReader):
    """What a static quantisation measures values on."""

    def __init__(self, name: str) -> None:
        self._feeds = self._made(token_ids(name)[:20])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)

    def _made(self, texts: list[list[int]]) -> Iterator[dict[str, Array]]:
        for ids in texts:
            rows = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": [0] * len(ids)}
            yield {name: np.array([row], np.int64) for name, row in rows.items()}


def test_operators_that_one_engine_runs_and_another_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Static quantisation: pairs of QuantizeLinear and DequantizeLinear, which OpenVINO fails to compile here."""
    folder = checkpoint("bert-cls", tmp_path)
    whole = graph_of(folder).replace(folder / "whole.onnx")
    quantize_static(whole, folder / "model.onnx", Texts("bert-cls"), quant_format=QuantFormat.QDQ)
    whole.unlink()
    assert "bert-cls-encoder cannot be run by OpenVINO: " in refused(folder, capsys)
    build(folder, tmp_path / "repository", "--runtime", "onnxruntime")
    for texts, batch in requests(token_ids("bert-cls")):
        (feed,) = feeds("onnxruntime", batch)
        vectors = answer(tmp_path / "repository", "bert-cls", "onnxruntime", OnnxRuntime, feed)["embeddings"]
        assert cosines(vectors, expected("bert-cls")["embeddings"][texts]).min() >= 0.99


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator])
@pytest.mark.parametrize("engine", [OnnxRuntime, OpenVino])
def test_statically_quantised_products(
    tmp_path: Path, form: QuantFormat, engine: type[OnnxRuntime] | type[OpenVino]
) -> None:
    """Both forms in both engines: between QuantizeLinear and DequantizeLinear, and as QLinearMatMul."""
    folder = checkpoint("bert-cls", tmp_path)
    whole = graph_of(folder).replace(folder / "whole.onnx")
    quantize_static(whole, folder / "model.onnx", Texts("bert-cls"), form, op_types_to_quantize=["MatMul"])
    whole.unlink()
    build(folder, tmp_path / "repository")
    for texts, batch in requests(token_ids("bert-cls")):
        (feed,) = feeds("openvino", batch)
        vectors = answer(tmp_path / "repository", "bert-cls", "openvino", engine, feed)["embeddings"]
        assert cosines(vectors, expected("bert-cls")["embeddings"][texts]).min() >= 0.99


def test_a_declared_length_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint("bert-cls", tmp_path)
    shutil.copy(EXPORTED / "bert-cls-fixed" / "model.onnx", graph_of(folder))
    message = refused(folder, capsys)
    assert "declares input_ids INT64 [1, 7], so it was exported for texts of 7 tokens alone" in message


def test_an_engine_that_is_not_here_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(TINY / "bert-cls", tmp_path, "--runtime", "tensorrt")
    said = "bert-cls: its graphs were not checked: this check runs no graph on tensorrt\n"
    assert said in capsys.readouterr().out


def test_bf16_in_onnxruntime_is_for_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked for by name, and then no Triton without a GPU loads it; by default a CPU can run what is built."""
    options = ["--runtime", "onnxruntime", "--repository", str(tmp_path)]
    for asked, kind in (
        ([], ModelInstanceGroup.KIND_AUTO),
        (["--precision", "bf16"], ModelInstanceGroup.KIND_GPU),
    ):
        assert make.main([str(TINY / "bert-cls"), *options, *asked]) == 0
        for step in ("encoder", "pooling"):
            assert read_config(tmp_path, f"bert-cls-{step}").instance_group[0].kind == kind
        note = "bert-cls: its graphs were not checked: this check runs no graph on a GPU"
        assert (note in capsys.readouterr().out) == bool(asked)


def test_what_is_not_checked_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Large models are checked with shorter texts, and not where memory is short."""
    assert make.main([str(TINY / "bert-cls"), "--repository", str(tmp_path)]) == 0
    assert "were not checked" not in capsys.readouterr().out
    monkeypatch.setattr(families, "BUDGET", 10_000_000)
    (note,) = families.check(tmp_path, "bert-cls")
    assert note.startswith("bert-cls: its graphs were checked with texts of up to ")
    assert note.endswith(" of 64 tokens")
    monkeypatch.setattr(families, "MEMORY", 10**9)
    (note,) = families.check(tmp_path, "bert-cls")
    assert "its graphs were not checked: they may take" in note


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (11, "end the engine that runs them, by signal 11"),
        (9, "were killed in their check: most likely memory"),
    ],
)
def test_an_engine_that_dies_of_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\nkill -{number} $$\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(families.sys, "executable", str(interpreter))
    with pytest.raises(BuildError, match=words):
        families.check_apart(tmp_path, ["bert-cls"])


def test_the_command_checks_what_is_there(tmp_path: Path) -> None:
    """On the machine that is to serve, which need not be the one that built."""
    build(TINY / "bert-cls", tmp_path)

    def checked(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "build.check", name, "--repository", str(tmp_path)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert (checked("bert-cls").returncode, checked("bert-cls").stdout) == (0, "")
    assert checked("none").stderr.startswith(f"no model 'none' in {tmp_path}: ")
    graph = tmp_path / "bert-cls-encoder" / "1" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:5000])
    assert checked("bert-cls").stderr.endswith("is not what was built: build bert-cls again\n")
    other = tmp_path / "other" / "build.json"  # of which nothing is asked
    other.parent.mkdir()
    other.write_text("{")
    (tmp_path / "bert-cls" / "build.json").write_text("{")
    assert checked("bert-cls").stderr.endswith("build.json is not what was built: build bert-cls again\n")
    (tmp_path / "bert-cls" / "build.json").unlink()
    # Before it, the engine writes what it thinks.
    sentence = checked("bert-cls").stderr.splitlines()[-1]
    assert sentence.startswith("bert-cls-encoder cannot be run by OpenVINO: ")


@pytest.mark.parametrize("name", ["minilm", "minilm-rerank"])  # one record for both
def test_files_that_are_not_what_was_built(tmp_path: Path, name: str) -> None:
    """Weights that run and give numbers, only others than the checkpoint's."""
    assert make.main(["minilm", "--repository", str(tmp_path)]) == 0
    command = [sys.executable, "-m", "build.check", name, "--repository", str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    weights = tmp_path / "minilm-encoder" / "1" / "model.onnx.data"
    content = weights.read_bytes()
    weights.write_bytes(content[4:] + content[:4])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"{weights} is not what was built: build minilm again\n")
    weights.unlink()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 1
