"""A padded encoder: requests of one shape, which is all that Triton merges here, are one call of the engine."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import triton_python_backend_utils as pb_utils

INPUTS = ("input_ids", "attention_mask")


class TritonPythonModel:
    """`model.onnx` on OpenVINO with the settings that it has by itself."""

    def initialize(self, args: dict[str, str]) -> None:
        """Compiles the graph."""
        path = Path(args["model_repository"], args["model_version"], "model.onnx")
        self._model = ov.Core().compile_model(path, "CPU")

    def execute(self, requests: list[Any]) -> list[Any]:
        """One batch."""
        rows = [[pb_utils.get_input_tensor_by_name(one, name).as_numpy() for one in requests] for name in INPUTS]
        (states,) = self._model([np.concatenate(arrays) for arrays in rows]).values()
        ends = list(accumulate(map(len, rows[0])))[:-1]
        parts = np.split(states, ends)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("last_hidden_state", part)]) for part in parts]
