"""Graphs of models that look at pages, with the tensors that docling's clients of KServe v2 send and read.

Layout    images FP32 [N, 3, 640, 640], RGB in 0..1; orig_target_sizes INT64 [N, 2], width and height of the page
          -> labels INT64 [N, Q], an index of LABELS; boxes FP32 [N, Q, 4], left, top, right and bottom in pixels
          of the page; scores FP32 [N, Q] in 0..1, descending. A place without a find has the score 0.
Pictures  pixel_values FP32 [N, 3, 224, 224], as the checkpoint's own preprocessor makes them
          -> logits FP32 [N, classes]

Docling takes tensors by their order, not by name. Raises BuildError for a graph that takes or gives others.

The layout model of PaddleDetection (PicoDet) finds boxes as Generalized Focal Loss does (Li et al. 2020): for each
place of a grid a score for each class and, for each side, a distribution over distances of 0 to 7 strides, whose
mean is taken. Of boxes of a class that overlap by half, the best is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from build.errors import BuildError
from build.graphs.exported import check_numbers, check_operators, converted, operators, shape_of
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.surgery import graft
from build.sources.onnx_file import read_onnx, tensors

SIDE = 640
"""Pixels that docling scales a page's sides to."""

LABELS = (
    "caption",
    "footnote",
    "formula",
    "list_item",
    "page_footer",
    "page_header",
    "picture",
    "section_header",
    "table",
    "text",
    "title",
    "document_index",
    "code",
    "checkbox_selected",
    "checkbox_unselected",
    "form",
    "key_value_region",
)
"""What docling-layout-heron tells apart, in its order, by docling's own names."""

CDLA = (
    "text",
    "section_header",
    "picture",
    "caption",
    "table",
    "caption",
    "page_header",
    "page_footer",
    "text",
    "formula",
)
"""The classes of CDLA, in their order, as docling knows them: a reference is a text, a title that of a section."""

PAGE = (800, 608)
"""Height and width that PicoDet of CDLA takes a page in."""
STRIDES = (8, 16, 32, 64)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEAST_SCORE, MOST_OVERLAP = 0.3, 0.5
MOST = 100
"""Finds on a page, and of one class."""


def write_layout(g: OnnxGraph, path: Path) -> None:
    """The graph of an RT-DETR with its own last step, as docling-layout-heron is published.

    Some of its exports take pages as bytes, and scale them by themselves.
    """
    model = _read(path, ("images", "orig_target_sizes"), ("labels", "boxes", "scores"))
    pages, sizes = _layout_inputs(g)
    dtype = next(value for value in model.graph.input if value.name == "images").type.tensor_type.elem_type
    if dtype == TensorProto.UINT8:
        pages = g.op("Round", g.op("Mul", pages, g.constant(255, np.float32)))
    if dtype != TensorProto.FLOAT:
        pages = g.op("Cast", pages, to=dtype)
    feeds = {"images": pages, "orig_target_sizes": sizes}
    labels, boxes, scores = graft(g, path, model, feeds, ["labels", "boxes", "scores"])
    _layout_outputs(g, labels, boxes, scores)


def write_cdla(g: OnnxGraph, path: Path) -> None:
    """The graph of PicoDet of CDLA with what makes boxes of its grids, for one page at a time."""
    model = read_onnx(path)
    outputs = [value.name for value in model.graph.output]
    _check(path, model, ("image",), outputs)
    if shape_of(model.graph.input[0])[2:] != list(PAGE) or len(outputs) != 2 * len(STRIDES):
        raise BuildError(f"{path} is not PicoDet of {PAGE[1]} x {PAGE[0]} pixels with {len(STRIDES)} grids")
    pages, sizes = _layout_inputs(g)
    page = g.op(
        "Resize",
        pages,
        "",
        "",
        g.constant([1, 3, *PAGE], np.int64),
        mode="linear",
        coordinate_transformation_mode="half_pixel",
    )
    mean, deviation = (g.constant(np.reshape(one, (1, 3, 1, 1)), np.float32) for one in (MEAN, DEVIATION))
    page = g.op("Div", g.op("Sub", page, mean), deviation)
    found = graft(g, path, model, {"image": page}, outputs)
    grids = list(zip(STRIDES, found[: len(STRIDES)], found[len(STRIDES) :], strict=True))

    scores = g.op("Transpose", g.op("Concat", *(score for _, score, _ in grids), axis=1), perm=[0, 2, 1])
    sides = g.op("Concat", *(_distances(g, distances, stride) for stride, _, distances in grids), axis=1)
    centers = np.concatenate([_centers(stride) for stride in STRIDES])
    outwards = g.op("Mul", sides, g.constant([-1, -1, 1, 1], np.float32))
    boxes = g.op("Add", outwards, g.constant(np.tile(centers, 2)[None], np.float32))

    bounds = (g.constant(bound, np.float32) for bound in (MOST_OVERLAP, LEAST_SCORE))
    kept = g.op("NonMaxSuppression", boxes, scores, g.constant(MOST, np.int64), *bounds)
    place, kind = (g.op("Gather", kept, g.constant(column, np.int64), axis=1) for column in (2, 1))
    # As many more as make every page's finds the same number.
    empty = g.constant(np.zeros(MOST), np.float32)
    found_scores = g.op("Concat", g.op("GatherND", scores, kept), empty, axis=0)
    best, order = g.ops("TopK", 2, found_scores, g.constant([MOST], np.int64), axis=0)
    rows = g.op("Gather", g.op("Squeeze", boxes, g.constant([0], np.int64)), place)
    rows = g.op("Concat", rows, g.constant(np.zeros((MOST, 4)), np.float32), axis=0)
    kinds = g.op("Gather", g.constant([LABELS.index(label) for label in CDLA], np.int64), kind)
    kinds = g.op("Concat", kinds, g.constant(np.zeros(MOST), np.int64), axis=0)
    ends = g.constant([PAGE[1], PAGE[0]] * 2, np.float32)
    rows = g.op("Min", g.op("Max", g.op("Gather", rows, order), g.constant(0, np.float32)), ends)
    size = g.op("Cast", g.op("Concat", sizes, sizes, axis=1), to=TensorProto.FLOAT)
    rows = g.op("Mul", g.op("Div", rows, ends), size)
    one = g.constant([0], np.int64)
    _layout_outputs(g, *(g.op("Unsqueeze", value, one) for value in (g.op("Gather", kinds, order), rows, best)))


def write_picture_classes(g: OnnxGraph, path: Path) -> None:
    """The graph of a classifier of pictures.

    Its exporter may have taken the channels of its last pooling for the width of the window: a window past the
    picture's edges is the whole picture, which OpenVINO does not take it for.
    """
    side, classes = picture_shape(path)
    model = converted(path, read_onnx(path))
    for node in model.graph.node:
        window: Sequence[int] = next((one.ints for one in node.attribute if one.name == "kernel_shape"), [])
        if node.op_type == "AveragePool" and min(window, default=0) >= side:
            node.op_type = "GlobalAveragePool"
            node.ClearField("attribute")
    pixels = g.input("pixel_values", TensorProto.FLOAT, ["pictures", 3, side, side])
    inputs, outputs = _ends(model)
    (logits,) = graft(g, path, model, {inputs[0]: pixels}, outputs)
    g.output("logits", logits, TensorProto.FLOAT, ["pictures", classes])


def picture_shape(path: Path) -> tuple[int, int]:
    """The side of its pictures and the number of its classes; BuildError where it is no classifier of pictures."""
    model = read_onnx(path)
    inputs, outputs = _ends(model)
    _check(path, model, inputs[:1], outputs[:1])
    _, *pixels = shape_of(next(value for value in model.graph.input if value.name == inputs[0]))
    _, *logits = shape_of(model.graph.output[0])
    is_square = len(pixels) == 3 and pixels[0] == 3 and pixels[1] == pixels[2] > 0
    if len(outputs) > 1 or not is_square or len(logits) != 1:
        raise BuildError(f"{path} is no classifier of square pictures in colour, of a size that it says")
    return pixels[1], logits[0]


def _layout_inputs(g: OnnxGraph) -> tuple[str, str]:
    pages = g.input("images", TensorProto.FLOAT, ["pages", 3, SIDE, SIDE])
    return pages, g.input("orig_target_sizes", TensorProto.INT64, ["pages", 2])


def _layout_outputs(g: OnnxGraph, labels: str, boxes: str, scores: str) -> None:
    g.output("labels", labels, TensorProto.INT64, ["pages", "finds"])
    g.output("boxes", boxes, TensorProto.FLOAT, ["pages", "finds", 4])
    g.output("scores", scores, TensorProto.FLOAT, ["pages", "finds"])


def _distances(g: OnnxGraph, distribution: str, stride: int) -> str:
    """[1, places, 4]: the means of [1, places, 4 * 8] logits over distances, in pixels."""
    shares = g.op("Softmax", g.op("Reshape", distribution, g.constant([1, -1, 4, 8], np.int64)), axis=-1)
    steps = g.op("Mul", shares, g.constant(np.arange(8) * stride, np.float32))
    return g.op("ReduceSum", steps, g.constant([-1], np.int64), keepdims=0)


def _centers(stride: int) -> npt.NDArray[Any]:
    """[places, 2]: across and down, of one grid by rows."""
    down, across = np.mgrid[0 : -(-PAGE[0] // stride), 0 : -(-PAGE[1] // stride)]
    return (np.stack([across.ravel(), down.ravel()], axis=1) + 0.5) * stride


def _read(path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """The model in a file, once it takes and gives what these are called."""
    model = read_onnx(path)
    _check(path, model, inputs, outputs)
    return converted(path, model)


def _check(path: Path, model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Raises BuildError where a model takes or gives anything else, or cannot be run."""
    check_operators(path, model, operators(model))
    taken, given = _ends(model)
    if {*taken} != {*inputs} or not {*outputs} <= {*given}:
        raise BuildError(
            f"{path} takes {', '.join(taken)} and gives {', '.join(given)}; "
            f"{', '.join(inputs)} and {', '.join(outputs)} are wanted"
        )
    for tensor in tensors(model):
        check_numbers(path, tensor)


def _ends(model: onnx.ModelProto) -> tuple[list[str], list[str]]:
    """Names of the inputs, without weights that old files list among them, and of the outputs."""
    weights = {tensor.name for tensor in model.graph.initializer}
    taken = [value.name for value in model.graph.input if value.name not in weights]
    return taken, [value.name for value in model.graph.output]
