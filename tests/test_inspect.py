"""`python -m build.inspect` on graphs whose contents are known."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from build import inspect


def write_model(path: Path) -> None:
    """A matrix product of 6 FP16 values with one bias of 2 FP32 ones."""
    weights = [
        helper.make_tensor("w", TensorProto.FLOAT16, [3, 2], [0.0] * 6),
        helper.make_tensor("b", TensorProto.FLOAT, [2], [0.0] * 2),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Cast", ["xw"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["wide", "b"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", 3])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])]
    graph = helper.make_graph(nodes, "known", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model.onnx")
    assert inspect.main([str(tmp_path / "model.onnx")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "input    x FLOAT16 [batch, 3]",
        "output   y FLOAT [batch, 2]",
        "opset    ai.onnx 17",
        "weights  FLOAT: 1 tensors, 2 values, 0.0 MB",
        "weights  FLOAT16: 1 tensors, 6 values, 0.0 MB",
        "nodes    3: 1 MatMul, 1 Cast, 1 Add",
    ]


@pytest.mark.parametrize("content", [None, b"nonsense"])
def test_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    assert inspect.main([str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {path} is not a readable ONNX model")
