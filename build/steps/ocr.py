"""OCR step (Python backend): the lines of text on one page, by RapidOCR, as docling's client of KServe v2 asks.

Inputs   image      UINT8 [1, H, W, 3], RGB
         lang_type  BYTES [1, 1], optional: a language that the page is in, as docling sends its first one
Outputs  boxes   FP32 [lines, 4, 2], across and down in pixels: the corners from the upper left on, clockwise
         txts    BYTES [lines], UTF-8
         scores  FP32 [lines], 0..1

The models are PP-OCR's: one finds lines, one tells those upside down, one reads all languages that it knows. So a
language chooses nothing. One that is not read is refused, for its text would come back as other letters.
Callers are answered one after another: a page fills the processors. Its lines are read six at a time.

Errors: INVALID_ARG for an image without pixels and for a language; INTERNAL for what the library raises. A request
whose deadline has passed is CANCELLED.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from . import deadline
from .memory import Memory

try:
    import cv2
    from rapidocr import EngineType, ModelType, OCRVersion, RapidOCR
    from rapidocr.utils.model_resolver import LANG_MAPPING, list_supported_langs
    from rapidocr.utils.typings import TaskType
except ImportError as missing:
    raise ImportError(f"{missing.name} is not installed: run `make setup DOCUMENTS=1`") from None

PARTS = {"Det": "*_det_*.onnx", "Cls": "*_cls_*.onnx", "Rec": "*_rec_*.onnx"}
"""RapidOCR's name of a model -> its file in the version folder."""

NAMES = {"chinese", "french", "german", "english", "japanese"}
"""Languages as docling called them before it had codes, beside those whose name is in the library's table."""


class TritonPythonModel:
    """RapidOCR on OpenVINO."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the three models of the version folder."""
        folder = Path(args["model_repository"], args["model_version"])
        params: dict[str, Any] = {"Global.log_level": "warning"}
        for part, pattern in PARTS.items():
            params[f"{part}.engine_type"] = EngineType.OPENVINO
            params[f"{part}.model_path"] = str(next(folder.glob(pattern)))
        self._ocr: Any = RapidOCR(params=params)
        self._languages = _languages()
        # The library loads a model when it is first used.
        self._ocr(_page_with_a_line())
        self._memory = Memory(args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Reads each request's page."""
        responses = []
        for request in requests:
            try:
                responses.append(self._read(request))
            except RefusedError as error:
                code = error.code
                responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code)))
            except Exception as error:  # the library has its own, and OpenVINO's and NumPy's
                sentence = f"the page cannot be read: {' '.join(str(error).split())[-200:]}"
                responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError(sentence)))
        self._memory.measure()
        return responses

    def _read(self, request: Any) -> Any:
        if time.monotonic() > deadline.of(request):
            raise RefusedError("nobody waits for the answer", pb_utils.TritonError.CANCELLED)
        (image,) = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
        if not image.size:
            raise RefusedError(f"an image of {image.shape[1]} x {image.shape[0]} pixels has nothing to read")
        language = pb_utils.get_input_tensor_by_name(request, "lang_type")
        if language is not None:
            self._check(language.as_numpy().reshape(-1)[0].decode(errors="replace"))
        found = self._ocr(np.ascontiguousarray(image))
        lines = 0 if found.boxes is None else len(found.boxes)
        boxes = np.asarray(found.boxes if lines else [], np.float32).reshape(lines, 4, 2)
        texts = np.empty(lines, np.object_)
        texts[:] = [text.encode() for text in found.txts or ()]
        scores = np.asarray(found.scores or (), np.float32)
        outputs = {"boxes": boxes, "txts": texts, "scores": scores}
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])

    def _check(self, language: str) -> None:
        """Raises RefusedError for a language that is not read, by its code, a region after it or not, or name."""
        code = language.strip().lower().replace("_", "-")
        if not {code, code.partition("-")[0]} & self._languages:
            raise RefusedError(f"text in {language!r} is not read here; {', '.join(sorted(self._languages))} is")


class RefusedError(Exception):
    """Why a request is not answered."""

    def __init__(self, sentence: str, code: Any = None) -> None:
        super().__init__(sentence)
        self.code = pb_utils.TritonError.INVALID_ARG if code is None else code


def _languages() -> set[str]:
    """Codes and English names of all that the recogniser reads."""
    codes = {code.lower() for code in list_supported_langs(TaskType.REC, OCRVersion.PPOCRV6, ModelType.SMALL)}
    named = {LANG_MAPPING[code]["en"].lower() for code in codes if code in LANG_MAPPING}
    return codes | NAMES | {"zh", "ja", "de", "fr"} | named


def _page_with_a_line() -> Any:
    """UINT8 [96, 480, 3]: a page that all three models have work with."""
    page = np.full((96, 480, 3), 255, np.uint8)
    return cv2.putText(page, "one line of text", (20, 60), cv2.FONT_HERSHEY_SIMPLEX, 1.2, (0, 0, 0), 2)
