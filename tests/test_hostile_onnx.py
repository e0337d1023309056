"""ONNX files that are damaged, or made to harm: one sentence each, nothing read from elsewhere, and no hang."""

from __future__ import annotations

import math
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from test_adoption import build, checkpoint, edit_onnx, graph_of
from test_exported import refused

from build.errors import BuildError
from build.sources.onnx_file import parse_onnx

NAME = "xlm-roberta"
"""Its weights lie in two files beside the graph."""
DATA = "model.onnx_data"


def place(**entries: str) -> Callable[[Path], None]:
    """Where the first weight says that it lies."""

    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
        known = {entry.key: entry.value for entry in tensor.external_data} | entries
        del tensor.external_data[:]
        for key, value in known.items():
            tensor.external_data.add(key=key, value=value)

    return lambda folder: edit_onnx(folder, change)


def weight(**fields: object) -> Callable[[Path], None]:
    """Fields of the first weight inside the model file."""

    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer.add(name="odd", data_type=1, dims=[2], raw_data=bytes(8))
        tensor.MergeFrom(TensorProto(**{k: v for k, v in fields.items() if k != "dims"}))
        if "dims" in fields:
            tensor.dims[:] = fields["dims"]

    return lambda folder: edit_onnx(folder, change)


def no_number(folder: Path) -> None:
    """One value of the last weight in another file, of a row that no text of the trial asks for."""
    path = graph_of(folder)
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    # Of FP16, as the table of words is.
    tensor = max((t for t in tensors if t.data_location == TensorProto.EXTERNAL), key=lambda t: t.dims[0])
    place = {entry.key: entry.value for entry in tensor.external_data}
    with path.with_name(place["location"]).open("r+b") as file:
        file.seek(int(place.get("offset", 0)) + 2 * (math.prod(tensor.dims) - 1))
        file.write(struct.pack("<e", math.nan))


def linked(target: str) -> Callable[[Path], None]:
    """The file of weights is a link."""

    def change(folder: Path) -> None:
        data = graph_of(folder).with_name(DATA)
        (folder.parent / "elsewhere").write_bytes(data.read_bytes())
        data.unlink()
        data.symlink_to(target.format(elsewhere=folder.parent / "elsewhere"))

    return change


def fifo(folder: Path) -> None:
    """Who opens it waits for ever."""
    data = graph_of(folder).with_name(DATA)
    data.unlink()
    os.mkfifo(data)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in the graph's place."""

    def change(folder: Path) -> None:
        path = graph_of(folder)
        path.unlink()
        make(path)

    return change


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 << 30)


def calling(*bodies: str) -> Callable[[Path], None]:
    """Functions f0, f1, ... each of which calls the one named."""

    def change(model: onnx.ModelProto) -> None:
        model.opset_import.append(helper.make_opsetid("own", 1))
        for i, called in enumerate(bodies):
            node = helper.make_node(called, ["x"], ["y"], domain="own")
            function = helper.make_function("own", f"f{i}", ["x"], ["y"], [node], [helper.make_opsetid("own", 1)])
            model.functions.append(function)
        name = model.graph.output[0].name
        for node in model.graph.node:
            node.output[:] = [f"{value}_0" if value == name else value for value in node.output]
        model.graph.node.append(helper.make_node("f0", [f"{name}_0"], [name], domain="own"))

    return lambda folder: edit_onnx(folder, change)


def nested(folder: Path) -> None:
    """Graphs in attributes of nodes of graphs, deeper than protobuf reads."""

    def field(number: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    graph = b""
    for _ in range(200):
        graph = field(1, field(5, field(6, graph)))
    graph_of(folder).write_bytes(field(7, graph))


def not_text(folder: Path) -> None:
    path = graph_of(folder)
    content = path.read_bytes()
    assert content.count(b"attention_mask") > 1
    path.write_bytes(content.replace(b"attention_mask", b"attention\xff\xfeask"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (place(location="/etc/hostname"), "asks for weights outside of its folder, in '/etc/hostname'"),
        (place(location="../config.json"), "asks for weights outside of its folder, in '../config.json'"),
        (place(location="a/../../config.json"), "asks for weights outside of its folder"),
        (place(location=""), "lies in another file, which it does not name"),
        (place(location="a\0b"), "which is not there: get that file too"),
        (place(location="a" * 5000), "which is not there: get that file too"),
        (place(location="."), "has weights in '.', which is not there"),
        (place(location="model.onnx"), "asks for weights in itself"),
        (place(location="./model.onnx"), "asks for weights in itself"),
        (place(offset="-64"), "has the offset '-64'"),
        (place(offset="0x10"), "has the offset '0x10'"),
        (place(offset=str(1 << 62)), "bytes, but model.onnx has weights up to"),
        (place(length="-1"), "has the length '-1'"),
        (place(length="3"), "has 3 bytes of the "),
        (linked("{elsewhere}"), "asks for weights outside of its folder: "),
        (linked("/dev/zero"), f"has weights in '{DATA}', which is not there"),
        (linked(DATA), f"has weights in '{DATA}', which is not there"),
        (fifo, f"has weights in '{DATA}', which is not there"),
        (weight(dims=[1 << 40, 1 << 40]), "odd has 8 bytes of the "),
        (weight(dims=[-2]), "odd has the shape [-2]"),
        (weight(data_type=9999), "odd is of a type that is not known, 9999"),
        (weight(data_type=TensorProto.UNDEFINED), "odd is of a type that is not known, 0"),
        (calling("f0"), "its function f0 calls itself"),
        (calling("f1", "f2", "f1"), "its function f0 calls itself"),
        (nested, "is not a readable ONNX model"),
        (not_text, "is not UTF-8"),
        (no_number, "that are not numbers: get it again"),
        (replaced(os.mkfifo), "has no model.safetensors"),
        (replaced(lambda path: path.symlink_to("/dev/zero")), "has no model.safetensors"),
        (replaced(lambda path: path.mkdir()), "has no model.safetensors"),
        (replaced(sparse), "is over 2 GB, which no ONNX file may be"),
    ],
)
def test_a_hostile_file(
    tmp_path: Path, damage: Callable[[Path], None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(NAME, tmp_path)
    damage(folder)
    assert words in refused(folder, capsys)


def test_links_within_a_cache_are_followed(tmp_path: Path) -> None:
    """The Hub's cache keeps every file by its hash and links to it."""
    snapshots, blobs = tmp_path / "models--org--name" / "snapshots", tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    snapshots.mkdir()
    folder = checkpoint(NAME, tmp_path).rename(snapshots / "0123")
    for i, path in enumerate(path for path in folder.rglob("*") if path.is_file()):
        path.rename(blobs / str(i))
        path.symlink_to(blobs / str(i))
    build(folder, tmp_path / "repository")


@pytest.mark.parametrize("name", [NAME, "bert-cls"])
def test_a_file_that_was_cut_or_altered(tmp_path: Path, name: str) -> None:
    """It is read, or refused with a sentence: anything else would be raised here."""
    path = graph_of(checkpoint(name, tmp_path))
    whole = path.read_bytes()
    refusals = 0
    for seed in range(200):
        source = random.Random(seed)
        content = bytearray(whole)
        for _ in range(source.randrange(1, 4)):
            content[source.randrange(len(content))] = source.randrange(256)
        path.write_bytes(content[: source.randrange(len(content))] if seed % 2 else content)
        try:
            parse_onnx(path)
        except BuildError:
            refusals += 1
    assert refusals >= 50
