"""Nobody gets in: Triton's management APIs, its environment, its shared memory, and proxies on the way to it."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, Answer, Stack, free_ports, send
from containers import until
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from tools.access import HEADER, passed_on, secret_file

CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("this code has run")
"""


def intruder(folder: Path) -> tuple[dict[str, object], Path]:
    """The body of a load that carries code, and the file that the code writes."""
    marker = folder / "marker"
    code = base64.b64encode(CODE.format(marker=str(marker)).encode()).decode()
    config = {"backend": "python", "max_batch_size": 0, "input": [], "output": []}
    return {"parameters": {"config": json.dumps(config), "file:1/model.py": code}}, marker


def as_a_page(stack: Stack, path: str, content: object, secret: str = "") -> Answer:
    """What a browser sends for any web page, without asking first."""
    headers = {"Content-Type": "text/plain", "Origin": "http://elsewhere.example"} | {HEADER: secret}
    return send(urllib.request.Request(stack.url("http", path), json.dumps(content).encode(), headers))


def test_a_web_page_cannot_run_code(own_stack: Stack, tmp_path: Path) -> None:
    body, marker = intruder(tmp_path)
    answer = as_a_page(own_stack, "/v2/repository/models/intruder/load", body)
    assert answer.status == 403
    assert not marker.exists()
    # With the secret the very same call runs the code, so it is the secret that kept it out.
    as_a_page(own_stack, "/v2/repository/models/intruder/load", body, own_stack.secret())
    assert marker.read_text() == "this code has run"


CLOSED = (
    "/v2/repository/index",
    "/v2/repository/models/minilm/unload",
    "/v2/systemsharedmemory/region/mine/register",
    "/v2/cudasharedmemory/region/mine/register",
    "/v2/systemsharedmemory/unregister",
    "/v2/trace/setting",
    "/v2/models/minilm/trace/setting",
    "/v2/logging",
)


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize("secret", ["", "wrong"])
def test_management_is_closed_over_http(stack: Stack, path: str, secret: str) -> None:
    answer = as_a_page(stack, path, {}, secret)
    assert (answer.status, "restricted" in answer.json()["error"]) == (403, True)


def test_management_is_closed_over_grpc(stack: Stack) -> None:
    with InferenceServerClient(f"127.0.0.1:{stack.ports['grpc']}") as client:
        calls = (
            lambda **secret: client.get_model_repository_index(**secret),
            lambda **secret: client.get_system_shared_memory_status(**secret),
            lambda **secret: client.get_cuda_shared_memory_status(**secret),
            lambda **secret: client.get_trace_settings(**secret),
            lambda **secret: client.get_log_settings(**secret),
        )
        for call in calls:
            with pytest.raises(InferenceServerException, match="restricted"):
                call()
            assert call(headers={f"triton-grpc-protocol-{HEADER}": stack.secret()}) is not None
        with pytest.raises(InferenceServerException, match="restricted"):
            client.load_model("minilm", config="{}")
        with pytest.raises(InferenceServerException, match="restricted"):
            client.unload_model("minilm")


def test_what_callers_need_is_open(stack: Stack) -> None:
    for path in ("/v2", "/v2/health/ready", "/v2/models/minilm", "/v2/models/minilm/config", "/v2/models/stats"):
        assert stack.get("http", path).status == 200


def test_a_closed_route_refuses_before_it_reads(stack: Stack) -> None:
    """Triton 2.51 dies of deeply nested JSON where it reads it."""
    deep = b'{"parameters":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    assert stack.post("http", "/v2/repository/models/x/load", deep).status == 403
    assert stack.get("http", "/v2/health/ready").status == 200


def test_the_secret_is_the_owners_alone(stack: Stack) -> None:
    file = secret_file(stack.work_folder, stack.ports["http"])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(stack.secret()) > 40
    words = stack.triton().cmdline()
    assert [word for word in words if "-restricted-" in word] != []
    assert not [word for word in words if stack.secret() in word]


def test_every_start_makes_another_secret(own_stack: Stack) -> None:
    first = own_stack.secret()
    assert own_stack.stop() == 0
    assert not secret_file(own_stack.work_folder, own_stack.ports["http"]).exists()
    own_stack.start()
    assert own_stack.secret() != first


SECRETS = {
    "GATEWAY_API_KEYS": "a-key-of-the-gateway",
    "HF_TOKEN": "hf_abc",
    "NVIDIA_API_KEY": "nvapi-abc",
    "PIP_INDEX_URL": "http://me:password@localhost/simple",
    "DATABASE_URL": "postgres://me:password@localhost/",
    "AWS_SECRET_ACCESS_KEY": "abc",
    "ENCODER_SECRET": "abc",
}


def test_triton_and_its_steps_inherit_no_secrets(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "stack", environment=SECRETS | {"ENCODER_PRECISION": "fp32"}).start()
    try:
        processes = [stack.triton(), *stack.triton().children()]
        assert len(processes) == 4
        for process in processes:
            assert not process.environ().keys() & SECRETS.keys()
            assert process.environ()["ENCODER_PRECISION"] == "fp32"
    finally:
        assert stack.stop() == 0


def test_an_object_store_gets_its_credentials() -> None:
    there = {"AWS_SECRET_ACCESS_KEY": "a", "AZURE_STORAGE_KEY": "b", "https_proxy": "c", "HF_TOKEN": "d"}
    assert passed_on(there, with_object_store=True).keys() == there.keys() - {"HF_TOKEN"}
    assert passed_on(there, with_object_store=False) == {}


def test_texts_in_shared_memory_are_the_owners_alone(stack: Stack) -> None:
    segments = stack.segments()
    assert segments
    assert {stat.S_IMODE(segment.stat().st_mode) for segment in segments} == {0o600}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users")
def test_a_segment_of_another_user_does_not_stop_the_start() -> None:
    """Left by a server of theirs that was killed; /dev/shm lets nobody else remove it."""
    segment = Path("/dev/shm/triton-embeddings-999999999-left")
    segment.write_bytes(b"")
    remove = "import os; from tools.triton.embedded import remove_orphaned_segments as remove; {}remove()"
    try:
        for become, is_left in (("os.setuid(65534); ", True), ("", False)):
            command = [sys.executable, "-c", remove.format(become)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert (done.returncode, done.stderr, segment.exists()) == (0, "", is_left)
    finally:
        segment.unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "grpc_proxy", "all_proxy"])
def test_a_local_triton_is_not_asked_by_way_of_a_proxy(tmp_path: Path, name: str) -> None:
    (nobody,) = free_ports(1)
    stack = Stack(tmp_path / "stack", environment={name: f"http://127.0.0.1:{nobody}"}).start()
    try:
        assert stack.embed(["a text"]).shape == (1, 384)
        alive = [sys.executable, "-m", "tools.alive", "--http-port", str(stack.ports["http"])]
        command = [*alive, "--work-folder", str(stack.work_folder)]
        subprocess.run(command, cwd=ROOT, env=os.environ | stack.environment, check=True)
    finally:
        assert stack.stop() == 0


def test_a_stopped_process_is_given_up(own_stack: Stack) -> None:
    """It may go on again: a while passes first, in which calls are 503."""
    own_stack.step("minilm-encoder").suspend()
    assert own_stack.post("embed", "/embed", {"texts": ["during"]}).status == 503
    until(lambda: own_stack.process.poll() is not None, 60)
    assert own_stack.process.returncode == 1
    assert "the process of minilm-encoder has been stopped for too long" in own_stack.errors()
