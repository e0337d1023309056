"""The builder: what it writes, when it writes, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from conftest import ROOT, TINY
from google.protobuf import text_format
from tiny import NAMES, PACKED, tiny_entry
from tritonclient.grpc.model_config_pb2 import TYPE_BF16, TYPE_FP32, ModelConfig

from build import catalog
from build import make as command
from build.catalog import Batching, CatalogEntry
from build.errors import BuildError
from build.rendering import family
from build.rendering.model_folder import write_model
from build.rendering.models import models_of
from build.rendering.repository import render
from build.runtimes import RUNTIMES
from build.sources.checkpoint import Checkpoint
from build.sources.files import sha256
from build.sources.obtain import obtain
from build.target import Target

REPOSITORY = ROOT / "model_repository"


@pytest.fixture(scope="session")
def entry() -> CatalogEntry:
    return catalog.load("minilm")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of its own that already holds the checkpoint."""
    shutil.copytree(ROOT / ".cache" / "checkpoints", tmp_path / "cache" / "checkpoints")
    return tmp_path / "cache"


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()}


def test_committed_configurations_are_what_the_builder_renders(entry: CatalogEntry) -> None:
    models = models_of(entry, obtain(entry, ROOT / ".cache" / "checkpoints"), Target())
    tracked = subprocess.check_output(["git", "ls-files", "model_repository"], cwd=ROOT, text=True).split()
    assert sorted(tracked) == sorted(f"model_repository/{m.config.name}/config.pbtxt" for m in models)
    for model in models:
        assert (REPOSITORY / model.config.name / "config.pbtxt").read_text() == render(model.config)


@pytest.mark.parametrize("runtime", [name for name, one in RUNTIMES.items() if "embed" in one.tasks])
@pytest.mark.parametrize("name", NAMES)
def test_configurations_are_strict(name: str, runtime: str) -> None:
    """Parsed back they are what was meant, and they leave Triton nothing to guess."""
    traits = RUNTIMES[runtime]
    if traits.packed_attention and name not in PACKED:
        with pytest.raises(BuildError, match="not written for torch: build it for openvino, onnxruntime or"):
            models_of(tiny_entry(name), Checkpoint(TINY / name), Target(runtime))
        return
    for model in models_of(tiny_entry(name), Checkpoint(TINY / name), Target(runtime)):
        config = text_format.Parse(render(model.config), ModelConfig())
        assert config == model.config
        assert config.max_batch_size > 0
        if config.platform == "ensemble":
            continue
        assert all(tensor.data_type and tensor.dims for tensor in (*config.input, *config.output))
        assert config.instance_group
        assert config.HasField("dynamic_batching")
        is_graph = model.write_graph is not None
        assert config.backend == (traits.backend if is_graph else "python")
        if is_graph:
            ragged = {tensor.name for tensor in config.input if tensor.allow_ragged_batch}
            assert ragged == {tensor.name for tensor in config.input}
            targets = [name for extra in config.batch_input for name in extra.target_name]
            assert targets == ["lengths"] + ["widest"] * traits.needs_width
            assert [sample.batch_size for sample in config.model_warmup] == [1, 1, 8]
            assert all(set(s.inputs) == {t.name for t in config.input} for s in config.model_warmup)


def test_a_second_build_does_nothing(tmp_path: Path, entry: CatalogEntry, cache: Path) -> None:
    repository = tmp_path / "repository"
    assert family.build(entry, Target(), repository, cache)
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*")}
    assert not family.build(entry, Target(), repository, cache)
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*")} == before


def test_the_command_says_that_there_is_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    assert capsys.readouterr().out == "minilm: up to date, nothing to do\n"


def test_builds_are_byte_identical(tmp_path: Path, entry: CatalogEntry, cache: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    family.build(entry, Target(), first, cache)
    family.build(entry, Target(), second, cache)
    assert files(first) == files(second)
    record = json.loads((first / "minilm" / "build.json").read_text())
    assert record["outputs"] == {name: h for name, h in files(first).items() if not name.endswith("build.json")}


def test_a_damaged_output_is_built_again(tmp_path: Path, entry: CatalogEntry, cache: Path) -> None:
    repository = tmp_path / "repository"
    family.build(entry, Target(), repository, cache)
    before = files(repository)
    (repository / "minilm-encoder" / "1" / "model.onnx").write_bytes(b"")
    assert family.build(entry, Target(), repository, cache)
    assert files(repository) == before


def test_what_a_family_no_longer_consists_of_goes(tmp_path: Path) -> None:
    """A Triton that loads everything would load it, too."""
    for runtime, heads in (("onnxruntime", 1), ("openvino", 0)):
        options = ["--runtime", runtime, "--repository", str(tmp_path)]
        assert command.main([str(TINY / "bert-cls"), *options]) == 0
        assert len(list(tmp_path.glob("*-pooling"))) == heads


def write_all(entry: CatalogEntry, checkpoint: Path, repository: Path) -> None:
    for model in models_of(entry, Checkpoint(checkpoint), Target()):
        write_model(model, repository / model.config.name)


def damage_truncate(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def damage_flip(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip])
def test_a_wrong_hash_is_refused(tmp_path: Path, entry: CatalogEntry, cache: Path, damage: object) -> None:
    assert callable(damage)
    repository = tmp_path / "repository"
    shutil.copytree(REPOSITORY, repository)
    (repository / "minilm" / "build.json").unlink()
    before = files(repository)
    damage(cache / "checkpoints" / "minilm")
    with pytest.raises(BuildError, match=r"model.safetensors has sha256 .* delete .* and build again"):
        family.build(entry, Target(), repository, cache)
    assert files(repository) == before


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", '{"model_type": "gpt2"}', "model_type 'gpt2'"),
        ("model.safetensors", None, "no model.safetensors"),
        ("model.safetensors", "nonsense", "not a readable safetensors file"),
        (
            "1_Pooling/config.json",
            '{"pooling_mode": "median"}',
            "asks for pooling by median; .* written for cls, max, mean",
        ),
        ("modules.json", '[{"type": "a.Transformer"}, {"type": "a.Dense"}]', "code of its own"),
        ("sentence_bert_config.json", '{"max_seq_length": 100}', "256 tokens were asked for, but .* 1 to 100"),
    ],
)
def test_a_checkpoint_that_cannot_be_built(
    tmp_path: Path, entry: CatalogEntry, cache: Path, file: str, content: str | None, words: str
) -> None:
    """Past the hashes, as for a checkpoint that the catalog does not know."""
    folder = cache / "checkpoints" / "minilm"
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(BuildError, match=words):
        write_all(entry, folder, tmp_path)


def cut(name: str, end: int) -> Callable[[Path], object]:
    """Damage: the file's last bytes are missing, as after a download that stopped."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:end])


def change(name: str, **fields: object) -> Callable[[Path], object]:
    """Damage: fields of a JSON file have other values."""
    return lambda folder: (folder / name).write_text(
        json.dumps(json.loads((folder / name).read_text()) | fields), encoding="utf-8"
    )


def lose(name: str) -> Callable[[Path], object]:
    """Damage: the file is not there."""
    return lambda folder: (folder / name).unlink()


def half_downloaded(folder: Path) -> None:
    """Damage: of two shards only the first has come."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"embed_tokens.weight": 1, "norm.weight": 2}
    shards = {name: f"model-0000{number}-of-00002.safetensors" for name, number in names.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def pickled(folder: Path) -> None:
    """Damage: the weights are a pickle."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGES = {
    "truncated weights": (cut("model.safetensors", -1000), "not a readable safetensors file"),
    "truncated tokenizer": (cut("tokenizer.json", -1000), "tokenizer.json is not valid JSON"),
    "truncated config": (cut("config.json", -10), "config.json is not valid JSON"),
    "no config": (lose("config.json"), "it has no config.json"),
    "no tokenizer": (lose("tokenizer.json"), "no tokenizer.json"),
    "half downloaded": (half_downloaded, "no model-00002-of-00002.safetensors"),
    "pickled": (pickled, "pytorch_model.bin is a pickle"),
    "another architecture": (change("config.json", model_type="gpt2"), "model_type 'gpt2'"),
    "another size": (
        change("config.json", hidden_size=96),
        "pools vectors of 48 values, but the encoder gives 96",
    ),
    "fewer layers": (
        change("config.json", num_hidden_layers=9, layer_types=None),
        "no tensor 'layers.3.input_layernorm.weight'",
    ),
    "scaled positions": (
        change("config.json", rope_parameters={"rope_type": "longrope"}),
        'rope_parameters.rope_type = "longrope"',
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_leaves_the_repository_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder, repository = tmp_path / "checkpoint", tmp_path / "repository"
    shutil.copytree(TINY / "qwen3-embedding", folder)
    assert command.main([str(folder), "--repository", str(repository)]) == 0
    before = files(repository)
    do, words = DAMAGES[damage]
    do(folder)
    capsys.readouterr()
    assert command.main([str(folder), "--repository", str(repository)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert files(repository) == before


def test_a_checkpoint_with_another_activation_is_refused(tmp_path: Path, entry: CatalogEntry, cache: Path) -> None:
    folder = cache / "checkpoints" / "minilm"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(BuildError, match='hidden_act = "relu"'):
        write_all(entry, folder, tmp_path)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("none", ""), ("qwen3-embeding-4b", "did you mean qwen3-embedding-4b or ")],
)
def test_an_unknown_name(name: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([name]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: no model {name!r} in the catalog: {meant}")
    assert said.endswith("build/catalog/README.md lists them\n")


def test_an_unwritable_repository() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "build.make", "--repository", "/proc/none"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write /proc/none")


def test_graphs_are_plain_onnx() -> None:
    for path in REPOSITORY.glob("*/1/model.onnx"):
        model = onnx.load(path, load_external_data=False)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]


@pytest.mark.parametrize(("runtime", "texts"), [("openvino", 64), ("onnxruntime", 4), ("tensorrt", 4)])
def test_batches_are_bounded_by_texts_as_wide_as_the_longest(runtime: str, texts: int) -> None:
    """Triton's own backends take whatever is merged at once; ours cuts it into micro-batches."""
    entry = replace(tiny_entry("bert-cls"), batching=Batching(texts=64, tokens=256))
    models = models_of(entry, Checkpoint(TINY / "bert-cls"), Target(runtime, "fp32"))
    assert {model.config.max_batch_size for model in models if model.config.backend == runtime} <= {texts}
    (encoder,) = (model.config for model in models if model.config.name == "bert-cls-encoder")
    assert encoder.max_batch_size == texts


@pytest.mark.parametrize(("runtime", "tensor"), [("onnxruntime", TYPE_BF16), ("tensorrt", TYPE_BF16)])
@pytest.mark.parametrize("name", ["bert-cls", "cross-encoder"])
def test_hidden_states_pass_in_the_precision_of_the_encoder(name: str, runtime: str, tensor: int) -> None:
    """Where the runtime carries it; what callers get is FP32."""
    parts = models_of(tiny_entry(name), Checkpoint(TINY / name), Target(runtime, "bf16"))
    configs = {part.config.name.rpartition("-")[2]: part.config for part in parts if part.write_graph}
    head = configs["pooling" if name == "bert-cls" else "scoring"]
    assert [output.data_type for output in configs["encoder"].output] == [tensor]
    assert [given.data_type for given in head.input if given.name == "last_hidden_state"] == [tensor]
    assert {output.data_type for output in head.output} == {TYPE_FP32}


def test_memory_follows_the_largest_tensor(tmp_path: Path) -> None:
    """A checkpoint of 2 GB, all zeros, in a file that takes no room on the disk.

    Its graphs are for an engine that is not here, so that none runs them at the end.
    """
    folder = tmp_path / "large"
    shutil.copytree(TINY / "qwen3-embedding", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 20, "vocab_size": 60000}
    sizes |= {"num_attention_heads": 16, "head_dim": 128}
    (folder / "config.json").write_text(json.dumps(config | sizes | {"layer_types": None}))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))
    shapes = qwen3_shapes(json.loads((folder / "config.json").read_text()))
    largest = write_zeros(folder / "model.safetensors", shapes)
    assert (folder / "model.safetensors").stat().st_size > 2e9

    options = ["--runtime", "tensorrt", "--precision", "bf16", "--repository", str(tmp_path / "repository")]
    # What the kernel tells of an ended child counts the parent's memory, too, where that is more.
    code = """
import pathlib, sys
from build.make import main
assert main(sys.argv[1:]) == 0
print(pathlib.Path("/proc/self/status").read_text())
"""
    told = subprocess.check_output([sys.executable, "-c", code, str(folder), *options], cwd=ROOT, text=True)
    shutil.rmtree(tmp_path / "repository")
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", told)
    assert int(peak) * 1024 < 3 * largest + 500e6


def qwen3_shapes(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (config["vocab_size"], hidden), "norm": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        attention = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        attention |= {"o_proj": (hidden, queries)}
        norms: dict[str, tuple[int, ...]] = {"q_norm": (head,), "k_norm": (head,)}
        shapes |= {f"layers.{i}.self_attn.{name}": shape for name, shape in (attention | norms).items()}
        mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        shapes |= {f"layers.{i}.mlp.{name}": shape for name, shape in mlp.items()}
        shapes |= {f"layers.{i}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """Writes a safetensors file of BF16 zeros; returns the bytes of its largest tensor."""
    sizes = [2 * math.prod(shape) for shape in shapes.values()]
    ends = list(itertools.accumulate(sizes))
    header = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [end - size, end]}
        for (name, shape), size, end in zip(shapes.items(), sizes, ends, strict=True)
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + ends[-1])
    return max(sizes)
