"""The peers: what each is, and how it is started. Only its own environment imports it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tools.bench.peers.embedders import MODEL, Embedder, Library, Server
from tools.bench.peers.processes import CACHE, HERE, OFFLINE, environment, listening
from tools.bench.server import Process, free_ports

THREADS = len(os.sched_getaffinity(0))
"""Threads of every peer's engine."""
SETTINGS = OFFLINE | {"OMP_NUM_THREADS": str(THREADS)}
LOAD_SECONDS = 60
BATCH = 8
"""Texts that a library computes together, the same for all; their own choices are 32 and 256."""


@dataclass(frozen=True)
class Choice:
    """One peer."""

    kind: str
    """`gateway`, `server` or `library`."""
    precision: str
    start: Callable[[Path], AbstractContextManager[Embedder]]
    """Starts the peer with the checkpoint of a folder."""


@contextmanager
def home_made(checkpoint: Path) -> Iterator[Server]:
    """home_made.py in front of a padded encoder in the embedded Triton."""
    gateway = environment("home-made")
    repository = CACHE / "repository"
    shutil.copytree(HERE / "encoder", repository / "encoder", dirs_exist_ok=True)
    graph = repository / "encoder" / "1" / "model.onnx"
    _make(graph, "sentence-transformers", "export.py", str(checkpoint))
    port, *ports = free_ports(4)
    triton = [sys.executable, "-m", "tools.triton", "--repository", str(repository), "--models", "encoder"]
    triton += ["--work-folder", str(CACHE)]
    for name, one in zip(("http", "grpc", "metrics"), ports, strict=True):
        triton += [f"--{name}-port", str(one)]
    settings = SETTINGS | {"CHECKPOINT": str(checkpoint), "TRITON": f"127.0.0.1:{ports[1]}"}
    uvicorn = [str(gateway), "-m", "uvicorn", "home_made:app", "--app-dir", str(HERE)]
    uvicorn += ["--port", str(port), "--no-access-log", "--log-level", "warning"]
    with listening(triton, ports[0], {}) as encoder, listening(uvicorn, port, settings) as process:
        yield Server([encoder, process], f"127.0.0.1:{port}", "embed", "texts")


@contextmanager
def infinity(precision: str, checkpoint: Path) -> Iterator[Server]:
    """infinity_emb's own server with its torch engine."""
    python = environment("infinity")
    (port,) = free_ports(1)
    words = [str(python.with_name("infinity_emb")), "v2", "--model-id", str(checkpoint), "--device", "cpu"]
    words += ["--engine", "torch", "--dtype", precision, "--served-model-name", MODEL, "--log-level", "error"]
    with listening([*words, "--host", "127.0.0.1", "--port", str(port)], port, SETTINGS) as process:
        yield Server([process], f"127.0.0.1:{port}", "embeddings", "input")


@contextmanager
def llama_cpp(precision: str, checkpoint: Path) -> Iterator[Server]:
    """llama.cpp's own server."""
    python = environment("llama-cpp")
    (port,) = free_ports(1)
    graph = CACHE / f"{precision}.gguf"
    _make(graph, "llama-cpp", "gguf_file.py", str(checkpoint), precision)
    words = [str(python), str(HERE / "llama_cpp.py"), str(graph), str(port), str(THREADS)]
    with listening(words, port, SETTINGS) as process:
        # It listens before it has loaded.
        server = Server([process], f"127.0.0.1:{port}", "v1/embeddings", "input")
        for _ in range(LOAD_SECONDS):
            with suppress(urllib.error.HTTPError):
                server.embed(["loaded?"])
                break
            time.sleep(1)
        yield server


@contextmanager
def sentence_transformers(environment: str, options: dict[str, Any], checkpoint: Path) -> Iterator[Library]:
    """Its torch backend, or another one with the graph that it exports itself."""
    backend = {"sentence-transformers": "torch"}.get(environment, environment)
    folder = checkpoint
    if backend != "torch":
        folder = CACHE / f"exported-{backend}"
        _make(folder, environment, "optimize.py", backend, str(checkpoint))
    settings = {"library": "sentence-transformers", "backend": backend, "options": options, "batch": BATCH}
    with _library(environment, settings | {"checkpoint": str(folder)}) as library:
        yield library


@contextmanager
def fastembed(checkpoint: Path) -> Iterator[Library]:
    """With the same optimized graph, as its own download has one, and with the checkpoint's limit of tokens."""
    folder = CACHE / "exported-onnx"
    _make(folder, "onnx", "optimize.py", "onnx", str(checkpoint))
    settings = {"library": "fastembed", "backend": OPTIMIZED, "options": {"threads": THREADS}, "batch": BATCH}
    with _library("fastembed", settings | {"checkpoint": str(folder)}) as library:
        yield library


OPTIMIZED, INT8 = "onnx/model_O2.onnx", "onnx/model_qint8_avx512_vnni.onnx"


def _onnx(graph: str) -> Callable[[Path], AbstractContextManager[Embedder]]:
    return partial(sentence_transformers, "onnx", {"file_name": graph, "threads": THREADS})


def _openvino(precision: str) -> Callable[[Path], AbstractContextManager[Embedder]]:
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": THREADS}
    return partial(sentence_transformers, "openvino", {"ov_config": settings})


def choices(engine: str) -> dict[str, Choice]:
    """Name -> peer. `engine`: what OpenVINO computes in on this machine where nobody asks it for another."""
    torch = partial(partial, sentence_transformers, "sentence-transformers")
    return {
        "home-made": Choice("gateway", engine, home_made),
        "infinity": Choice("server", "fp32", partial(infinity, "float32")),
        "infinity-bf16": Choice("server", "bf16", partial(infinity, "bfloat16")),
        "llama.cpp": Choice("server", "fp32", partial(llama_cpp, "F32")),
        "llama.cpp-q8_0": Choice("server", "Q8_0", partial(llama_cpp, "Q8_0")),
        "sentence-transformers": Choice("library", "fp32", torch({})),
        "sentence-transformers-bf16": Choice("library", "bf16", torch({"dtype": "bfloat16"})),
        "sentence-transformers-openvino": Choice("library", "fp32", _openvino("f32")),
        "sentence-transformers-openvino-bf16": Choice("library", "bf16", _openvino("bf16")),
        "sentence-transformers-onnx": Choice("library", "fp32", _onnx(OPTIMIZED)),
        "sentence-transformers-onnx-int8": Choice("library", "int8", _onnx(INT8)),
        "fastembed": Choice("library", "fp32", fastembed),
    }


@contextmanager
def _library(name: str, settings: dict[str, Any]) -> Iterator[Library]:
    """encode.py in the environment `name`."""
    words = [str(environment(name)), str(HERE / "encode.py"), json.dumps(settings)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    log = CACHE / "servers.log"
    with (
        log.open("a") as errors,
        subprocess.Popen(words, env=os.environ | SETTINGS, stderr=errors, **pipes) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # Others print to stdout, too.
            if not any(line.strip() == "ready" for line in process.stdout):
                raise ChildProcessError(f"it did not start: {log} has its last words")
            yield Library([Process(psutil.Process(process.pid))], process.stdin, process.stdout)
        finally:
            process.terminate()


def _make(path: Path, name: str, script: str, *words: str) -> None:
    """Writes a file or folder with a script in the environment `name`, once."""
    if path.exists():
        return
    part = path.with_name(f"part-{path.name}")
    shutil.rmtree(part, ignore_errors=True)
    command = [str(environment(name)), str(HERE / script), *words, str(part)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | OFFLINE)
    part.rename(path)
