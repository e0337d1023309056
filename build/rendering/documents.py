"""The Triton models of the families that read documents, as docling's clients of KServe v2 call them.

Each is an ensemble of one step, so that it is loaded and let go of as other families are. Docling takes tensors by
their order. `images`, `pixel_values` and what follows from them have a batch dimension besides; a page's text has
none, since pages are of any size and lines of any number.

ocr      image UINT8 [1, H, W, 3], lang_type BYTES [1, 1] optional
         -> boxes FP32 [lines, 4, 2], txts BYTES [lines], scores FP32 [lines]: see `steps/ocr.py`
layout   images FP32 [3, 640, 640], orig_target_sizes INT64 [2]
         -> labels INT64 [Q], boxes FP32 [Q, 4], scores FP32 [Q]: see `graphs/documents.py`
picture  pixel_values FP32 [3, side, side] -> logits FP32 [classes]: see there

Beside a layout or picture model lies `artifacts`, for docling's `artifacts_path`: names of classes, and how the
tensors are made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import (
    TYPE_FP32,
    TYPE_INT64,
    TYPE_STRING,
    TYPE_UINT8,
    ModelConfig,
    ModelEnsembling,
    ModelInstanceGroup,
)

from build.catalog import CatalogEntry
from build.errors import BuildError, UnsupportedRuntimeError
from build.graphs.documents import LABELS, SIDE, picture_shape, write_cdla, write_layout, write_picture_classes
from build.graphs.onnx_graph import OnnxGraph
from build.rendering.contract import Tensor
from build.rendering.model_folder import Model, graph
from build.rendering.models import graph_to_adopt
from build.runtimes import DEFAULT
from build.sources.checkpoint import Checkpoint
from build.sources.files import PREPROCESSOR, files_of, is_listed, own_file
from build.sources.labels import label_names
from build.target import Target

IMAGE = Tensor("image", TYPE_UINT8, (1, -1, -1, 3))
LANG_TYPE = Tensor("lang_type", TYPE_STRING, (1, 1), optional=True)
LINES = (
    Tensor("boxes", TYPE_FP32, (-1, 4, 2)),
    Tensor("txts", TYPE_STRING, (-1,)),
    Tensor("scores", TYPE_FP32, (-1,)),
)
PAGES = (Tensor("images", TYPE_FP32, (3, SIDE, SIDE)), Tensor("orig_target_sizes", TYPE_INT64, (2,)))
FINDS = (
    Tensor("labels", TYPE_INT64, (-1,)),
    Tensor("boxes", TYPE_FP32, (-1, 4)),
    Tensor("scores", TYPE_FP32, (-1,)),
)

MOST = 16
"""Pages or pictures in one request or batch; docling sends 4 at a time, and its message ends at 13 pages."""

AT_ONCE = 2
"""Pages that are gathered, and that the engine runs together."""

DELAY = 20_000
"""Microseconds that a page waits for another one to be run with."""

ARTIFACTS = "artifacts"
LAYOUT, PICTURE = "docling-project--docling-layout-heron", "docling-project--DocumentFigureClassifier-v2.5"
"""Folders of `artifacts` that docling looks for, whatever serves."""

LAYOUT_PREPROCESSOR = {
    "image_processor_type": "RTDetrImageProcessor",
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": False,
    "do_pad": False,
}
"""How a page becomes `images`: scaled bilinearly, values in 0..1."""


def document_models(entry: CatalogEntry, checkpoint: Checkpoint, target: Target) -> list[Model]:
    """The family's ensemble and its step; raises BuildError for what cannot be built."""
    (task,) = entry.tasks
    if task == "ocr":
        return ocr_models(entry, checkpoint)
    if task == "picture":
        return picture_models(entry, checkpoint, target)
    return layout_models(entry, checkpoint, target)


def ocr_models(entry: CatalogEntry, checkpoint: Checkpoint) -> list[Model]:
    """The family that reads text: a library in Python, which runs its own files."""
    step = ModelConfig(
        name=f"{entry.name}-reader",
        backend="python",
        input=[tensor.as_input() for tensor in (IMAGE, LANG_TYPE)],
        output=[tensor.as_output() for tensor in LINES],
        instance_group=[ModelInstanceGroup(count=1, kind=ModelInstanceGroup.KIND_CPU)],
    )
    weights = tuple(checkpoint.folder / name for name in entry.files)
    return [Model(ensemble(entry, step)), Model(step, step="ocr", files=weights)]


def layout_models(entry: CatalogEntry, checkpoint: Checkpoint, target: Target) -> list[Model]:
    """The family that finds the parts of a page."""
    if is_listed(checkpoint.folder / "config.json"):
        path, at_once, write = graph_of(entry, checkpoint), AT_ONCE, write_layout
        check_preprocessor(checkpoint)
        config = (checkpoint.folder / "config.json").read_text()
    else:  # the one model that comes without
        (name,) = entry.files
        path, at_once, write = checkpoint.folder / name, 1, write_cdla
        config = json.dumps({"model_type": "rt_detr_v2", "id2label": dict(enumerate(LABELS))}, indent=2)
        if not target.traits.step:  # a backend of Triton's runs a whole batch at once
            raise UnsupportedRuntimeError(f"{entry.name} takes one page at a time: build it for {DEFAULT}")
    step = graph_step(entry, target, PAGES, FINDS, at_once)
    artifacts = {"config.json": config, PREPROCESSOR: json.dumps(LAYOUT_PREPROCESSOR, indent=2)}
    return graph_models(entry, target, step, LAYOUT, artifacts, lambda g: write(g, path))


def picture_models(entry: CatalogEntry, checkpoint: Checkpoint, target: Target) -> list[Model]:
    """The family that says what a picture shows."""
    path = graph_of(entry, checkpoint)
    side, classes = picture_shape(path)
    count = len(label_names(checkpoint.config))
    if count != classes:
        raise BuildError(f"{path} gives {classes} logits, and {checkpoint.config.path} names {count} classes")
    pixels, logits = Tensor("pixel_values", TYPE_FP32, (3, side, side)), Tensor("logits", TYPE_FP32, (classes,))
    step = graph_step(entry, target, (pixels,), (logits,), AT_ONCE)
    names = ("config.json", PREPROCESSOR)
    preprocessor = checkpoint.settings(checkpoint.folder / PREPROCESSOR)
    preprocessor.skip(preprocessor)  # it is docling that makes pictures by it
    artifacts = {name: own_file(checkpoint.folder / name, checkpoint.folder).read_text() for name in names}
    return graph_models(entry, target, step, PICTURE, artifacts, lambda g: write_picture_classes(g, path))


def graph_of(entry: CatalogEntry, checkpoint: Checkpoint) -> Path:
    """The exported graph of a checkpoint, of which nothing else is read; BuildError where there is none."""
    checkpoint.config.skip(checkpoint.config)
    name = graph_to_adopt(entry, checkpoint, files_of(checkpoint.folder))
    assert name is not None, "no architecture of ours sees"
    return checkpoint.folder / name


def check_preprocessor(checkpoint: Checkpoint) -> None:
    """Raises BuildError where a layout model wants its pages otherwise than docling is told to make them."""
    path = checkpoint.folder / PREPROCESSOR
    if not is_listed(path):
        return
    settings = checkpoint.settings(path)
    settings.require("do_resize", True)
    settings.require("do_normalize", False)
    settings.require("do_pad", False)
    settings.require("resample", 2)
    settings.require("size", {"height": SIDE, "width": SIDE})
    # A graph that takes bytes rescales by itself; what else there is says how to pad or normalise.
    settings.skip(settings)


def graph_step(
    entry: CatalogEntry, target: Target, inputs: Sequence[Tensor], outputs: Sequence[Tensor], at_once: int
) -> ModelConfig:
    """The model of a graph; in Python its step runs `at_once` items together."""
    step = ModelConfig(
        name=f"{entry.name}-graph",
        backend=target.traits.backend,
        max_batch_size=MOST,
        input=[tensor.as_input() for tensor in inputs],
        output=[tensor.as_output() for tensor in outputs],
        instance_group=[ModelInstanceGroup(count=1, kind=target.kind)],
    )
    step.dynamic_batching.preferred_batch_size.append(AT_ONCE)
    step.dynamic_batching.max_queue_delay_microseconds = DELAY
    if target.traits.step:
        # In bf16, finds near the least score come and go.
        parameters = {
            "runtime": target.runtime,
            "precision": "fp32",
            "threads": "auto",
            "token_budget": str(at_once),
            "spread": "1",
        }
        for key, value in parameters.items():
            step.parameters[key].string_value = value
    else:
        step.default_model_filename = target.traits.file
    return step


def graph_models(
    entry: CatalogEntry,
    target: Target,
    step: ModelConfig,
    folder: str,
    artifacts: Mapping[str, str],
    write_graph: Callable[[OnnxGraph], None],
) -> list[Model]:
    """The ensemble of a graph's step, with the files of docling's that belong into a `folder` of its artifacts."""
    beside = {f"{ARTIFACTS}/{folder}/{name}": content for name, content in artifacts.items()}
    return [Model(ensemble(entry, step), beside=beside), graph(step, target, write_graph)]


def ensemble(entry: CatalogEntry, step: ModelConfig) -> ModelConfig:
    """`<family>`: what its one step takes and gives, in the same order."""
    config = ModelConfig(
        name=entry.name,
        platform="ensemble",
        max_batch_size=step.max_batch_size,
        input=step.input,
        output=step.output,
    )
    for key, value in entry.facts.items():
        config.parameters[key].string_value = value
    inputs, outputs = ({tensor.name: tensor.name for tensor in tensors} for tensors in (step.input, step.output))
    config.ensemble_scheduling.step.append(
        ModelEnsembling.Step(model_name=step.name, model_version=-1, input_map=inputs, output_map=outputs)
    )
    return config
