"""Converts a PDF with docling, which leaves OCR and layout to the models of a Triton, and prints it as JSON.

What it prints is a DoclingDocument. Docling has an environment of its own, which `make convert FILE=...` installs.

The exit status is 0; 1 where there is no document; 3 where a part of it is missing, which stderr then names.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.command import ROOT, Ports
from tools.direct import channel_options

SECONDS = 10.0
"""Time that Triton may take to say what it has."""
PARTIAL = 3


class ConversionError(Exception):
    """There is no document; the message says why and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the document of a file; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.documents",
        description=str(__doc__).split("\n\n")[0],
    )
    parser.add_argument("file", type=Path, help="PDF to convert")
    parser.add_argument(
        "--triton",
        default=f"localhost:{Ports.grpc}",
        metavar="HOST:PORT",
        help=f"host:port of Triton's gRPC (default: localhost:{Ports.grpc})",
    )
    parser.add_argument(
        "--ocr", default="docling-ocr", metavar="MODEL", help="model that reads text (default: %(default)s)"
    )
    parser.add_argument(
        "--scan", action="store_true", help="read whole pages, not only where docling finds parts without text"
    )
    parser.add_argument(
        "--language",
        default="english",
        help="language of the text; docling passes it to the OCR model (default: english)",
    )
    parser.add_argument(
        "--layout",
        default="docling-layout-cdla",
        metavar="MODEL",
        help="model that finds parts of pages (default: %(default)s)",
    )
    parser.add_argument(
        "--artifacts",
        type=Path,
        metavar="FOLDER",
        help="folder for docling's artifacts_path (default: the one that the build of --layout wrote)",
    )
    options = parser.parse_args(arguments)
    try:
        result = convert(options)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result.document.export_to_dict(), ensure_ascii=False, indent=2))
    for item in result.errors:
        page = f"page {item.page_no}: " if item.page_no else ""
        print(f"error: {page}{sentence(item.error_message)}", file=sys.stderr)
    return PARTIAL if result.errors else 0


def convert(options: argparse.Namespace) -> Any:
    """Docling's result for a file; raises ConversionError where there is none."""
    if not options.file.is_file():
        raise ConversionError(f"there is no file {options.file}")
    artifacts = options.artifacts or ROOT / "model_repository" / options.layout / "artifacts"
    if not artifacts.is_dir():
        raise ConversionError(f"there is no folder {artifacts}: run `make build MODEL={options.layout}`")
    check(options.triton, [options.ocr, options.layout])
    complete_torchvision()
    from docling.exceptions import ConversionError as DoclingError

    try:
        return converter(options, artifacts).convert(options.file)
    except (DoclingError, RuntimeError, OSError) as error:
        raise ConversionError(sentence(str(error))) from None


def check(triton: str, models: Sequence[str]) -> None:
    """Raises ConversionError unless a Triton has the models: docling would only find out page by page."""
    try:
        from tritonclient.grpc import InferenceServerClient
        from tritonclient.utils import InferenceServerException
    except ImportError:
        raise ConversionError("docling is not installed here: run `make convert FILE=...`") from None
    with InferenceServerClient(triton, channel_args=channel_options(triton)) as client:
        for model in models:
            try:
                is_ready = client.is_model_ready(model, client_timeout=SECONDS)
            except InferenceServerException as error:
                if "UNAVAILABLE" in str(error.status()) or "DEADLINE" in str(error.status()):
                    raise ConversionError(
                        f"no Triton answers on {triton}: run `make serve DOCUMENTS=1`, or name it with --triton"
                    ) from None
                raise ConversionError(f"Triton on {triton}: {error.message()}") from None
            if not is_ready:
                raise ConversionError(
                    f"Triton on {triton} has no model {model!r}: load it with `make serve MODEL={model}`, or name "
                    "another one"
                )


def converter(options: argparse.Namespace, artifacts: Path) -> Any:
    """A DocumentConverter of PDFs whose models are Triton's."""
    from docling.datamodel.base_models import InputFormat
    from docling.datamodel.object_detection_engine_options import ApiKserveV2ObjectDetectionEngineOptions
    from docling.datamodel.pipeline_options import (
        KserveV2OcrOptions,
        LayoutObjectDetectionOptions,
        OcrMode,
        PdfPipelineOptions,
    )
    from docling.document_converter import DocumentConverter, PdfFormatOption

    layout = ApiKserveV2ObjectDetectionEngineOptions(url=options.triton, model_name=options.layout)
    pipeline = PdfPipelineOptions(
        artifacts_path=artifacts,
        enable_remote_services=True,
        do_table_structure=False,
        ocr_options=KserveV2OcrOptions(
            url=options.triton,
            model_name=options.ocr,
            lang=[options.language],
            mode=OcrMode.FULL_PAGE if options.scan else OcrMode.DEFAULT,
        ),
        layout_options=LayoutObjectDetectionOptions.from_preset("layout_heron_default", engine_options=layout),
    )
    return DocumentConverter(format_options={InputFormat.PDF: PdfFormatOption(pipeline_options=pipeline)})


def complete_torchvision() -> None:
    """Lets torchvision be imported where its own operators are of another build than torch.

    Docling imports it for the scaling of pages, which needs none of them. Where an index has a torch for CPUs, its
    torchvision may still be for CUDA.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        complete_torchvision.__dict__["kept"] = operators  # they go with what defines them


def sentence(message: str) -> str:
    """A message in one line; of gRPC's report only what the server said."""
    said = re.search(r'details = "(.*)"', message)
    return " ".join(f"{message.partition(': <')[0]}: {said[1]}".split() if said else message.split())


if __name__ == "__main__":
    sys.exit(main())
