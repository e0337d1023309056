"""Writes answers on a GPU: `generator.py` with vLLM as its engine, in this process. It has never run on a GPU.

vLLM reads the checkpoint itself, in transformers' layout. What is called is in vLLM 0.27 as in 0.32
(`vllm/engine/arg_utils.py`, `vllm/sampling_params.py`, `vllm/v1/engine/llm_engine.py`).
"""

# ruff: noqa: E402
from __future__ import annotations

import locale
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

# Torch, as vLLM imports it, reads UTF-8 in whatever encoding Triton was started with.
locale.setlocale(locale.LC_CTYPE, "C.UTF-8")

import torch
import xgrammar
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from . import json_schema
from .engine import Guide, Piece, Sampling
from .generator import Generator
from .memory import CUDA_CONTEXT

TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

GRAMMARS = {
    "json_schema": xgrammar.Grammar.from_json_schema,
    "structural_tag": xgrammar.Grammar.from_structural_tag,
}
"""What reads a guide of each kind."""

PARAMETERS = {"json_schema": "json", "structural_tag": "structural_tag"}
"""What vLLM calls the kinds."""

REASONS = {None: "", "stop": "stop", "length": "length"}

SPARE = 512
"""Tokens that the cache has room for beyond what is asked: vLLM keeps a block, `Generator` one for each answer."""

SEEDS = 2**63 - 1
"""Of a seed these bits count: torch's are signed, and -1 is none to vLLM."""


class VllmEngine:
    """vLLM's own engine, stepped by its caller, as its class `LLM` does."""

    def __init__(self, folder: Path, parameters: Mapping[str, str], cache: int) -> None:
        """As `Engine` has it."""
        # One process: what it holds of the card can be told, and one death ends all of it.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        bytes_of_token = int(parameters["cache_bytes"]) // int(parameters["cache_tokens"])
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(folder),
                load_format="safetensors",
                dtype=TYPES[parameters["precision"]],
                max_model_len=int(parameters["max_tokens"]),
                kv_cache_memory_bytes=(cache + SPARE) * bytes_of_token,
                structured_outputs_config={"backend": "xgrammar"},
                generation_config="vllm",  # what an answer is written by is in its request
                disable_log_stats=True,
            )
        )
        config = self._engine.vllm_config.cache_config
        self.block, self.blocks = config.block_size, config.num_gpu_blocks - 1

    def refusal(self, guide: Guide) -> str:
        """As `Engine` has it; the grammar is compiled later, in a thread of vLLM's."""
        if why := json_schema.refusal(guide.kind, guide.text):
            return why
        try:
            GRAMMARS[guide.kind](guide.text)
        except Exception as error:  # xgrammar's own
            return str(error)
        return ""

    def add(self, key: int, prompt: Sequence[int], sampling: Sampling) -> None:
        """As `Engine` has it."""
        guide = sampling.guide
        params = SamplingParams(
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.end_tokens),
            ignore_eos=True,  # it is one of these, or does not end answers
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampling.temperature > 0 else 1,
            seed=sampling.seed & SEEDS,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            structured_outputs=StructuredOutputsParams(**{PARAMETERS[guide.kind]: guide.text}) if guide else None,
            logprobs=0 if sampling.log_probs else None,  # of the token that is chosen, and 0 others
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(str(key), tokens_input(list(prompt)), params)

    def step(self) -> list[Piece]:
        """As `Engine` has it."""
        pieces = []
        for request in self._engine.step():
            (one,) = request.outputs
            told = zip(one.token_ids, one.logprobs or (), strict=False)
            log_probs = [values[token].logprob for token, values in told]
            reason = REASONS.get(one.finish_reason, "error")
            pieces.append(Piece(int(request.request_id), one.token_ids, reason, log_probs))
        return pieces

    def drop(self, key: int) -> None:
        """As `Engine` has it."""
        self._engine.abort_request([str(key)])

    def on_gpu(self) -> int:
        """As `Engine` has it."""
        return int(torch.cuda.memory_reserved()) + CUDA_CONTEXT if torch.cuda.is_available() else 0


class TritonPythonModel(Generator):
    """Triton's interface."""

    engine = VllmEngine
