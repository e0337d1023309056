"""Where checkpoints come from: the catalog's pages, and a stand-in for the Hugging Face Hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import onnxruntime
import pytest
from conftest import REFERENCE, ROOT
from google.protobuf import text_format
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save
from tokenizers import Tokenizer
from tritonclient.grpc.model_config_pb2 import ModelConfig

from build import catalog
from build.catalog import __main__ as page_of_catalog
from build.errors import BuildError
from build.rendering.model_folder import write_model
from build.rendering.models import models_of
from build.sources.checkpoint import Checkpoint
from build.sources.files import sha256
from build.sources.hub import data_files, pointer_hash
from build.sources.obtain import describe, obtain
from build.target import PRECISIONS, Target
from build.tasks import DOCUMENT_TASKS, TASKS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "org/Tiny-Qwen3"
ENSEMBLE = "tiny-qwen3/config.pbtxt"
TINY = REFERENCE / "tiny" / "qwen3-embedding"


def git_hash(content: bytes) -> str:
    """What `git hash-object` prints."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class StandIn:
    """A Hub with one repository, its large files behind a redirect as on the real one."""

    files: dict[str, bytes]
    requests: list[str] = field(default_factory=list)
    """`METHOD path` of each, with the range where one was asked for."""
    refusal: tuple[int, str] | None = None
    """The status and X-Error-Code of every answer."""
    cut_after: int | None = None
    """Bytes of the weights after which the server goes down."""
    is_down: bool = False
    commit: str = COMMIT
    """What `main` is."""
    listed: list[dict[str, Any]] | None = None
    """The tree, where it is not that of the files."""

    def is_large(self, name: str) -> bool:
        """Whether the file is kept by its sha256, and git has a pointer to it in its place."""
        return not name.endswith("config.json")

    def etag(self, name: str) -> str:
        content = self.files[name]
        return hashlib.sha256(content).hexdigest() if self.is_large(name) else git_hash(content)

    def tree(self) -> list[dict[str, Any]]:
        """The listing, in which the `oid` of a large file is that of its pointer."""
        rows: list[dict[str, Any]] = []
        for name, content in self.files.items():
            row = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
            if self.is_large(name):
                pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
                    self.etag(name).encode(),
                    len(content),
                )
                row["oid"] = git_hash(pointer)
                row["lfs"] = {"oid": self.etag(name), "size": len(content), "pointerSize": len(pointer)}
                row["xetHash"] = hashlib.blake2b(content, digest_size=32).hexdigest()
            rows.append(row)
        return rows


class Handler(BaseHTTPRequestHandler):
    """The routes that huggingface_hub calls."""

    protocol_version = "HTTP/1.1"
    hub: StandIn
    server: ThreadingHTTPServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(self.path.partition("?")[0])
        hub.requests.append(" ".join([self.command, path, *self.headers.get_all("Range", [])]))
        if hub.is_down:
            return self.answer(503)
        if hub.refusal is not None:
            return self.answer(hub.refusal[0], {"X-Error-Code": hub.refusal[1]})
        if not path.startswith((f"/api/models/{MODEL}/", f"/{MODEL}/", "/cdn/")):
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        if path in [f"/api/models/{MODEL}/revision/{name}" for name in ("main", COMMIT)]:
            return self.answer_json({"id": MODEL, "sha": hub.commit, "siblings": []})
        if path == f"/api/models/{MODEL}/tree/{COMMIT}":
            return self.answer_json(hub.tree() if hub.listed is None else hub.listed)
        name = path.removeprefix(f"/{MODEL}/resolve/{COMMIT}/")
        if name in hub.files:
            etag, size = hub.etag(name), str(len(hub.files[name]))
            headers = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": size}
            if hub.is_large(name):
                return self.answer(
                    302, headers | {"Location": f"http://localhost:{self.server.server_port}/cdn/{etag}"}
                )
            return self.answer(200, headers | {"ETag": f'"{etag}"'}, hub.files[name])
        for name, content in hub.files.items():
            if path == f"/cdn/{hub.etag(name)}":
                return self.answer_part(name, content)
        return self.answer(404, {"X-Error-Code": "RevisionNotFound"})

    def answer_part(self, name: str, content: bytes) -> None:
        start = 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if asked else {}
        if name.endswith(".safetensors") and self.hub.cut_after is not None:
            headers["Content-Length"] = str(len(content))
            self.answer(200, headers, content[: self.hub.cut_after])
            self.hub.is_down, self.close_connection = True, True
            return
        self.answer(206 if asked else 200, headers, content[start:])

    def answer_json(self, content: object) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@dataclass
class Machine:
    """A user's: a cache, a model repository, and the way to the stand-in."""

    hub: StandIn
    endpoint: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    @property
    def record(self) -> Any:
        return json.loads((self.repository / "tiny-qwen3" / "build.json").read_text())

    def build(self, model: str = MODEL, *options: str) -> subprocess.CompletedProcess[str]:
        """`python -m build.make`, as a user calls it."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        ours = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.folder / "hf"),
            "NO_PROXY": "127.0.0.1,localhost",
        }
        command = [sys.executable, "-W", "error", "-m", "build.make", "--repository", str(self.repository), model]
        command += options
        return subprocess.run(
            command, cwd=ROOT, env=clean | ours | self.environment, capture_output=True, text=True, check=False
        )

    def refused(self, model: str = MODEL) -> str:
        """The one sentence that a build fails with, which leaves the model repository as it was."""
        self.repository.mkdir(exist_ok=True)
        (self.repository / "other").write_text("")
        done = self.build(model)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert [path.name for path in self.repository.iterdir()] == ["other"]
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, done.stderr
        return errors[0].removeprefix("error: ")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    files = {str(path.relative_to(TINY)): path.read_bytes() for path in TINY.rglob("*") if path.is_file()}
    files |= {"pytorch_model.bin": b"a pickle", "modeling.py": b"code", "onnx/model.onnx": b"not asked for"}
    hub = StandIn(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfHub", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield Machine(hub, f"http://127.0.0.1:{server.server_port}", tmp_path)
    server.shutdown()
    server.server_close()
    thread.join()


def files_of(machine: Machine) -> dict[str, str]:
    """Every file of the models but the record, by hash."""
    paths = [path for path in machine.repository.rglob("*") if path.is_file() and path.name != "build.json"]
    return {str(path.relative_to(machine.repository)): sha256(path) for path in paths}


def ensemble_of(machine: Machine) -> ModelConfig:
    return text_format.Parse((machine.repository / ENSEMBLE).read_text(), ModelConfig())


def test_a_repository_is_built_like_its_folder(machine: Machine, tmp_path: Path) -> None:
    done = machine.build()
    assert done.returncode == 0, done.stderr
    assert f"{MODEL}: main is commit {COMMIT}" in done.stdout
    hub, ensemble = files_of(machine), ensemble_of(machine)
    shutil.copytree(TINY, tmp_path / "tiny-qwen3")
    assert machine.build(str(tmp_path / "tiny-qwen3")).returncode == 0
    assert files_of(machine) | {ENSEMBLE: ""} == hub | {ENSEMBLE: ""}
    # A folder has no revision, and is its own source.
    assert ensemble.parameters.pop("revision").string_value == COMMIT
    assert ensemble.parameters["source"].string_value == MODEL
    ensemble.parameters["source"].string_value = "tiny-qwen3"
    assert ensemble_of(machine) == ensemble


def test_commit_and_hashes_are_recorded(machine: Machine) -> None:
    machine.build()
    assert machine.record["inputs"]["source"] == f"{MODEL}@{COMMIT}"
    for name, found in machine.record["downloaded"].items():
        assert found == hashlib.sha256(machine.hub.files[name]).hexdigest()
    assert {"model.safetensors", "tokenizer.json", "1_Pooling/config.json"} <= machine.record["downloaded"].keys()


def test_only_what_a_build_reads_is_brought(machine: Machine) -> None:
    machine.build()
    asked = {request.rpartition(f"/{COMMIT}/")[2] for request in machine.hub.requests if "/resolve/" in request}
    assert asked == machine.record["downloaded"].keys()
    assert not [name for name in asked if not name.endswith((".json", ".safetensors"))]


def test_a_commit_in_the_cache_needs_no_network(machine: Machine) -> None:
    first = machine.build(f"{MODEL}@{COMMIT}")
    assert first.returncode == 0, first.stderr
    before = files_of(machine)
    machine.hub.requests.clear()
    shutil.rmtree(machine.repository)
    assert machine.build(f"{MODEL}@{COMMIT}").returncode == 0
    assert machine.hub.requests == []
    assert files_of(machine) == before
    assert machine.build(f"{MODEL}@{COMMIT}").stdout == "tiny-qwen3: up to date, nothing to do\n"


def test_a_branch_is_taken_from_the_cache_when_the_hub_is_away(machine: Machine) -> None:
    machine.build()
    machine.environment["HF_HUB_OFFLINE"] = "1"
    shutil.rmtree(machine.repository)
    assert machine.build().returncode == 0


def test_a_download_that_was_cut_off_goes_on(machine: Machine) -> None:
    weights = load_file(TINY / "model.safetensors") | {"lm_head.weight": np.zeros(6 << 20, np.float32)}
    machine.hub.files["model.safetensors"] = save(weights)
    machine.hub.cut_after = 23 << 20
    assert "answered with status 503" in machine.refused()
    machine.hub.cut_after, machine.hub.is_down = None, False
    machine.hub.requests.clear()
    machine.environment["HF_HUB_OFFLINE"] = "1"
    assert machine.refused().endswith(f"does not hold all of {MODEL} at {COMMIT[:12]}")
    machine.environment.clear()
    assert machine.build().returncode == 0
    (part,) = (request for request in machine.hub.requests if "bytes=" in request and "/cdn/" in request)
    # huggingface_hub writes 10 MiB at once.
    assert part.endswith(f"bytes={20 << 20}-")


def test_a_part_that_is_not_the_files_own_is_thrown_away(machine: Machine) -> None:
    machine.hub.cut_after = 70_000
    machine.refused()
    (part,) = machine.folder.rglob("*.part")
    part.write_bytes(bytes(1000))
    machine.hub.cut_after, machine.hub.is_down = None, False
    assert "came with sha256" in machine.refused()
    assert machine.build().returncode == 0


def test_a_damaged_cache_is_refused(machine: Machine) -> None:
    machine.build()
    (weights,) = machine.folder.rglob("model.safetensors")
    blob = weights.resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    shutil.rmtree(machine.repository)
    assert re.fullmatch(
        f"{blob} is damaged, or not .* lists: delete it and {weights}, and build again", machine.refused()
    )


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "GatedRepo", f"{MODEL} is gated: accept its licence at .*/{MODEL}, then set HF_TOKEN"),
        (403, "GatedRepo", f"{MODEL} is gated: accept its licence at .*/{MODEL}, then set HF_TOKEN"),
        (403, "", f"refuses {MODEL} with status 403: set HF_TOKEN"),
        (404, "RepoNotFound", f"there is no folder '{MODEL}', and .* has no such model, or not for you"),
    ],
)
@pytest.mark.parametrize("revision", ["", f"@{COMMIT}"])
def test_a_hub_that_refuses(machine: Machine, status: int, code: str, words: str, revision: str) -> None:
    machine.hub.refusal = status, code
    assert re.search(words, machine.refused(MODEL + revision))


def test_an_unknown_repository(machine: Machine) -> None:
    assert "there is no folder 'org/none', and " in machine.refused("org/none")


@pytest.mark.parametrize("revision", ["v9", "f" * 40])
def test_an_unknown_revision(machine: Machine, revision: str) -> None:
    assert machine.refused(f"{MODEL}@{revision}") == f"{MODEL} has no revision '{revision}'"


def test_a_name_that_no_repository_can_have(machine: Machine) -> None:
    assert machine.refused("or g/x") == "'or g/x' is neither a folder nor a name of the Hub's"


def test_a_hub_that_is_down(machine: Machine) -> None:
    machine.hub.is_down = True
    assert "answered with status 503 when asked for" in machine.refused()


def test_no_network(machine: Machine) -> None:
    machine.endpoint = "http://127.0.0.1:9"
    said = machine.refused()
    assert said.startswith(f"http://127.0.0.1:9 cannot be reached for {MODEL}")
    assert "build the folder by MODEL=path/to/folder, or set HF_ENDPOINT" in said


def test_a_cache_that_cannot_be_written(machine: Machine) -> None:
    machine.environment["HF_HOME"] = "/proc/none"
    assert re.match("cannot write to /proc/none.*: No such file or directory", machine.refused())


def test_pickles_only(machine: Machine) -> None:
    del machine.hub.files["model.safetensors"], machine.hub.files["onnx/model.onnx"]
    assert machine.refused() == (
        f"{MODEL} at {COMMIT[:12]} has its weights in pytorch_model.bin only: pickles can run code and are never "
        "read; name a revision that has model.safetensors"
    )
    assert not [request for request in machine.hub.requests if "pytorch_model" in request]


def test_no_tokenizer(machine: Machine) -> None:
    del machine.hub.files["tokenizer.json"]
    assert machine.refused() == f"{MODEL} at {COMMIT[:12]} has no tokenizer.json"


def test_a_vocabulary_is_brought_where_there_is_no_tokenizer(machine: Machine) -> None:
    """With all that is said of tokens beside it, and no other vocabulary than is there."""
    folder = shutil.copytree(REFERENCE / "tiny" / "bert-cls", machine.folder / "tiny-qwen3")
    ids = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in sorted(ids, key=ids.__getitem__)))
    (folder / "special_tokens_map.json").write_text('{"cls_token": "[SEP]"}')
    (folder / "added_tokens.json").write_text("{}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    machine.hub.files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
    assert machine.build().returncode == 0
    assert {"vocab.txt", "special_tokens_map.json", "added_tokens.json"} <= machine.record["downloaded"].keys()
    tokenizer = Tokenizer.from_file(str(machine.repository / "tiny-qwen3-tokenizer" / "1" / "tokenizer.json"))
    assert tokenizer.encode("[UNK]").tokens == ["[SEP]", "[UNK]", "[SEP]"]


@pytest.mark.parametrize("name", ["static", "model2vec", "qwen3-vl-reranker"])
def test_other_layouts_are_built_like_their_folder(machine: Machine, name: str) -> None:
    """Without a `config.json`, with modules in the folder that they stand in, or with a folder of templates."""
    folder = shutil.copytree(REFERENCE / "tiny" / name, machine.folder / "tiny-qwen3")
    machine.hub.files = {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    done = machine.build()
    assert done.returncode == 0, done.stderr
    hub = files_of(machine)
    assert machine.build(str(folder)).returncode == 0
    assert files_of(machine) | {ENSEMBLE: ""} == hub | {ENSEMBLE: ""}


def test_a_vocabulary_that_nothing_is_made_of(machine: Machine) -> None:
    del machine.hub.files["tokenizer.json"]
    machine.hub.files |= {"vocab.json": b"{}", "merges.txt": b""}
    assert "it has vocab.json, of which no TokenizersBackend is made here: write one" in machine.refused()
    assert not [request for request in machine.hub.requests if "model.safetensors" in request]


def test_what_is_refused_by_its_settings_is_not_downloaded(machine: Machine) -> None:
    config = json.loads(machine.hub.files["config.json"])
    machine.hub.files["config.json"] = json.dumps(config | {"attention_bias": True}).encode()
    assert "attention_bias = true" in machine.refused()
    assert not [request for request in machine.hub.requests if "model.safetensors" in request]


def test_weights_that_are_not_what_the_hub_lists(machine: Machine) -> None:
    """Though each answer says by its ETag that they are."""
    rows = machine.hub.tree()
    machine.hub.files["model.safetensors"] = save(load_file(TINY / "model.safetensors"), {"other": "bytes"})
    machine.hub.listed = rows
    assert "or not what http://127.0.0.1:" in machine.refused()


@pytest.mark.parametrize(
    ("sha", "size", "blob"),
    [
        (
            "d88b0d6a6ff9c3f8151f9d3228f57092aaea997f09af009eefd7373a77b5abb9",
            497764107,
            "8095a62ccb4d806da7666fcda07467e2d150218e",
        ),
        (
            "9be78edb5b928eba33aa88f431551348f7466ba9f5ef3daf1d552398722a5436",
            548123560,
            "64eaa9c526867e404b68f2c5d66fd78e27026523",
        ),
    ],
)
def test_what_the_hub_lists_of_a_large_file(sha: str, size: int, blob: str) -> None:
    """Figures of two real files, as huggingface_hub's documentation of `list_repo_tree` quotes them."""
    assert pointer_hash(sha, size) == blob


def test_settings_that_are_not_what_the_hub_lists(machine: Machine) -> None:
    rows = machine.hub.tree()
    machine.hub.files["1_Pooling/config.json"] += b" "
    machine.hub.listed = rows
    assert "1_Pooling/config.json, and build again" in machine.refused()


@pytest.mark.parametrize("commit", ["../../../outside", "main", "0" * 39, ""])
def test_a_commit_that_is_none(machine: Machine, commit: str) -> None:
    machine.hub.commit = commit
    assert "no commit" in machine.refused() or "answered" in machine.refused()


def test_shards(machine: Machine) -> None:
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    machine.hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    weights = load_file(TINY / "model.safetensors")
    halves = [{name: weights[name] for name in list(weights)[half::2]} for half in (0, 1)]
    machine.hub.files.pop("model.safetensors")
    machine.hub.files["model-1-of-2.safetensors"] = save(halves[0])
    assert f"{MODEL} at {COMMIT[:12]} has no model-2-of-2.safetensors" in machine.refused()
    machine.hub.files["model-2-of-2.safetensors"] = save(halves[1])
    shutil.rmtree(machine.folder / "hf")
    done = machine.build()
    assert done.returncode == 0, done.stderr
    assert {*index["weight_map"].values()} < machine.record["downloaded"].keys()


def outside(name: str) -> TensorProto:
    """A tensor whose values lie in a file beside its graph."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=f"{name}_data")
    return tensor


def test_where_a_graph_keeps_its_data() -> None:
    """Tensors of attributes and of inner graphs count too, and any file name may come up."""
    inner = helper.make_graph([], "inner", [], [], initializer=[outside("deep")])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=outside("constant")),
        helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner),
    ]
    graph = helper.make_graph(nodes, "outer", [], [], initializer=[outside("weight")])
    assert data_files(helper.make_model(graph)) == ["constant_data", "deep_data", "weight_data"]


def test_without_safetensors_an_exported_graph_comes_with_its_data(machine: Machine) -> None:
    del machine.hub.files["model.safetensors"]
    node = helper.make_node("Identity", ["weight"], ["same"])
    graph = helper.make_graph([node], "graph", [], [], initializer=[outside("weight")])
    machine.hub.files |= {
        "onnx/model.onnx": helper.make_model(graph).SerializeToString(),
        "onnx/weight_data": bytes(4),
        "onnx/model_int8.onnx": b"not asked for",
    }
    machine.build()
    large = [request.rpartition("/onnx/")[2] for request in machine.hub.requests if "/onnx/" in request]
    assert set(large) == {"model.onnx", "weight_data"}


def exported(machine: Machine, *names: str) -> None:
    """Puts graphs that torch exported into the repository, of a type that no page knows."""
    graph = (REFERENCE / "onnx" / "qwen3-embedding" / "model.onnx").read_bytes()
    config = json.loads(machine.hub.files["config.json"]) | {"model_type": "other"}
    machine.hub.files |= dict.fromkeys(names, graph) | {"config.json": json.dumps(config).encode()}


def fetched(machine: Machine) -> set[str]:
    """The large files that were asked for."""
    asked = {request.partition(f"{COMMIT}/")[2] for request in machine.hub.requests}
    return {name for name in asked if name.endswith((".onnx", ".safetensors"))}


def test_weights_that_no_page_can_use_are_left_there(machine: Machine) -> None:
    exported(machine, "onnx/model.onnx")
    done = machine.build()
    assert done.returncode == 0, done.stderr
    assert fetched(machine) == {"onnx/model.onnx"}


def test_a_repository_of_no_known_type_and_no_usual_graph(machine: Machine) -> None:
    del machine.hub.files["onnx/model.onnx"]
    exported(machine, "onnx/model_fp16.onnx", "onnx/model_q4.onnx")
    message = machine.refused()
    assert "has model_type 'other'; graphs are written for StaticEmbedding, bert," in message
    assert "the file that --onnx names; it has onnx/model_fp16.onnx, onnx/model_q4.onnx" in message
    assert not fetched(machine)
    done = machine.build(MODEL, "--onnx", "onnx/model_fp16.onnx")
    assert done.returncode == 0, done.stderr
    assert fetched(machine) == {"onnx/model_fp16.onnx"}


@pytest.mark.parametrize("name", catalog.names())
def test_every_page(name: str) -> None:
    entry = catalog.load(name)
    assert entry.title
    assert entry.languages
    assert entry.licence
    assert entry.parameters
    if entry.tasks[0] in DOCUMENT_TASKS:
        assert len(entry.tasks) == 1
        assert entry.precisions == ("fp32",)
        assert not isinstance(entry.source, catalog.Hub) or re.fullmatch("[0-9a-f]{40}", entry.source.revision)
        return
    assert entry.tasks[1:] in ((), ("rerank",))
    assert (entry.width is None) == (entry.tasks in (("rerank",), ("classify",), ("generate",)))
    assert set(entry.precisions) <= set(PRECISIONS)
    assert entry.tolerance.keys() == set(entry.precisions)
    assert entry.max_tokens
    assert entry.batching.texts * entry.max_tokens >= entry.batching.tokens >= entry.max_tokens
    if isinstance(entry.source, catalog.Hub):
        assert re.fullmatch("[0-9a-f]{40}", entry.source.revision)
        # A page of an adapter is asked for by its own name.
        assert catalog.find(entry.source.repository, "") == (entry if entry.adapter is None else None)
        own = entry.source.repository.rpartition("/")[2].lower()
        assert entry.name == own if entry.adapter is None else entry.name.startswith(f"{own}-")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_have_a_page(task: str) -> None:
    """A row of the table, and a tolerance for what says none."""
    cells = page_of_catalog.row(replace(catalog.load("minilm"), tasks=(task,))).split(" | ")
    assert cells[1] == TASKS[task].gives
    assert catalog.ENTRY_TOLERANCE[task].keys() == set(PRECISIONS)


def test_no_commit_stands_on_two_pages() -> None:
    """But for those of a checkpoint's adapters, each of which is there once."""
    entries = [entry for entry in map(catalog.load, catalog.names()) if isinstance(entry.source, catalog.Hub)]
    pages = [(entry.source, entry.adapter) for entry in entries]
    assert len(set(pages)) == len(pages)
    sources = {entry.source for entry in entries}
    assert len({source.revision for source in sources}) == len({source.repository for source in sources})
    assert len(sources) == len([adapter for _, adapter in pages if adapter is None]) + len(
        {source for source, adapter in pages if adapter is not None}
    )


def test_the_table_of_pages_is_in_step() -> None:
    assert page_of_catalog.PATH.read_text() == page_of_catalog.table(), "python -m build.catalog"


@pytest.mark.parametrize("name", ["qwen3-embedding-8b", "qwen3-reranker-8b", "embeddinggemma-300m"])
def test_models_that_overflow_have_no_fp16(name: str) -> None:
    assert "fp16" not in catalog.load(name).precisions


def test_a_page_has_the_last_word(tmp_path: Path) -> None:
    entry = replace(describe(TINY, "tiny"), max_tokens=16, prompts={"query": "q: "})
    models = {model.config.name: model for model in models_of(entry, obtain(entry, tmp_path), Target())}
    parameters = models["tiny-tokenizer"].config.parameters
    assert parameters["max_tokens"].string_value == "16"
    assert json.loads(parameters["prompts"].string_value)["query"] == "q: "


@pytest.mark.parametrize("normalise", [True, False])
def test_a_page_says_whether_vectors_have_unit_length(tmp_path: Path, normalise: bool) -> None:
    entry = replace(describe(TINY, "tiny"), normalise=normalise)
    models = {model.config.name: model for model in models_of(entry, obtain(entry, tmp_path), Target())}
    write_model(models["tiny-encoder"], tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "1" / "head.onnx")
    (width,) = models["tiny-encoder"].config.output[0].dims
    states = np.random.default_rng(0).normal(size=(3, width)).astype(np.float32)
    feed = {
        "last_hidden_state": states,
        "input_ids": np.ones(3, np.int32),
        "lengths": np.array([3], np.int32),
    }
    ((vector,),) = session.run(["embeddings"], feed)
    assert (abs(np.linalg.norm(vector) - 1) < 1e-5) == normalise


def test_a_window_wider_than_the_checkpoints(tmp_path: Path) -> None:
    entry = replace(describe(TINY, "tiny"), max_tokens=1 << 20)
    with pytest.raises(BuildError, match=r"1048576 tokens were asked for, but .* takes 1 to "):
        models_of(entry, obtain(entry, tmp_path), Target())


def test_nomics_window_is_not_what_it_was_trained_on(tmp_path: Path) -> None:
    """The published config.json has both numbers, and sentence-transformers files that ask for the wider one."""
    folder = shutil.copytree(REFERENCE / "tiny" / "nomic-bert", tmp_path / "nomic")
    config = json.loads((folder / "config.json").read_text())
    positions = config.pop("max_position_embeddings", None) or config["n_positions"]
    config |= {"n_positions": positions, "max_position_embeddings": positions // 4}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": positions}))
    parts = models_of(describe(folder, "nomic"), Checkpoint(folder), Target())
    (tokenizer,) = [part.config for part in parts if part.config.name == "nomic-tokenizer"]
    assert tokenizer.parameters["max_tokens"].string_value == str(positions)
