"""Torch step (Python backend): runs `model.onnx` and the `head.onnx` behind it on packed tokens, on GPU or CPU.

Input   input_ids INT32 [B, -1], ragged; -1 is no token; perhaps kept_ids, as long, which the head reads
Output  embeddings FP32 [B, D], or score and logit FP32 [B, 1], by `packed_encoder.py`

A model whose inputs are not ragged is a small graph over numbers of each text: its inputs are stacked along the
batch and it runs on the CPU.

Model parameters: token_budget, the tokens of a micro-batch at most; max_tokens, the most in a row; vocabulary, the
number of token ids; unseen_offset, added to ids of tokens that are seen by none, where there may be some. Errors
are those of `requests.py`. A row that finds no memory fails its own requests alone. A device that fails ends the
process: CUDA gives it to nothing in it again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from .last_words import end_process
from .memory import CUDA_CONTEXT, Memory
from .packed_encoder import Array, PackedEncoder
from .requests import Batch, Item, Model
from .torch_graph import TorchGraph


def gpu_memory(device: torch.device) -> int:
    """Bytes of a card that this process holds."""
    return int(torch.cuda.memory_reserved(device)) + CUDA_CONTEXT


class TritonPythonModel:
    """One graph, and the head behind it if it is an encoder."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the graphs of the version folder onto the device of this instance."""
        self._model = Model(args["model_name"], json.loads(args["model_config"]))
        folder = Path(args["model_repository"], args["model_version"])
        device = torch.device("cpu")
        if args["model_instance_kind"] == "GPU":
            if not torch.cuda.is_available():
                raise ValueError("there is a GPU that torch cannot use: `make setup` says why")
            device = torch.device("cuda", int(args["model_instance_device_id"]))
            torch.cuda.set_device(device)
        self._encoder, self._graph = None, None
        on_gpu = partial(gpu_memory, device) if device.type == "cuda" else None
        if not self._model.ragged:
            self._graph = TorchGraph(folder / "model.onnx", device)
            self._memory = Memory(args["model_name"], on_gpu)
            return
        parameters = self._model.parameters
        offset = int(parameters.get("unseen_offset", "0"))
        self._encoder = PackedEncoder(folder, device, int(parameters["token_budget"]), unseen_offset=offset)
        self._memory = Memory(args["model_name"], on_gpu)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        pb_utils.Logger.log_info(
            f"{args['model_name']}: {name}, {self._encoder.token_budget} tokens in a micro-batch"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Runs one dynamic batch and answers every request."""
        batch = Batch(self._model, requests)
        try:
            outcomes = self._run(batch.items)
        except torch.AcceleratorError as error:
            end_process(error, "the GPU")
        for item, outcome in zip(batch.items, outcomes, strict=True):
            if isinstance(outcome, str):
                batch.fail(item, outcome)
            else:
                batch.give(item, outcome)
        self._memory.measure()
        return batch.responses()

    def finalize(self) -> None:
        """Tells what is counted."""
        if self._model.counters:
            self._model.counters.close()

    def _run(self, items: Sequence[Item]) -> Sequence[dict[str, Array] | str]:
        if not items:
            return []
        if self._encoder is not None:
            ids, *kept = ([item.inputs[name] for item in items] for name in self._model.inputs)
            return self._encoder.run(ids, *kept)
        assert self._graph is not None
        feeds = {
            name: torch.from_numpy(np.stack([item.inputs[name] for item in items])) for name in self._model.inputs
        }
        with torch.no_grad():
            outputs = {name: values.numpy() for name, values in self._graph(feeds).items()}
        return [{name: values[i] for name, values in outputs.items()} for i in range(len(items))]
