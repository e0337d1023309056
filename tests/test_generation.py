"""Models that write: their answers are transformers', alone and together, by Triton itself and by the gateway."""

from __future__ import annotations

import errno
import http.client
import json
import math
import os
import queue
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REFERENCE, ROOT, Answer, Stack
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

from build import make
from build.catalog import load
from build.config import read_config
from build.errors import BuildError
from build.sources.obtain import describe
from build.steps.chat_template import ChatTemplate, TemplateFailureError
from build.steps.text_stream import TextStream
from tools.bench.server import free_ports
from tools.shim.residency.families import families
from tools.shim.residency.plan import Plan

FOLDER = REFERENCE / "generation"
EXPECTED: dict[str, list[dict[str, Any]]] = json.loads((FOLDER / "expected.json").read_text("utf-8"))
TINY = ("tiny-llama", "tiny-qwen3")
MODELS = (*TINY, "smollm2-135m")
MOST = 24
LONG = {"messages": [{"role": "user", "content": "Write a long story about a lighthouse."}], "max_tokens": 8000}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    tiny = ["--task", "generate", *(str(FOLDER / name) for name in TINY)]
    assert make.main([*tiny, "--repository", str(folder)]) == 0
    assert make.main(["smollm2-135m", "--repository", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    (port,) = free_ports(1)
    options = ["--repository", str(repository), "--preload", "smollm2-135m", *TINY, "--chat-port", str(port)]
    running = Stack(tmp_path_factory.mktemp("work"), options, {"GENERATOR_CACHE_TOKENS": "8192"})
    running.ports["chat"] = port
    running.start()
    yield running
    assert running.stop() == 0


def chat(server: Stack, model: str, asked: dict[str, Any], **fields: Any) -> Answer:
    own = {"messages", "tools"}
    body: dict[str, Any] = {name: value for name, value in asked.items() if name in own}
    if options := {name: value for name, value in asked.items() if name not in own}:
        body["chat_template_kwargs"] = options
    body = json.loads(json.dumps(body))
    for message in body["messages"]:
        for call in message.get("tool_calls", []):  # clients send them as a string
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return server.post("chat", "/v1/chat/completions", {"model": model, "max_tokens": MOST, **body, **fields})


def check(answer: Answer, expected: dict[str, Any]) -> None:
    assert answer.status == 200, answer.body
    content = answer.json()
    (choice,) = content["choices"]
    assert choice["message"]["content"] == expected["text"]
    assert choice["finish_reason"] == ("stop" if expected["ends"] else "length")
    prompt, written = len(expected["prompt_ids"]), len(expected["answer_ids"])
    usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
    assert content["usage"] == usage


@pytest.mark.parametrize("model", MODELS)
def test_answers_are_the_references_all_at_once(server: Stack, model: str) -> None:
    """Of prompts to both sides of the 256 tokens that are read in one step."""
    expected = EXPECTED[model]
    assert len(expected) >= 16
    with ThreadPoolExecutor(len(expected)) as callers:
        answers = list(callers.map(lambda one: chat(server, model, one["chat"]), expected))
    for answer, one in zip(answers, expected, strict=True):
        check(answer, one)


@pytest.mark.parametrize("model", MODELS)
def test_answers_are_the_same_alone(server: Stack, model: str) -> None:
    for one in EXPECTED[model][4 : 12 if model in TINY else 5 : 3]:
        check(chat(server, model, one["chat"]), one)


@pytest.mark.parametrize("model", MODELS)
def test_prompts_and_their_tokens_are_the_references(repository: Path, model: str) -> None:
    version = repository / model / "1"
    config = (version.parent / "config.pbtxt").read_text()
    template = ChatTemplate((version / "chat_template.jinja").read_text("utf-8"), {"eos_token": "<|im_end|>"})
    tokenizer = Tokenizer.from_file(str(version / "tokenizer.json"))
    assert 'key: "end_tokens"' in config
    for one in EXPECTED[model]:
        assert template.render(one["chat"]) == one["prompt"]
        assert tokenizer.encode(one["prompt"], add_special_tokens=False).ids == one["prompt_ids"]


def streamed(server: Stack, model: str, **inputs: tuple[str, Any]) -> list[tuple[str, str, int]]:
    """Each response of Triton itself: text, reason, tokens."""
    found: queue.Queue[Any] = queue.Queue()
    with InferenceServerClient(f"127.0.0.1:{server.ports['grpc']}") as client:
        client.start_stream(lambda result, error: found.put((result, error)))
        tensors = []
        for name, (kind, values) in inputs.items():
            array = np.array([values], np.object_) if kind == "BYTES" else np.array([values])
            tensors.append(InferInput(name, array.shape, kind).set_data_from_numpy(array))
        client.async_stream_infer(model, tensors)
        responses = []
        while not responses or not responses[-1][1]:
            result, error = found.get(timeout=120)
            assert error is None, error
            text, reason, tokens = (
                result.as_numpy(n)[0, 0] for n in ("text_output", "finish_reason", "num_output_tokens")
            )
            responses.append((text.decode(), reason.decode(), int(tokens)))
        client.stop_stream()
    return responses


@pytest.mark.parametrize("model", MODELS)
def test_triton_itself_streams(server: Stack, model: str) -> None:
    """A prompt as NVIDIA's OpenAI frontend sends one. Characters come whole: random models write half ones."""
    one = EXPECTED[model][4]
    most = ("INT32", np.array([MOST], np.int32))
    pieces = streamed(
        server, model, text_input=("BYTES", [one["prompt"].encode()]), max_tokens=most, stream=("BOOL", [True])
    )
    assert "".join(text for text, _, _ in pieces) == one["text"]
    assert sum(tokens for _, _, tokens in pieces) == len(one["answer_ids"])
    assert len(pieces) > 4
    whole = streamed(server, model, chat=("BYTES", [json.dumps(one["chat"]).encode()]), max_tokens=most)
    assert whole == [(one["text"], "stop" if one["ends"] else "length", len(one["answer_ids"]))]


def events(answer: Answer) -> list[Any]:
    assert answer.status == 200, answer.body
    assert answer.headers["Content-Type"] == "text/event-stream"
    lines = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_server_sent_events(server: Stack) -> None:
    one = EXPECTED["smollm2-135m"][1]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(chat(server, "smollm2-135m", one["chat"], **options))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == one["text"]
    assert [choice["finish_reason"] for choice in choices[-2:]] == [None, "length"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(one["answer_ids"])


def test_completions(server: Stack) -> None:
    one = EXPECTED["smollm2-135m"][0]
    body = {"prompt": one["prompt"], "model": "smollm2-135m", "max_tokens": MOST}
    answer = server.post("chat", "/v1/completions", body).json()
    assert (answer["object"], answer["choices"][0]["text"]) == ("text_completion", one["text"])
    pieces = events(server.post("chat", "/v1/completions", body | {"stream": True}))
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == one["text"]


def test_stop_strings(server: Stack) -> None:
    """An answer ends before the first of them that is whole, and a stream has given nothing of it."""
    one = next(one for one in EXPECTED["smollm2-135m"] if len(one["text"]) > 60)
    text: str = one["text"]
    stops = ["never to be seen", text[20:34], text[26:30]]
    cut = text[: text.index(stops[2])]
    answer = chat(server, "smollm2-135m", one["chat"], stop=stops).json()["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == (cut, "stop")
    chunks = events(chat(server, "smollm2-135m", one["chat"], stop=stops, stream=True))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == cut


@pytest.mark.parametrize("stops", [["ab"], ["aab", "b"], ["aaa"], ["aaaab"]])
def test_every_split_of_a_stop_string(stops: list[str]) -> None:
    """The text given is that before the first whole stop string, whatever tokens it comes in."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "tiny-qwen3" / "tokenizer.json"))
    for text in ("aaab aab", "aaaab", "baaa", "a a a", "no stop here"):
        for ids in ([tokenizer.token_to_id("Ġ" if c == " " else c) for c in text], tokenizer.encode(text).ids):
            ends = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
            whole = min(ends)[1] if ends else len(text)
            stream, given = TextStream(tokenizer, stops), []
            for token in ids:
                stream.take([token])
                given.append(stream.give())
                if stream.stopped:
                    break
            stream.end()
            given.append(stream.give(is_last=True))
            assert "".join(given) == text[:whole]


def test_sampling(server: Stack) -> None:
    asked = EXPECTED["smollm2-135m"][1]["chat"]

    def text(**fields: Any) -> str:
        return str(chat(server, "smollm2-135m", asked, **fields).json()["choices"][0]["message"]["content"])

    greedy = EXPECTED["smollm2-135m"][1]["text"]
    assert text(temperature=0, seed=3) == greedy
    assert text(temperature=0, stop=[]) == greedy
    assert text(temperature=1.5, top_p=0.0001) == greedy
    assert text(temperature=1.5, seed=1) == text(temperature=1.5, seed=1)
    assert len({text(temperature=1.5, seed=seed) for seed in (1, 2, 3)}) == 3


REFUSED = {
    "messages is empty: send at least one item": {"messages": []},
    "tools is empty: send at least one item": {"tools": []},
    "max_completion_tokens must be below": {"max_completion_tokens": 2**31},
    "messages[0].role must be a string": {"messages": [{"content": "a"}]},
    "messages[0].content is missing": {"messages": [{"role": "user"}]},
    "messages[1].content is missing": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": []}]
    },
    "a part that is no text": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "must have functions": {"messages": [{"role": "user", "tool_calls": 5}]},
    "arguments in JSON": {"messages": [{"role": "user", "tool_calls": [{"function": {"arguments": "{"}}]}]},
    "temperature must be from 0 to 2": {"temperature": 3},
    "top_p must be from 0 to 1": {"top_p": -1},
    "seed must be from 0": {"seed": -1},
    "stop must be up to 16 strings": {"stop": [""]},
    "together over the 1024": {"max_tokens": 2000},
    "a call gets one answer": {"n": 2},
    "a system message comes first": {"messages": [{"role": one, "content": "a"} for one in ("user", "system")]},
    "cannot be set there": {"chat_template_kwargs": {"messages": []}},
    "unknown field 'temprature'": {"temprature": 1},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_refused(server: Stack, sentence: str) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "model": "tiny-llama", **REFUSED[sentence]}
    answer = server.post("chat", "/v1/chat/completions", body)
    assert answer.status == 400, answer.body
    error = answer.json()["error"]
    assert sentence in error["message"]
    assert error["type"] == "invalid_request_error"


def test_prompts_without_room(server: Stack) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 3000}]}
    answer = chat(server, "tiny-llama", long)
    assert answer.status == 400
    assert "tiny-llama reads and writes 1024" in answer.json()["error"]["message"]
    assert server.post("chat", "/v1/completions", {"prompt": [1, 2], "model": "tiny-llama"}).status == 400


def test_other_models_and_tasks(server: Stack) -> None:
    asked = EXPECTED["tiny-llama"][0]["chat"]
    assert chat(server, "nobody", asked).status == 404
    assert server.post("chat", "/v1/embeddings", {"input": "a"}).status == 404
    listed = server.get("chat", "/v1/models").json()["data"]
    assert {(model["id"], model["task"]) for model in listed} == {(name, "generate") for name in MODELS}
    health = server.get("chat", "/health")
    assert (health.status, health.json()["status"]) == (200, "ready")


def test_a_deadline(server: Stack) -> None:
    body = {"model": "smollm2-135m", **LONG}
    late = {"X-Request-Timeout": "1"}
    assert server.post("chat", "/v1/chat/completions", body, late).status == 504
    # Time enough for a first piece, and never for all.
    broken = server.post("chat", "/v1/chat/completions", body | {"stream": True}, {"X-Request-Timeout": "8"})
    assert broken.status == 200
    last = json.loads(broken.body.decode().strip().rpartition("data: ")[2])
    assert last["error"]["code"] == "timeout"


def open_stream(server: Stack) -> http.client.HTTPConnection:
    """A long answer, of which the first piece has come."""
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["chat"], timeout=60)
    connection.request(
        "POST", "/v1/chat/completions", json.dumps({"model": "smollm2-135m", "stream": True, **LONG})
    )
    assert connection.getresponse().readline().startswith(b"data: ")
    return connection


def test_a_caller_that_goes_away_frees_its_place(server: Stack) -> None:
    """The cache has room for one such answer: the next one begins only when this one has gone."""
    open_stream(server).close()
    open_stream(server).close()


def test_waiting_is_bounded_by_tokens(server: Stack) -> None:
    first = open_stream(server)
    body = {"model": "smollm2-135m", "stream": True, **LONG}
    waiting = []
    for _ in range(8):  # each of some 8040 tokens, and eight times 8192 may wait
        connection = http.client.HTTPConnection("127.0.0.1", server.ports["chat"], timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        waiting.append(connection)
    refused = None
    for _ in range(50):
        refused = server.post("chat", "/v1/chat/completions", body, {"X-Request-Timeout": "1"})
        if refused.status == 429:
            break
    assert refused is not None
    assert refused.status == 429, refused.body
    assert int(refused.headers["Retry-After"]) >= 1
    assert "tokens are ahead of this call" in refused.json()["error"]["message"]
    for connection in (first, *waiting):
        connection.close()
    check(chat(server, "smollm2-135m", EXPECTED["smollm2-135m"][0]["chat"]), EXPECTED["smollm2-135m"][0])


@pytest.mark.parametrize(
    "script", sorted((ROOT / "tests" / "clients" / "chat").glob("*.py")), ids=lambda path: path.stem
)
def test_real_clients(server: Stack, script: Path, tmp_path: Path) -> None:
    python = ROOT / ".venv-clients" / "bin" / "python"
    if not python.exists():
        pytest.skip("`make .venv-clients/clients.lock` installs the clients")
    environment = {
        "GATEWAY": server.url("chat", ""),
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    done = subprocess.run(
        [python, script], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr


def test_counted(server: Stack) -> None:
    def counted() -> dict[str, float]:
        lines = server.get("chat", "/metrics").body.decode().splitlines()
        names = (
            "gateway_prompt_tokens_total",
            "gateway_generated_tokens_total",
            "gateway_first_token_seconds_count",
        )
        return {
            n: float(line.split()[-1]) for n in names for line in lines if line.startswith(f'{n}{{model="tiny-l')
        }

    one = EXPECTED["tiny-llama"][0]
    chat(server, "tiny-llama", one["chat"])
    before = counted()
    chat(server, "tiny-llama", one["chat"], stream=True)
    after = counted()
    assert [after[name] - before[name] for name in before] == [len(one["prompt_ids"]), len(one["answer_ids"]), 1]


def test_nothing_is_loaded_that_nobody_asked_for(repository: Path) -> None:
    """A repository that has models of both kinds, served without a word."""
    both = repository.parent / "both"
    shutil.copytree(
        ROOT / "model_repository", both, ignore=lambda _, names: [one for one in names if one in MODELS]
    )
    for name in TINY:
        shutil.copytree(repository / name, both / name)
    from tools import serve

    parser = serve.make_parser("x", None, models=None)
    for add in (serve.add_triton_options, serve.add_gateway_options, serve.add_residency_options):
        add(parser)
    silent = Plan.of(parser.parse_args([]), both)
    assert not set(silent.start) & set(MODELS)
    assert not silent.writes
    assert Plan.of(parser.parse_args(["--preload", "tiny-llama"]), both).writes


def changed(tmp_path: Path, **keys: Any) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(FOLDER / "tiny-llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"model_type": "gpt2"}, "language models are written for llama, qwen2, qwen3"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"surprise": 1}, "surprise"),
        ({"is_causal": False}, "causal attention"),
    ],
)
def test_checkpoints_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, Any], sentence: str
) -> None:
    folder = changed(tmp_path, **keys)
    assert make.main(["--task", "generate", str(folder), "--repository", str(tmp_path / "models")]) == 1
    assert sentence in capsys.readouterr().err


def test_a_tensor_that_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = changed(tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.layers.0.extra": np.ones(3, np.float32)}, folder / "model.safetensors")
    assert make.main(["--task", "generate", str(folder), "--repository", str(tmp_path / "models")]) == 1
    assert "model.layers.0.extra" in capsys.readouterr().err


def test_what_a_language_model_is_for_must_be_said() -> None:
    with pytest.raises(BuildError, match="--task generate"):
        describe(FOLDER / "tiny-llama", "tiny-llama")


def test_another_runtime_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--task", "generate", "--runtime", "onnxruntime", "--repository", str(tmp_path)]
    assert make.main([str(FOLDER / "tiny-llama"), *options]) == 1
    sentence = "is for generate, which onnxruntime does not run: build it for openvino or vllm"
    assert sentence in capsys.readouterr().err


def test_a_family_for_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tensors are those of the CPU's. It holds what vLLM reads, the weights without a second copy."""
    tiny = ["--task", "generate", str(FOLDER / "tiny-qwen3"), "--repository", str(tmp_path)]
    assert make.main([*tiny, "--name", "cpu"]) == 0
    assert make.main([*tiny, "--name", "gpu", "--runtime", "vllm"]) == 0
    assert "gpu: not checked: this check does not run vllm" in capsys.readouterr().out
    cpu, gpu = (read_config(tmp_path, name) for name in ("cpu", "gpu"))
    (group,) = gpu.instance_group
    assert (group.count, group.kind, list(group.gpus)) == (1, ModelInstanceGroup.KIND_GPU, [0])
    parameters = {key: item.string_value for key, item in gpu.parameters.items()}
    assert (parameters["runtime"], parameters["precision"], parameters["max_tokens"]) == ("vllm", "bf16", "1024")
    settings = json.loads((FOLDER / "tiny-qwen3" / "config.json").read_text())
    sizes = ("num_hidden_layers", "num_key_value_heads", "head_dim")
    of_token = math.prod(settings[name] for name in sizes) * 2 * 2  # keys and values, of two bytes
    assert int(parameters["cache_bytes"]) == int(parameters["cache_tokens"]) * of_token
    (family,) = families(tmp_path, ["gpu"])
    assert family.on_gpu
    weights = FOLDER / "tiny-qwen3" / "model.safetensors"
    assert family.estimate > weights.stat().st_size + int(parameters["cache_bytes"])
    version = tmp_path / "gpu" / "1"
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        assert (version / name).read_bytes() == (FOLDER / "tiny-qwen3" / name).read_bytes()
    assert not (version / "openvino_model.bin").exists()
    for config in (cpu, gpu):
        config.name = ""
        config.ClearField("instance_group")
        config.ClearField("parameters")
    assert cpu == gpu
    assert make.main([*tiny, "--name", "gpu", "--runtime", "vllm"]) == 0
    assert "gpu: up to date, nothing to do" in capsys.readouterr().out


def test_weights_of_another_file_system_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    tiny = ["--task", "generate", str(FOLDER / "tiny-llama"), "--repository", str(tmp_path)]
    assert make.main([*tiny, "--runtime", "vllm"]) == 0
    copy = tmp_path / "tiny-llama" / "1" / "model.safetensors"
    assert copy.read_bytes() == (FOLDER / "tiny-llama" / copy.name).read_bytes()
    assert copy.stat().st_nlink == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["minilm"], "minilm is for embed, which vllm does not run: build it for openvino, "),
        (["smollm2-135m"], "SmolLM2-135M-Instruct.Q4_1.gguf, which vllm is not given: take one in safetensors"),
    ],
)
def test_what_is_not_built_for_vllm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert make.main([*arguments, "--runtime", "vllm", "--repository", str(tmp_path / "models")]) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "models" / arguments[0]).exists()


def test_a_broken_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert make.main([str(tmp_path), "--repository", str(tmp_path / "models")]) == 1
    assert "is not a readable GGUF file" in capsys.readouterr().err


def test_a_template_reaches_nothing_but_its_messages() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {})
    with pytest.raises(TemplateFailureError, match="unsafe"):
        template.render({"messages": []})
    with pytest.raises(TemplateFailureError, match="cannot be read"):
        ChatTemplate("{% nonsense %}", {})


def test_make_installs_what_is_asked_for() -> None:
    def said(*words: str) -> str:
        command = ["make", "--dry-run", "serve", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "chat.lock" not in said()
    assert "smollm2" not in said()
    assert "build.make minilm smollm2-135m" in said("CHAT=1")
    assert "--preload qwen3-0.6b" in said("MODEL=qwen3-0.6b")
    assert load("smollm2-135m").tasks == ("generate",)
