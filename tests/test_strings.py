"""Strings in and out of a Python step of the embedded Triton: what its stub, built for NumPy 1, gets and gives."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from conftest import Stack
from containers import listens, until
from tritonclient.grpc import InferenceServerClient, InferInput

CONFIG = """
name: "echo"
backend: "python"
max_batch_size: 0
input { name: "text" data_type: TYPE_STRING dims: [ -1, -1 ] }
output { name: "text" data_type: TYPE_STRING dims: [ -1, -1 ] }
output { name: "length" data_type: TYPE_INT32 dims: [ -1, -1 ] }
instance_group { count: 1 kind: KIND_CPU }
"""

STEP = """
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.threads = ThreadPoolExecutor(4)

    def execute(self, requests):
        return list(self.threads.map(self.answer, requests))

    def answer(self, request):
        text = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()
        length = np.array([len(value) for value in text.reshape(-1)], np.int32).reshape(text.shape)
        return pb_utils.InferenceResponse([pb_utils.Tensor("text", text), pb_utils.Tensor("length", length)])
"""


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A Triton alone, of one model that gives back what it gets."""
    folder = tmp_path_factory.mktemp("echo")
    version = folder / "models" / "echo" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(STEP)
    (version.parent / "config.pbtxt").write_text(CONFIG)
    running = Stack(folder / "work", ["--models", "echo", "--repository", str(folder / "models")])
    ports = running.port_options("http", "grpc", "metrics")
    running.process = running.run("-m", "tools.triton", *running.work_options(), *ports)
    until(lambda: is_ready(running), 60)
    yield running
    assert running.stop() == 0


def is_ready(triton: Stack) -> bool:
    assert triton.process.poll() is None, triton.errors()
    return listens(triton.ports["http"]) and triton.get("http", "/v2/health/ready").status == 200


def echoed(triton: Stack, array: npt.NDArray[np.object_]) -> tuple[npt.NDArray[np.object_], list[int]]:
    tensor = InferInput("text", array.shape, "BYTES").set_data_from_numpy(array)
    with InferenceServerClient(f"127.0.0.1:{triton.ports['grpc']}") as client:
        result = client.infer("echo", [tensor])
    return result.as_numpy("text"), result.as_numpy("length").reshape(-1).tolist()


@pytest.mark.parametrize("shape", [(1, 1), (0, 3), (3, 1), (2, 5), (40, 50)])
def test_strings_come_back_as_they_were(triton: Stack, shape: tuple[int, int]) -> None:
    """Of any number, and lengths with zeros, newlines and other bytes than UTF-8 among them."""
    kinds = [b"", b"one", "naïve — 東京".encode(), b"\0\0", b"ends in zeros\0\0", b"\xff\xfe", b"x" * 3000]
    values = [kinds[i % len(kinds)] for i in range(shape[0] * shape[1])]
    array = np.empty(shape, np.object_)
    array.reshape(-1)[:] = values
    text, lengths = echoed(triton, array)
    assert text.shape == shape
    assert text.reshape(-1).tolist() == values
    assert lengths == [len(value) for value in values]


def test_strings_over_http(triton: Stack) -> None:
    texts = ["one", "", "zwei", "三"]
    body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [2, 2], "data": texts}]}
    outputs = triton.post("http", "/v2/models/echo/infer", body).json()["outputs"]
    assert outputs[0] == {"name": "text", "datatype": "BYTES", "shape": [2, 2], "data": texts}
    assert outputs[1]["data"] == [len(text.encode()) for text in texts]


def test_strings_that_threads_make_at_once(triton: Stack) -> None:
    arrays = [np.array([[f"{i}-" + "y" * (37 * i % 900)] * (i % 7 + 1)], np.object_) for i in range(200)]
    with ThreadPoolExecutor(16) as clients:
        found = list(clients.map(lambda array: echoed(triton, array)[0], arrays))
    for array, text in zip(arrays, found, strict=True):
        assert [value.decode() for value in text[0]] == array[0].tolist()
