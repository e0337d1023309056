"""Answers that follow a guide, in openvino-genai; each guide is first tried in a process of its own.

A guide that cannot be compiled would end the engine for all, and to compile one may take any time and memory. So
each is compiled once before, by this file as a program, for a language model of a few numbers.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

KINDS = {"json_schema": "json_schema", "structural_tag": "structural_tags_config"}
"""Of `guided_decoding_guide_type`, and what openvino-genai calls them."""

SECONDS = 20.0
"""That a check may take, the start of its process included."""

COMPILE_SECONDS = 2.0
"""That a guide may take to compile, during which nobody's answer goes on."""

MEMORY = 8 << 30
"""Bytes of addresses that a check may have."""

TOO_LONG = "it takes too long to compile"

PLACE = re.compile(r"\.\w+:\d+:\s")
"""In the engine's source, that an error begins with."""


def structured_output(kind: str, guide: str) -> Any:
    """A guide as the pipeline takes it."""
    config = genai.StructuredOutputConfig()
    setattr(config, KINDS[kind], guide)
    return config


def refusal(folder: Path, kind: str, guide: str) -> str:
    """Why a guide cannot be compiled, or "".

    `folder` has the texts of tokens, and in `grammar` the language model that guides are tried with.
    """
    command = ["python3", __file__, str(folder)]
    asked = json.dumps([kind, guide])
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return TOO_LONG
    if done.returncode == -signal.SIGXCPU:
        return TOO_LONG
    return "it takes too much memory to compile" if done.returncode else done.stdout.strip()


def main(folder: Path) -> None:
    """Prints why the guide of the standard input cannot be compiled, or nothing."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    kind, guide = json.load(sys.stdin)
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = 32
    pipeline = genai.ContinuousBatchingPipeline(folder / "grammar", genai.Tokenizer(folder), scheduler, "CPU")
    # At its hard limit it would be killed as it is where memory runs out.
    resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS), int(SECONDS) + 1))
    config = genai.GenerationConfig()
    config.max_new_tokens, config.stop_token_ids, config.eos_token_id = 1, {0}, 0
    config.structured_output_config = structured_output(kind, guide)
    handle = pipeline.add_request(0, ov.Tensor(np.zeros((1, 1), np.int64)), config)
    started, said = time.process_time(), ""
    try:
        while not handle.can_read():
            pipeline.step()
    except Exception as error:
        said = PLACE.split(str(error))[-1].strip()
    if time.process_time() - started > COMPILE_SECONDS:
        said = TOO_LONG
    print(said, flush=True)
    os._exit(0)  # without what the engine says of a request that has not ended


if __name__ == "__main__":
    main(Path(sys.argv[1]))
