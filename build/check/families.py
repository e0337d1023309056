"""All graphs of a family, and what can be checked of a language model."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from build.check.engines import ENGINES, LONGEST, Array, lacking
from build.check.graphs import MIDDLE, batches_of, cause, compare, run, run_zeros
from build.config import REPOSITORY, read_config, runtime_of
from build.errors import BuildError
from build.memory import free_memory

SECONDS = 900
"""Seconds after which the check of a family counts as hung."""

BUDGET = 10**12
"""Bytes of weights times tokens of a text that are worth a build's time: some ten seconds on two cores."""

MEMORY = 3
"""Times the bytes of its weights that an engine may need to prepare them."""

AGREEMENT = {"": 0.999, "static": 0.98, "dynamic": 0.9}
"""The ensemble's `quantisation` -> the least cosine of a text's result alone and beside others."""

TEXT = "Every graph is run once before it is served, with 12 words of this sentence over and over again. "


def check_apart(repository: Path, families: Sequence[str]) -> None:
    """Checks families in a process of its own; prints what was not checked, raises BuildError with the cause."""
    command = [sys.executable, "-m", "build.check", *families, "--repository", str(repository.resolve())]
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY.parent, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"the graphs of {families[0]} were still running after {SECONDS} s") from None
    print(done.stdout, end="", flush=True)
    if done.returncode == 1:
        raise BuildError((done.stderr.strip().splitlines() or ["the graphs cannot be run"])[-1])
    if done.returncode == -signal.SIGKILL:
        raise BuildError(f"the graphs of {families[0]} were killed in their check: most likely memory ran out")
    if done.returncode:
        raise BuildError(
            f"the graphs of {families[0]} end the engine that runs them, by signal {-done.returncode}"
        )


def check(repository: Path, family: str, done: set[str] | None = None) -> Iterator[str]:
    """Runs the graphs of one ensemble in order; yields what was not checked, raises BuildError with the cause.

    Models that are `done` are left out, and all others are added to them.
    """
    done = set() if done is None else done
    ensemble = read_config(repository, family)
    if ensemble.platform != "ensemble":
        yield from _check_generator(repository, ensemble)
        return
    steps = dict.fromkeys(step.model_name for step in ensemble.ensemble_scheduling.step)
    configs = [read_config(repository, name) for name in steps]
    tokenizer = next((config for config in configs if "max_tokens" in config.parameters), None)
    graphs = [config for config in configs if config.name not in done and _graph(repository, config).exists()]
    if not graphs:
        return
    is_first = not tokenizer or tokenizer.name not in done
    done.update(steps)
    backend = runtime_of(graphs[0])
    engine = ENGINES.get(backend)
    if engine and graphs[0].instance_group[0].kind == ModelInstanceGroup.KIND_GPU:
        engine, backend = None, "a GPU"
    why = f"this check runs no graph on {backend}"
    if engine is not None:
        why = lacking(engine, _graph(repository, graphs[0]))
    if engine is None or why:
        if is_first:
            yield f"{family}: its graphs were not checked: {why}"
        return
    weights = sum(file.stat().st_size for config in graphs for file in _graph(repository, config).parent.iterdir())
    if MEMORY * weights > (free := free_memory()):
        need, there = f"{MEMORY * weights / 1e9:.0f} GB", f"{free / 1e9:.0f} GB"
        yield f"{family}: its graphs were not checked: they may take {need} of memory, and {there} are free"
        return
    if tokenizer is None:
        for config in graphs:
            run_zeros(engine, _graph(repository, config), config)
        return
    window = int(tokenizer.parameters["max_tokens"].string_value)
    longest = max(1, min(window, LONGEST, BUDGET // weights))
    batches = list(batches_of(_ids(repository, tokenizer, longest), padded=graphs[0].backend != "python"))
    found: list[dict[str, Array]] = [{} for _ in batches]
    for config in graphs:
        run(engine, _graph(repository, config), config, batches, found)
    compare(family, found, AGREEMENT[ensemble.parameters["quantisation"].string_value])
    if longest < window:
        yield f"{family}: its graphs were checked with texts of up to {longest} of {window} tokens"


def _check_generator(repository: Path, config: ModelConfig) -> Iterator[str]:
    """Renders a message by the template; reads a prompt and writes a token, where there is a graph and memory."""
    version = repository / config.name / "1"
    path, template = version / "openvino_model.xml", version / "chat_template.jinja"
    tokenizer = Tokenizer.from_file(str(version / "tokenizer.json"))
    if template.exists() and importlib.util.find_spec("jinja2") is not None:
        from build.steps.chat_template import ChatTemplate, TemplateFailureError

        try:
            tokens = json.loads(config.parameters["special_tokens"].string_value)
            ChatTemplate(template.read_text("utf-8"), tokens).render(
                {"messages": [{"role": "user", "content": TEXT}]}
            )
        except TemplateFailureError as error:
            raise BuildError(f"{config.name} cannot be asked: {error}") from None
    if not path.exists():
        yield f"{config.name}: not checked: this check does not run {runtime_of(config)}"
        return
    import openvino

    size = path.with_suffix(".bin").stat().st_size
    if MEMORY * size > (free := free_memory()):
        need, there = f"{MEMORY * size / 1e9:.0f} GB", f"{free / 1e9:.0f} GB"
        yield f"{config.name}: its graph was not checked: it may take {need} of memory, and {there} are free"
        return
    ids = np.array([tokenizer.encode(TEXT, add_special_tokens=False).ids[:MIDDLE]], np.int64)
    try:
        request = openvino.Core().compile_model(path, "CPU").create_infer_request()
        for place, row in ((0, ids[:, :-1]), (ids.shape[1] - 1, ids[:, -1:])):
            feed = {
                "input_ids": row,
                "attention_mask": np.ones((1, place + row.shape[1]), np.int64),
                "position_ids": np.arange(place, place + row.shape[1])[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            logits = request.infer(feed)["logits"]
    except Exception as error:  # OpenVINO raises nothing narrower
        raise BuildError(f"{config.name} cannot be run by OpenVINO: {cause(error)}") from None
    if not np.isfinite(logits).all():
        raise BuildError(f"{config.name} gives logits that are not finite numbers")


def _ids(repository: Path, tokenizer: ModelConfig, count: int) -> Array:
    """INT32 [count]: ids of a text, half of them of a pair's second one where the model tells the two apart."""
    path = repository / tokenizer.name / "1" / "tokenizer.json"
    ids = np.resize(np.array(Tokenizer.from_file(str(path)).encode(TEXT).ids or [0], np.int32), count)
    ids[count // 2 :] += int(tokenizer.parameters["segment_offset"].string_value or "0")
    return ids


def _graph(repository: Path, config: ModelConfig) -> Path:
    return repository / str(config.name) / "1" / "model.onnx"
