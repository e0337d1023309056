"""`make gpu-proof`: its arithmetic, its checkpoints, and all of it on a CPU at the tiny size."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from test_gpu import H200, write_smi
from test_graphs import COSINE

from build import catalog
from build.sources.checkpoint import Checkpoint
from tools.bench.gpu.checkpoint import PUBLISHED, SIZES, dimensions, flops, shards, write_random
from tools.bench.gpu.proof import Proof, Speed
from tools.bench.gpu.report import NOTHING, proofs, table, with_proofs

PYTHON = ROOT / ".venv-torch" / "bin" / "python"
ENGINES = ["encoder alone", "v2 gRPC", "`/embed`", "sentence-transformers", "vLLM"]
LOADS = ["64 tokens", "512 tokens", "2048 tokens", "8192 tokens", "mixed"]

VLLM = """#!/usr/bin/env python3
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = self.path == "/v1/embeddings" and body["input"] and body["model"] == "proof"
        self.send_response(200 if known else 400)
        self.end_headers()
    def log_message(self, *_):
        pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""

needs_transformers = pytest.mark.usefixtures("_transformers")


@pytest.fixture(scope="module")
def _transformers() -> None:
    found = (
        subprocess.run([PYTHON, "-c", "import sentence_transformers"], check=False) if PYTHON.exists() else None
    )
    if found is None or found.returncode:
        if os.environ.get("REQUIRE_TORCH"):
            pytest.fail("`make .venv-torch/torch.txt` could not install torch and transformers")
        pytest.skip("`make .venv-torch/torch.txt` installs torch and transformers")


def run(*options: str, path: str = "", visible: str = "") -> subprocess.CompletedProcess[str]:
    """The command, on a machine without a GPU."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "tools.bench.gpu", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_operations_are_counted() -> None:
    """By hand: texts of one and of three tokens, two layers."""
    sizes = {"hidden_size": 4, "heads": 2, "key_value_heads": 1, "width": 3, "inner": 5}
    small = replace(dimensions(TINY / "qwen3-embedding"), **sizes, windows=(None, None))
    projections = 4 * 6 + 4 * 3 + 4 * 3 + 6 * 4
    gates = 3 * (4 * 5)
    attended = 1 + (1 + 2 + 3)
    a_place = 2 * (3 + 3)  # a head's product with a key of three numbers, and three sums over values
    assert flops(small, [1, 3]) == 2 * (2 * (projections + gates) * 4 + 2 * a_place * attended)


@pytest.mark.parametrize("size", [size for size in SIZES if size != "tiny"])
def test_sizes_are_the_published_ones(size: str, tmp_path: Path) -> None:
    """To a million parameters, as the catalog has them."""
    published = json.loads(PUBLISHED.read_text())["models"]["Qwen/Qwen3-Embedding-0.6B"]["config.json"]
    (tmp_path / "config.json").write_text(json.dumps(published | SIZES[size]))
    count = sum(math.prod(shape) for shard in shards(dimensions(tmp_path)) for shape in shard.values())
    assert count / 1e6 == pytest.approx(catalog.load(f"qwen3-embedding-{size}").parameters, abs=1)


@needs_transformers
def test_transformers_opens_a_random_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_random("tiny", folder)
    code = """
import json, sys
from transformers import AutoModel, AutoTokenizer
model, info = AutoModel.from_pretrained(sys.argv[1], output_loading_info=True)
values = model.layers[0].mlp.gate_proj.weight.float()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps({
    "ids": tokenizer("One text, and another.")["input_ids"], "window": tokenizer.model_max_length,
    "type": type(model).__name__, "dtype": str(model.dtype), "missing": list(info["missing_keys"]),
    "unexpected": list(info["unexpected_keys"]), "deviation": values.std().item(), "mean": values.mean().item(),
}))
"""
    said = json.loads(subprocess.check_output([PYTHON, "-c", code, folder], text=True))
    assert said.pop("ids") == Checkpoint(folder).tokenizer.encode("One text, and another.").ids
    # A row of unit variance comes out as one.
    assert said.pop("deviation") == pytest.approx(dimensions(folder).hidden_size ** -0.5, rel=0.05)
    assert abs(said.pop("mean")) < 0.01
    assert said == {
        "type": "Qwen3Model",
        "dtype": "torch.bfloat16",
        "missing": [],
        "unexpected": [],
        "window": 8192,
    }
    # One for each layer and one for the table of tokens: no more than that is in memory at once.
    assert len(list(folder.glob("*.safetensors"))) == 1 + dimensions(folder).layers


@needs_transformers
@pytest.mark.timeout(900)
def test_a_trial_on_a_cpu(tmp_path: Path) -> None:
    """All of the command; vLLM is measured where PATH has it, here a stand-in, and TEI does not start."""
    (tmp_path / "bin").mkdir()
    for name, content in (("vllm", VLLM), ("text-embeddings-router", "#!/bin/sh\nexit 1\n")):
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    page = (ROOT / "docs" / "gpu.md").read_bytes()
    options = ["--rounds", "1", "--seconds", "0", "--output", str(tmp_path)]
    done = run(*options, "--python", str(PYTHON), "--peers", str(PYTHON), path=str(tmp_path / "bin"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "its numbers are no GPU's" in done.stderr
    assert "none of it is a GPU's" in done.stdout
    assert (ROOT / "docs" / "gpu.md").read_bytes() == page
    (path,) = tmp_path.glob("*.json")
    proof = Proof.read(path)
    assert table(proof) in done.stdout
    assert not proof.gpu
    assert {(one.engine, one.load) for one in proof.speeds} == {(e, load) for e in ENGINES for load in LOADS}
    assert all(len(one.rounds) == 1 and one.rounds[0] > 0 for one in proof.speeds)
    assert proof.peak > 0
    assert proof.memory.keys() == set(ENGINES)
    assert min(proof.memory.values()) > 0
    assert proof.versions.keys() == {"torch", "transformers", "sentence-transformers"}
    assert list(proof.absent) == ["TEI (fp16)"]
    assert "did not start" in proof.absent["TEI (fp16)"]
    lowest = {who: one["lowest"] for who, one in proof.cosines.items()}
    assert lowest.pop("torch fp32 with transformers fp32") >= COSINE["fp32"]
    assert len(lowest) == 4
    assert min(lowest.values()) >= COSINE["bf16"]
    assert proof.unlike < 0.9, "the other cosines would say nothing"
    assert proof.same_bits.keys() == {"bf16", "fp32"}
    assert proof.same_bits["fp32"][1] == proof.same_bits["bf16"][1] > 16


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--size", "8b"], "no NVIDIA GPU here for the size 8b: on a CPU only `--size tiny` runs, as a trial"),
        (["--checkpoint", str(TINY / "bert-cls"), "--peers", "any"], "is of the type 'bert'"),
        (["--checkpoint", "nowhere", "--peers", "any"], "nowhere"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(options: list[str], sentence: str) -> None:
    done = run(*options)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert sentence in last


def test_a_gpu_that_torch_cannot_use_is_said_at_once(tmp_path: Path) -> None:
    write_smi(tmp_path, H200)
    done = run("--size", "8b", path=str(tmp_path), visible="0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: {sys.executable} has no torch that can use NVIDIA H200: run `make setup`"
    )


PROOF = Proof(
    gpu=True,
    device="NVIDIA H100",
    checkpoint="Qwen3-Embedding 4b with random weights",
    machine={},
    versions={},
    peak=8e14,
    cosines={"torch fp32 with transformers fp32": {"lowest": 0.9999998, "mean": 0.9999999}},
    unlike=0.25,
    same_bits={"bf16": [63, 64]},
    speeds=[
        Speed("encoder alone", "64 tokens", 8e9, [60000.0, 40000.0]),
        Speed("encoder alone", "mixed", 1e10, [8000.0, 8000.0]),
        Speed("v2 gRPC", "64 tokens", 8e9, [10000.0, 10000.0]),
    ],
    memory={"encoder alone": 9_400_000_000, "v2 gRPC": 10_000_000_000},
    absent={"vllm": "there is no vllm on PATH"},
)


def test_the_table() -> None:
    lines = table(PROOF).splitlines()
    assert lines[:4] == [
        "| NVIDIA H100, Qwen3-Embedding 4b with random weights, bf16 | 64 tokens | mixed | memory |",
        "|---|---|---|---|",
        "| encoder alone | 50,000 (50%) | 8,000 (10%) | 9.4 GB |",
        "| v2 gRPC | 10,000 (10%) |  | 10.0 GB |",
    ]
    said = " ".join(lines[5:])
    for sentence in (
        "medians of 2 rounds, and the share of the 800 TFLOP/s",
        "torch fp32 with transformers fp32 0.9999998 (0.9999999); of unlike texts on average 0.25.",
        "Texts with the same bits alone as beside others: 63 of 64 in bf16.",
        "vllm was not measured: there is no vllm on PATH.",
    ):
        assert sentence in said


def test_a_proof_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = PROOF.write(tmp_path)
    assert path.name == "nvidia-h100-qwen3-embedding-4b-with-random-weights.json"
    assert Proof.read(path) == PROOF


def test_the_page_has_the_proofs() -> None:
    """`python -m tools.bench.gpu.report` brings it in step."""
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert with_proofs(page, proofs()) == page
    assert all(one.gpu for one in proofs())
    shown = with_proofs(page, [PROOF])
    assert table(PROOF) in shown
    assert NOTHING not in shown
