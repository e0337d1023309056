"""TensorRT plans: all that surrounds TensorRT, and where its CPU-capable sibling is installed the compiler too."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_rtx_bindings
from conftest import ROOT, TINY
from tiny import build_tiny
from tritonclient.grpc.model_config_pb2 import ModelConfig

from build import make
from build.config import read_config
from build.errors import BuildError
from build.plans import __main__ as command
from build.plans.engine import CalibrationTexts, Profile, calibration_ids, compile_graph, timing_cache, unsupported
from build.plans.plan import Machine, Stamp, mismatch, planned_models, problems
from tools import check_plans, tritonserver

FAMILIES = ["bert-cls", "bert-cross-encoder", "gemma3", "nomic-bert", "qwen3-embedding", "qwen3-reranker"]
HOPPER = Machine("NVIDIA H100 80GB HBM3", "9.0", "11.1.0.106", "unknown")


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Families whose graphs are written for TensorRT; no plans."""
    folder = tmp_path_factory.mktemp("tensorrt") / "repository"
    options = ["--runtime", "tensorrt", "--precision", "bf16", "--repository", str(folder)]
    build_tiny(FAMILIES, *options)
    return folder


@pytest.fixture
def version(repository: Path, tmp_path: Path) -> Path:
    """A version folder whose plan fits HOPPER."""
    (tmp_path / "model.onnx").write_bytes(b"graph")
    (tmp_path / "model.onnx.data").write_bytes(b"weights")
    (tmp_path / "model.plan").write_bytes(b"plan")
    model = replace(planned_models(repository, "bert-cls")[0], version=tmp_path)
    Stamp.of(model, HOPPER, "none").write(model.plan)
    return tmp_path


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts an nvidia-smi that knows the given GPUs first on PATH."""

    def install(*lines: str, status: int = 0) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        printed = "".join(f"echo '{line}'\n" for line in lines)
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{printed}exit {status}\n")
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.fixture
def hopper(gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this machine look like HOPPER."""
    gpus("NVIDIA H100 80GB HBM3, 9.0", "NVIDIA H100 80GB HBM3, 9.0")
    monkeypatch.setenv("TRT_VERSION", "11.1.0.106+cuda13.3")


def test_shapes_cover_what_triton_may_batch() -> None:
    inputs = {"input_ids": (-1,), "lengths": (-1,), "widest": (-1,), "last_hidden_state": (-1,), "scores": (-1, 3)}
    assert Profile(tokens=6400, texts=64, longest=200).shapes(inputs, hidden_size=10) == {
        "input_ids": ((1,), (6400,), (6400,)),
        "lengths": ((1,), (64,), (64,)),
        "widest": ((1,), (100,), (200,)),
        "last_hidden_state": ((10,), (64000,), (64000,)),
        "scores": ((1, 3), (64, 3), (64, 3)),
    }


def test_every_batch_has_a_profile_with_room_for_it() -> None:
    """By Triton's rule: of those whose tokens are enough, the one for the nearest number of tokens."""
    model = ModelConfig(max_batch_size=16)
    model.instance_group.add(profile=["0", "1", "2", "3"])
    tokenizer = ModelConfig()
    tokenizer.parameters["max_tokens"].string_value = "8192"
    profiles = Profile.all_of(model, tokenizer)
    assert [profile.tokens for profile in profiles] == [512, 2048, 8192, 131072]
    for lengths in ([1], [512], [32] * 16, [2047, 1], [3000], [8192], [1] * 15 + [8192], [8192] * 16):
        fitting = [profile for profile in profiles if sum(lengths) <= profile.tokens]
        taken = min(fitting, key=lambda profile: abs(profile.tokens - sum(lengths)))
        assert len(lengths) <= taken.texts
        assert max(lengths) <= taken.longest
    # A head without ragged inputs, whose shapes do not vary with tokens.
    del model.instance_group[0].profile[:]
    assert [profile.texts for profile in Profile.all_of(model, tokenizer)] == [16]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_input_has_its_limits(repository: Path, name: str) -> None:
    models = planned_models(repository, name)
    assert models[0].config.name == f"{name}-encoder"
    tokenizer = read_config(repository, f"{name}-tokenizer")
    for model in models:
        profiles = Profile.all_of(model.config, tokenizer)
        assert len(profiles) == len(model.config.instance_group[0].profile)
        profile = profiles[-1]
        assert profile.texts == model.config.max_batch_size
        assert str(profile.longest) == tokenizer.parameters["max_tokens"].string_value
        graph = onnx.load(model.version / "model.onnx", load_external_data=False).graph
        inputs = {i.name: tuple(d.dim_value or -1 for d in i.type.tensor_type.shape.dim) for i in graph.input}
        for input_name, shapes in profile.shapes(inputs, 48).items():
            for lower, upper in pairwise(shapes):
                assert len(lower) == len(inputs[input_name])
                assert all(0 < low <= high for low, high in zip(lower, upper, strict=True))


@pytest.mark.parametrize(
    ("mode", "capability", "tensorrt", "words"),
    [
        ("fp8", "8.6", "11.1.0.106", "compute capability 8.6, fp8 needs 8.9"),
        ("nvfp4", "9.0", "11.1.0.106", "compute capability 9.0, nvfp4 needs 10.0"),
        ("fp8", "8.9", "9.3.0.1", "TensorRT 9.3.0.1 is too old for fp8"),
        # The tests' environment has no ModelOpt.
        ("fp8", "12.0", "10.13.3.9", "pip install 'nvidia-modelopt"),
        ("nvfp4", "10.0", "11.1.0.106", "pip install 'nvidia-modelopt"),
    ],
)
def test_what_cannot_be_quantized(mode: str, capability: str, tensorrt: str, words: str) -> None:
    reason = unsupported(mode, Machine("NVIDIA", capability, tensorrt, "unknown"))
    assert reason is not None
    assert words in reason


def test_timings_are_kept_by_gpu_and_version(tmp_path: Path) -> None:
    assert timing_cache(tmp_path, HOPPER) == tmp_path / "tensorrt" / "nvidia-h100-80gb-hbm3-9.0-11.1.0.106.timing"


def test_a_plan_that_fits(version: Path) -> None:
    assert mismatch(version, HOPPER) is None
    # An image that does not know its digest is not held against it: the versions say enough.
    assert mismatch(version, replace(HOPPER, image="sha256:a")) is None


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("gpu", "NVIDIA L4", "was built for NVIDIA H100 80GB HBM3 .*, this is NVIDIA L4"),
        ("compute_capability", "8.9", r"capability 9.0\), this is NVIDIA H100 80GB HBM3 \(8.9\)"),
        ("tensorrt", "10.16.1.11", "was built by TensorRT 11.1.0.106, this is TensorRT 10.16.1.11"),
    ],
)
def test_a_plan_of_another_machine(version: Path, field: str, value: str, words: str) -> None:
    other = replace(HOPPER, **{field: value})
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(mismatch(version, other))


def test_a_plan_of_another_image(version: Path) -> None:
    stamp = json.loads((version / "model.plan.json").read_text())
    stamp["machine"]["image"] = "sha256:a"
    (version / "model.plan.json").write_text(json.dumps(stamp))
    assert mismatch(version, HOPPER) is None
    reason = mismatch(version, replace(HOPPER, image="sha256:b"))
    assert reason is not None
    assert reason.endswith("was built in image sha256:a, this is image sha256:b")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.plan", None, "model.plan has not been built"),
        ("model.plan", b"plam", "is damaged"),
        ("model.plan.json", None, "no readable stamp model.plan.json"),
        ("model.plan.json", b"{", "no readable stamp model.plan.json"),
        ("model.plan.json", b'{"machine": {}}', "no readable stamp model.plan.json"),
        ("model.onnx", b"another", "was built from another graph"),
        ("model.onnx.data", b"others", "was built from another graph"),
        ("model.onnx.data", None, "was built from another graph"),
    ],
)
def test_a_plan_that_is_stale_or_broken(version: Path, file: str, content: bytes | None, words: str) -> None:
    (version / file).unlink()
    if content is not None:
        (version / file).write_bytes(content)
    reason = mismatch(version, HOPPER)
    assert reason is not None
    assert words in reason


@pytest.mark.usefixtures("hopper")
def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Machine.here() == HOPPER
    monkeypatch.setenv("TRITON_IMAGE_DIGEST", "sha256:a")
    assert Machine.here() == replace(HOPPER, image="sha256:a")
    monkeypatch.delenv("TRT_VERSION")
    with pytest.raises(BuildError, match="no TensorRT: run this in NVIDIA's tritonserver image"):
        Machine.here()


def test_a_machine_without_the_gpu_it_needs(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpus("NVIDIA H100 80GB HBM3, 9.0", "NVIDIA L4, 8.9")
    with pytest.raises(BuildError, match=r"several kinds \(NVIDIA H100 80GB HBM3, 9.0; NVIDIA L4, 8.9\)"):
        Machine.here()
    gpus("No devices were found", status=6)
    with pytest.raises(BuildError, match="finds no GPU: No devices were found"):
        Machine.here()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="there is no nvidia-smi"):
        Machine.here()


@pytest.mark.usefixtures("hopper")
def test_missing_plans_are_refused(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_plans.main(["gemma3", "--repository", str(repository)]) == 1
    lines = capsys.readouterr().err.splitlines()
    paths = [repository / f"gemma3-{step}" / "1" / "model.plan" for step in ("encoder", "pooling")]
    advice = "has not been built: run `python -m build.plans gemma3` on this machine, in this image"
    assert lines == [f"error: {path} {advice}" for path in paths]


@pytest.mark.usefixtures("hopper")
def test_a_family_without_a_plan_takes_no_other_along(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In NVIDIA's image: tritonserver is started with the others, and not at all where there are none."""
    started: list[list[str]] = []
    monkeypatch.setattr("os.execvpe", lambda _, command, __: started.append(command) or 0)
    for part in repository.glob("gemma3*"):
        shutil.copytree(part, tmp_path / part.name)
    assert make.main([str(TINY / "bert-cls"), "--name", "plain", "--repository", str(tmp_path)]) == 0
    places = ["--repository", str(tmp_path), "--work-folder", str(tmp_path)]
    assert tritonserver.main(["--models", "gemma3", "plain", *places]) == 0
    (command,) = started
    assert [word for word in command if word.startswith("--load-model")] == ["--load-model=plain"]
    assert "gemma3-encoder/1/model.plan has not been built" in capsys.readouterr().err
    assert tritonserver.main(["--models", "gemma3", *places]) == 1
    assert len(started) == 1


def test_families_of_other_runtimes_need_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_plans.main(["minilm", "minilm-rerank", "--repository", str(ROOT / "model_repository")]) == 0


def test_unknown_families(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_plans.main(["none", "--repository", str(tmp_path)]) == 1
    assert command.main(["none", "--repository", str(tmp_path)]) == 1
    sentence = f"error: no model 'none' in {tmp_path}: build it with `python -m build.make`\n"
    assert capsys.readouterr().err == 2 * sentence


def test_a_family_of_another_runtime(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["minilm", "--repository", str(ROOT / "model_repository")]) == 1
    assert "no step of minilm runs on TensorRT" in capsys.readouterr().err


@pytest.mark.usefixtures("hopper")
def test_without_the_tensorrt_package(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gemma3", "--repository", str(repository)]) == 1
    assert "TensorRT's Python package cannot be imported" in capsys.readouterr().err
    assert not list(repository.rglob("model.plan*"))


@pytest.mark.usefixtures("hopper")
def test_plans_that_fit_are_left_alone(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = planned_models(repository, "nomic-bert")
    for model in models:
        model.plan.write_bytes(b"plan")
        Stamp.of(model, HOPPER, "none").write(model.plan)
    assert list(problems(repository, ["nomic-bert"])) == []
    assert command.main(["nomic-bert", "--repository", str(repository)]) == 0
    names = [f"nomic-bert-{step}" for step in ("encoder", "pooling")]
    assert capsys.readouterr().out == "".join(f"{name}: up to date, nothing to do\n" for name in names)
    for model in models:
        model.plan.unlink()
        model.stamp.unlink()


def test_a_gpu_that_cannot_quantize_keeps_the_precision(
    repository: Path,
    gpus: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpus("NVIDIA A100-SXM4-80GB, 8.0")
    monkeypatch.setenv("TRT_VERSION", "11.1.0.106")
    options = ["--quantize", "fp8", "--calibration", "none.txt", "--repository", str(repository)]
    assert command.main(["gemma3", *options]) == 1  # for want of TensorRT
    assert capsys.readouterr().out.splitlines()[0] == (
        "not quantized to fp8, the graph's own precision is kept: "
        "NVIDIA A100-SXM4-80GB has compute capability 8.0, fp8 needs 8.9"
    )


def test_only_encoders_are_quantized(repository: Path) -> None:
    encoder, pooling = planned_models(repository, "gemma3")
    assert [command.wanted(model, "fp8") for model in (encoder, pooling)] == ["fp8", "none"]
    assert command.wanted(encoder, None) == "none"


def test_quantizing_needs_texts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["gemma3", "--quantize", "fp8"])
    assert "--quantize and --calibration go together" in capsys.readouterr().err


def test_calibration_texts_come_in_batches(repository: Path, tmp_path: Path) -> None:
    tokenizer = repository / "bert-cls-tokenizer" / "1" / "tokenizer.json"
    (tmp_path / "texts.txt").write_text("one\n\ntwo words\n" + "long " * 100)
    ids = calibration_ids(tmp_path / "texts.txt", tokenizer, Profile(8, 2, 20))
    assert [len(text) for text in ids][-1] == 20
    reader = CalibrationTexts([[1, 2], [3, 4, 5], [6], [7] * 9, [8]], Profile(8, 2, 20))
    batches = [reader.get_first(), *iter(reader.get_next, None)]
    assert [batch["lengths"].tolist() for batch in batches] == [[2, 3], [2, 3], [1], [9], [1]]
    assert batches[0]["input_ids"].tolist() == [1, 2, 3, 4, 5]
    assert batches[0]["widest"].shape == (3,)
    assert all(array.dtype == np.int32 for batch in batches for array in batch.values())
    assert reader.get_next() is None
    reader.rewind()
    assert reader.get_next() is not None


def test_no_calibration_texts(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"cannot read the calibration texts in .*: No such file"):
        calibration_ids(tmp_path / "none.txt", tmp_path, Profile(1, 1, 1))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(BuildError, match="holds no calibration texts"):
        calibration_ids(tmp_path / "empty.txt", tmp_path, Profile(1, 1, 1))


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_compile(repository: Path, tmp_path: Path, name: str) -> None:
    """By TensorRT-RTX, which has the same parser and builder interface and compiles without a GPU."""
    for model in planned_models(repository, name):
        profiles = Profile.all_of(model.config, read_config(repository, f"{name}-tokenizer"))
        hidden_size = json.loads((TINY / name / "config.json").read_text())["hidden_size"]
        graph, timings = model.version / "model.onnx", tmp_path / "timings"
        compiled = compile_graph(tensorrt_rtx_bindings, graph, profiles, hidden_size, 1 << 30, timings)
        assert len(compiled) > 100_000


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_a_graph_that_tensorrt_cannot_read(tmp_path: Path) -> None:
    graph = ROOT / "model_repository" / "minilm-encoder" / "1" / "model.onnx"
    with pytest.raises(BuildError, match=r"TensorRT .* cannot read .*model.onnx: NonZero NonZero_\d+: "):
        compile_graph(tensorrt_rtx_bindings, graph, [Profile(1, 1, 1)], 1, 1 << 30, tmp_path / "t")
