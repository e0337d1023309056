"""Writes answers on a CPU: `generator.py` with openvino-genai's continuous batching as its engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from . import json_schema
from .engine import Guide, Piece, Sampling
from .generator import Generator
from .guided_decoding import refusal, structured_output

AT_ONCE = 256
"""Tokens of prompts that are read in one step, between which others go on writing."""

FP32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
"""Without these an answer depends on what is computed beside it."""

BF16 = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"}

REASONS = {
    genai.GenerationFinishReason.NONE: "",
    genai.GenerationFinishReason.STOP: "stop",
    genai.GenerationFinishReason.LENGTH: "length",
}


class OpenVinoEngine:
    """The pipeline of one `openvino_model.xml`."""

    block = 32

    def __init__(self, folder: Path, parameters: Mapping[str, str], cache: int) -> None:
        """As `Engine` has it."""
        self.blocks = math.ceil(cache / self.block) + 1
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = self.blocks
        scheduler.max_num_batched_tokens = AT_ONCE
        scheduler.enable_prefix_caching = False
        settings = FP32 if parameters["precision"] == "fp32" else BF16
        self._pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", settings)
        self._handles: dict[int, Any] = {}
        self._has_texts = (folder / "grammar").exists()
        self._refusal = lru_cache(1024)(partial(refusal, folder))

    def refusal(self, guide: Guide) -> str:
        """As `Engine` has it."""
        if not self._has_texts:
            return "the bytes that tokens write are not known"
        return json_schema.refusal(guide.kind, guide.text) or self._refusal(guide.kind, guide.text)

    def add(self, key: int, prompt: Sequence[int], sampling: Sampling) -> None:
        """As `Engine` has it."""
        config = genai.GenerationConfig()
        config.max_new_tokens = sampling.max_tokens
        # The pipeline takes an end token for one of the others, and has -1 where none is said.
        config.stop_token_ids, config.eos_token_id = set(sampling.end_tokens), min(sampling.end_tokens)
        if sampling.temperature > 0:
            config.do_sample, config.temperature, config.top_p = True, sampling.temperature, sampling.top_p
            config.rng_seed = sampling.seed
        config.frequency_penalty, config.presence_penalty = sampling.frequency_penalty, sampling.presence_penalty
        config.logprobs = int(sampling.log_probs)
        if sampling.guide:
            config.structured_output_config = structured_output(sampling.guide.kind, sampling.guide.text)
        ids = ov.Tensor(np.array([prompt], np.int64))
        self._handles[key] = self._pipeline.add_request(key, ids, config)

    def step(self) -> list[Piece]:
        """As `Engine` has it."""
        self._pipeline.step()
        pieces = []
        for key, handle in self._handles.items():
            while handle.can_read():
                pieces += [
                    Piece(key, one.generated_ids, REASONS[one.finish_reason], one.generated_log_probs)
                    for one in handle.read().values()
                ]
        return pieces

    def drop(self, key: int) -> None:
        """As `Engine` has it."""
        self._handles.pop(key).cancel()

    def on_gpu(self) -> int:
        """As `Engine` has it."""
        return 0


class TritonPythonModel(Generator):
    """Triton's interface."""

    engine = OpenVinoEngine
