"""Models that read documents, through Triton, as docling's clients of KServe v2 call them.

Skipped where their library is not installed, which `make test` does. Those with docling itself are skipped where
docling is not installed. With REQUIRE_DOCLING they fail there instead.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from conftest import REFERENCE, ROOT, Stack
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from build.graphs.documents import CDLA, LABELS
from build.make import main
from build.sources.files import PREPROCESSOR

MODELS = OCR, LAYOUT, HERON, PICTURES = "docling-ocr", "docling-layout-cdla", "heron", "pictures"
TINY_HERON = REFERENCE / "documents" / "heron"
PAGE = REFERENCE / "documents" / "page.png"
DOCLING = ROOT / ".venv-docling" / "bin" / "python"
HEADING, LINE = "A Report on Rivers", "All rivers run into the sea, yet the sea is not full, and so on."

if importlib.util.find_spec("rapidocr") is None and "REQUIRE_DOCLING" not in os.environ:
    pytest.skip("documents.lock is not installed", allow_module_level=True)


def page() -> npt.NDArray[np.uint8]:
    """[640, 640, 3], of text, a picture and a table."""
    from PIL import Image

    return np.asarray(Image.open(PAGE).convert("RGB"))


TOP = slice(20, 160)
"""Rows of the page with its heading and four lines of text."""


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that serves nothing else."""
    folder = tmp_path_factory.mktemp("documents")
    repository = folder / "models"
    write_classifier(folder / "pictures")
    checkpoints = [str(TINY_HERON), str(folder / "pictures")]
    assert main([OCR, LAYOUT, *checkpoints, "--repository", str(repository)]) == 0
    running = Stack(folder / "work", ["--repository", str(repository), "--preload", *MODELS]).start()
    yield running
    assert running.stop() == 0


def infer(stack: Stack, model: str, outputs: tuple[str, ...], **inputs: npt.NDArray[Any]) -> list[Any]:
    """The tensors that a model gives; it is asked over gRPC, as docling does by default."""
    tensors = []
    for name, array in inputs.items():
        dtype = "BYTES" if array.dtype == object else np_to_triton_dtype(array.dtype)
        tensors.append(InferInput(name, array.shape, dtype).set_data_from_numpy(array))
    with InferenceServerClient(f"127.0.0.1:{stack.ports['grpc']}") as client:
        result = client.infer(model, tensors, outputs=[InferRequestedOutput(name) for name in outputs])
    return [result.as_numpy(name) for name in outputs]


def read(stack: Stack, image: npt.NDArray[np.uint8], language: str | None = "english") -> list[Any]:
    """boxes, txts and scores of one page."""
    inputs: dict[str, Any] = {} if language is None else {"lang_type": np.array([[language]], object)}
    return infer(stack, OCR, ("boxes", "txts", "scores"), image=image[None], **inputs)


FINDS = ("labels", "boxes", "scores")


def scaled(*pages: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Pages as docling's preprocessor makes them."""
    return np.stack([image.transpose(2, 0, 1) / np.float32(255) for image in pages])


def layout(stack: Stack, *pages: npt.NDArray[np.uint8], size: tuple[int, int] = (640, 640)) -> list[Any]:
    """labels, boxes and scores of pages of that width and height."""
    sizes = np.array([size] * len(pages), np.int64)
    return infer(stack, LAYOUT, FINDS, images=scaled(*pages), orig_target_sizes=sizes)


def test_tensors_are_in_the_order_that_docling_takes_them_in(documents: Stack) -> None:
    def tensors(model: str) -> dict[str, list[Any]]:
        described: Mapping[str, Any] = documents.get("http", f"/v2/models/{model}").json()
        return {
            end: [(one["name"], one["datatype"], one["shape"]) for one in described[end]]
            for end in ("inputs", "outputs")
        }

    assert (
        tensors(LAYOUT)
        == tensors(HERON)
        == {
            "inputs": [("images", "FP32", [-1, 3, 640, 640]), ("orig_target_sizes", "INT64", [-1, 2])],
            "outputs": [
                ("labels", "INT64", [-1, -1]),
                ("boxes", "FP32", [-1, -1, 4]),
                ("scores", "FP32", [-1, -1]),
            ],
        }
    )
    assert tensors(OCR) == {
        "inputs": [("image", "UINT8", [1, -1, -1, 3]), ("lang_type", "BYTES", [1, 1])],
        "outputs": [("boxes", "FP32", [-1, 4, 2]), ("txts", "BYTES", [-1]), ("scores", "FP32", [-1])],
    }


def test_text_is_what_the_library_reads_with_the_same_weights(documents: Stack) -> None:
    from rapidocr import EngineType, RapidOCR

    weights = documents.work_folder.parent / "models" / f"{OCR}-reader" / "1"
    params: dict[str, Any] = {"Global.log_level": "critical"}
    for part in ("Det", "Cls", "Rec"):
        (path,) = weights.glob(f"*_{part.lower()}_*.onnx")
        params |= {f"{part}.engine_type": EngineType.OPENVINO, f"{part}.model_path": str(path)}
    image = page()[TOP]
    expected: Any = RapidOCR(params=params)(image)
    boxes, texts, scores = read(documents, image)
    found = [text.decode() for text in texts]
    assert found == list(expected.txts)
    assert found == [
        "A Report on Rivers",
        *["All rivers run into the sea, yet the sea is not full, and so on."] * 4,
    ]
    assert (boxes == np.asarray(expected.boxes, np.float32)).all()
    assert (scores == np.asarray(expected.scores, np.float32)).all()


def test_a_page_without_text_has_no_lines(documents: Stack) -> None:
    boxes, texts, scores = read(documents, np.full((90, 70, 3), 255, np.uint8), None)
    assert (boxes.shape, texts.shape, scores.shape) == ((0, 4, 2), (0,), (0,))


@pytest.mark.parametrize(
    ("shape", "language", "sentence"),
    [
        ((64, 64, 3), "arabic", r"text in 'arabic' is not read here; af, .*english, .* is"),
        ((0, 64, 3), "en", "an image of 64 x 0 pixels has nothing to read"),
        ((64, 64, 4), "en", r"unexpected shape for input 'image'.* got \[1,64,64,4]"),
    ],
)
def test_what_cannot_be_read_is_refused(
    documents: Stack, shape: tuple[int, ...], language: str, sentence: str
) -> None:
    with pytest.raises(InferenceServerException, match=sentence) as refused:
        read(documents, np.zeros(shape, np.uint8), language)
    assert "INVALID_ARGUMENT" in refused.value.status()


@pytest.mark.parametrize("language", ["EN-us", "German"])
def test_languages_have_codes_regions_and_names(documents: Stack, language: str) -> None:
    assert len(read(documents, np.full((40, 40, 3), 255, np.uint8), language)[0]) == 0


def test_layout_is_what_rapid_layout_finds(documents: Stack) -> None:
    """Its page is scaled as bytes and ours as numbers, which is a fraction of a grey and of a pixel."""
    names = ["text", "title", "figure", "figure_caption", "table", "table_caption"]
    names += ["header", "footer", "reference", "equation"]
    expected = sorted(json.loads((PAGE.with_name("layout.json")).read_text()), key=lambda find: -find["score"])
    labels, boxes, scores = (tensor[0] for tensor in layout(documents, page(), size=(1280, 1920)))
    count = int((scores > 0).sum())
    assert (scores[:-1] >= scores[1:]).all()
    assert [LABELS[label] for label in labels[:count]] == [CDLA[names.index(find["class"])] for find in expected]
    assert scores[:count] == pytest.approx([find["score"] for find in expected], abs=0.01)
    wanted = np.array([find["box"] for find in expected]) * [2, 3, 2, 3]
    assert boxes[:count] == pytest.approx(wanted, abs=3)


HERON_SIZES = np.array([[596, 842], [842, 596]], np.int64)
"""Those that the reference was asked for, with the page and its mirror image."""


def check_heron(labels: Any, boxes: Any, scores: Any) -> None:
    """Compares with transformers, whose finds of nearly equal scores may come in another order."""
    expected = np.load(TINY_HERON / "expected.npz")
    assert sorted(labels.ravel()) == sorted(expected["labels"].ravel())
    assert scores == pytest.approx(expected["scores"], abs=1e-5)
    for own, other in zip(boxes, expected["boxes"], strict=True):
        distances = np.abs(own[:, None] - other[None]).max(-1)
        assert max(distances.min(0).max(), distances.min(1).max()) < 0.01, "pixels"


def test_an_adopted_layout_model_finds_what_transformers_does(documents: Stack) -> None:
    images = scaled(page(), page()[:, ::-1])
    check_heron(*infer(documents, HERON, FINDS, images=images, orig_target_sizes=HERON_SIZES))


def test_a_layout_model_of_bytes_is_fed_bytes(tmp_path: Path) -> None:
    """As the newest export of docling-layout-heron, which scales pages by itself; docling still sends numbers."""
    import openvino

    model = onnx.load(TINY_HERON / "model.onnx")
    for node in model.graph.node:
        node.input[:] = ["numbers" if name == "images" else name for name in node.input]
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.initializer.append(numpy_helper.from_array(np.float32(255), "most"))
    model.graph.node.insert(0, helper.make_node("Div", ["floats", "most"], ["numbers"]))
    model.graph.node.insert(0, helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT))
    folder = tmp_path / "bytes"
    shutil.copytree(TINY_HERON, folder)
    settings = json.loads((folder / PREPROCESSOR).read_text()) | {"do_rescale": False}
    (folder / PREPROCESSOR).write_text(json.dumps(settings))
    onnx.save(model, folder / "model.onnx")
    assert main([str(folder), "--repository", str(tmp_path / "models")]) == 0
    path = tmp_path / "models" / "bytes-graph" / "1" / "model.onnx"
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    found = openvino.Core().compile_model(path, "CPU", settings)([scaled(page(), page()[:, ::-1]), HERON_SIZES])
    check_heron(*found.values())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"size": {"height": 800, "width": 800}}, "has size = .*800.*; the graph is written for .*640"),
        ({"do_normalize": True}, "has do_normalize = true"),
    ],
)
def test_a_layout_model_of_other_pages_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], sentence: str
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(TINY_HERON, folder)
    settings = json.loads((folder / PREPROCESSOR).read_text()) | change
    (folder / PREPROCESSOR).write_text(json.dumps(settings))
    assert main([str(folder), "--repository", str(tmp_path / "models")]) == 1
    assert re.search(sentence, capsys.readouterr().err)


def test_pages_have_the_same_layout_alone_and_together(documents: Stack) -> None:
    pages = [page(), page()[::-1], np.full((640, 640, 3), 255, np.uint8)]
    together = layout(documents, *pages)
    with ThreadPoolExecutor(3) as callers:
        alone = list(callers.map(lambda one: layout(documents, one), pages))
    for i, own in enumerate(alone):
        assert all((one[i] == other[0]).all() for one, other in zip(together, own, strict=True))
    assert not together[2][2].any()


COLOURS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, 3]], np.float32)


def write_classifier(folder: Path) -> None:
    """A classifier by mean colour, whose last pooling has its channels' width for a window, as docling's has."""
    folder.mkdir()
    names = ["red", "green", "blue", "none"]
    config = {"architectures": ["EfficientNetForImageClassification"], "model_type": "efficientnet"}
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32, "width": 32}}))
    nodes = [
        helper.make_node("AveragePool", ["input"], ["pooled"], kernel_shape=[320, 320], ceil_mode=1),
        helper.make_node("Flatten", ["pooled"], ["means"]),
        helper.make_node("Gemm", ["means", "weight"], ["output"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(COLOURS, "weight")],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), folder / "model.onnx")


def test_a_classifier_of_pictures_that_nothing_says_how_to_make(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    write_classifier(folder)
    model = onnx.load(folder / "model.onnx")
    (folder / PREPROCESSOR).unlink()
    assert main([str(folder), "--repository", str(tmp_path / "models")]) == 1
    assert f"the checkpoint has no {PREPROCESSOR}" in capsys.readouterr().err
    for dimension in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.dim_param = "side"
    onnx.save(model, folder / "model.onnx")
    assert main([str(folder), "--repository", str(tmp_path / "models")]) == 1
    assert "is no classifier of square pictures in colour, of a size that it says" in capsys.readouterr().err


def test_pictures_get_the_logits_of_their_model(documents: Stack) -> None:
    pixels = np.random.default_rng(0).random((3, 3, 32, 32), np.float32)
    (logits,) = infer(documents, PICTURES, ("logits",), pixel_values=pixels)
    assert logits == pytest.approx(pixels.mean((2, 3)) @ COLOURS.T, abs=1e-5)
    folder = documents.work_folder.parent / "models" / PICTURES / "artifacts"
    own = folder / "docling-project--DocumentFigureClassifier-v2.5" / "config.json"
    assert json.loads(own.read_text())["id2label"]["2"] == "blue"


def test_the_artifacts_of_docling_are_written(documents: Stack) -> None:
    models = documents.work_folder.parent / "models"
    folder = models / LAYOUT / "artifacts" / "docling-project--docling-layout-heron"
    names = json.loads((folder / "config.json").read_text())["id2label"]
    assert names == {str(i): name for i, name in enumerate(LABELS)}
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == {"height": 640, "width": 640}


def test_the_gateway_lists_them_and_has_no_route_for_them(documents: Stack) -> None:
    listed = documents.get("embed", "/models").json()["models"]
    assert {one["name"]: (one["task"], one["state"], one["pinned"]) for one in listed} == {
        OCR: ("ocr", "loaded", True),
        LAYOUT: ("layout", "loaded", True),
        HERON: ("layout", "loaded", True),
        PICTURES: ("picture", "loaded", True),
    }
    assert documents.get("embed", "/health").json() == {"status": "ready", "models": [*MODELS]}
    answer = documents.post("embed", "/embed", {"texts": ["a"], "model": OCR})
    assert answer.status == 404
    assert answer.json()["error"] == f"no model {OCR!r} for embed; this server has: none"


@pytest.fixture(scope="module")
def docling(documents: Stack) -> list[str]:
    """The command that converts a PDF with docling and this stack."""
    if not (DOCLING.parents[1] / "docling.lock").exists():
        if "REQUIRE_DOCLING" in os.environ:
            pytest.fail("`make .venv-docling/docling.lock` could not install docling")
        pytest.skip("`make .venv-docling/docling.lock` installs docling")
    artifacts = documents.work_folder.parent / "models" / LAYOUT / "artifacts"
    triton = f"localhost:{documents.ports['grpc']}"
    return [str(DOCLING), "-m", "tools.documents", "--triton", triton, "--artifacts", str(artifacts)]


def convert(command: list[str], *more: str) -> tuple[int, Any, str]:
    """The exit status, the document, and what is written to stderr."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout or "null"), done.stderr


def texts(document: Any) -> list[str]:
    return [text["text"] for text in document["texts"]]


@pytest.mark.timeout(600)
def test_docling_converts_a_scan(docling: list[str], tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "scan.pdf"
    Image.fromarray(page()[TOP]).resize((1280, 280)).save(path, resolution=144)
    status, document, errors = convert(docling, str(path), "--scan")
    assert status == 0, errors
    assert document["schema_name"] == "DoclingDocument"
    assert " ".join(texts(document)) == " ".join([HEADING, LINE, LINE, LINE, LINE])


@pytest.mark.timeout(600)
def test_docling_converts_a_pdf_of_text(docling: list[str], tmp_path: Path) -> None:
    """Its text comes from the file; a language that OCR refuses shows that nobody was asked for it."""
    path = tmp_path / "digital.pdf"
    path.write_bytes(pdf([HEADING, *[LINE] * 4]))
    status, document, errors = convert(docling, str(path), "--language", "none at all")
    assert status == 0, errors
    assert " ".join(texts(document)) == " ".join([HEADING, LINE, LINE, LINE, LINE])


def test_docling_is_told_what_is_missing(docling: list[str], tmp_path: Path) -> None:
    path = tmp_path / "any.pdf"
    path.write_bytes(pdf([HEADING]))
    status, document, errors = convert(docling, str(path), "--ocr", "none")
    assert (status, document) == (1, None)
    assert "has no model 'none': load it with `make serve MODEL=none`, or name another one\n" in errors
    status, document, errors = convert(docling, str(path), "--triton", "localhost:1")
    assert (status, document) == (1, None)
    assert (
        errors
        == "error: no Triton answers on localhost:1: run `make serve DOCUMENTS=1`, or name it with --triton\n"
    )


def pdf(lines: list[str]) -> bytes:
    """A PDF of one page with lines of text."""
    words = "".join(f"({line}) Tj 0 -16 Td " for line in lines)
    content = f"BT /F 12 Tf 72 700 Td {words}ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 4 0 R /Resources "
        "<< /Font << /F 5 0 R >> >> >>",
        f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    file, places = b"%PDF-1.4\n", []
    for i, one in enumerate(objects, 1):
        places.append(len(file))
        file += f"{i} 0 obj\n{one}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n{len(file)}\n%%EOF\n"
    return file + f"xref\n0 6\n0000000000 65535 f \n{table}{end}".encode()


def test_they_are_unloaded_and_loaded_again(documents: Stack) -> None:
    def act(action: str) -> Any:
        answer = documents.post("embed", f"/models/{LAYOUT}/{action}", b"")
        assert answer.status == 200, answer.body
        return answer.json()

    assert act("unpin")["pinned"] is False
    assert act("unload")["state"] == "absent"
    with pytest.raises(InferenceServerException, match="has no available versions"):
        layout(documents, page())
    loaded = act("load")
    assert (loaded["state"], loaded["bytes_are"]) == ("loaded", "measured")
    assert layout(documents, page())[2].max() > 0.5
