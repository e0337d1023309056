"""What config.json may say otherwise than a fixture's does: scaled positions, windows, what a token sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import REFERENCE, TINY, cosines
from engines import OnnxRuntime, OpenVino, requests, token_ids
from test_graphs import COSINE, answers, graphs, needs_opset_24
from tiny import VARIANTS, variant

from build.target import Target

EXPECTED = np.load(REFERENCE / "variants.npz")
RUNS = [(OpenVino, "openvino"), (OpenVino, "tensorrt")]
RUNS += [pytest.param(OnnxRuntime, "onnxruntime", marks=needs_opset_24)]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_another_model(name: str) -> None:
    plain = np.load(TINY / VARIANTS[name]["fixture"] / "expected.npz")["embeddings"][::4]
    assert cosines(EXPECTED[name], plain).min() < 0.99


@pytest.mark.parametrize(("engine", "runtime"), RUNS)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_gives_what_the_reference_gives(
    name: str, runtime: str, engine: type[OnnxRuntime] | type[OpenVino], tmp_path: Path
) -> None:
    """In FP32, which is how OpenVINO computes any graph."""
    fixture, target = VARIANTS[name]["fixture"], Target(runtime, "fp32")
    encoder, head = map(engine, graphs(fixture, target, tmp_path, variant(name, tmp_path / "changed")))
    for texts, batch in requests(token_ids(fixture)[::4]):
        found = answers(target, encoder, head, batch)["embeddings"]
        assert cosines(found, EXPECTED[name][texts]).min() >= COSINE["fp32"]
