"""Export tiny checkpoints of ../tiny to ONNX in the shapes that exported graphs are met in.

It writes a folder per checkpoint beside it, with the graph alone: configuration, tokenizer and what the model must
answer are those of the checkpoint. It needs torch, onnx, onnxscript, transformers and sentence-transformers, of
which nothing else in this repository may need any but onnx. To run it:

    python tests/reference/onnx/make_onnx.py [NAME ...]

    bert-cls            last_hidden_state and pooler_output; opset 11, weights in the file
    xlm-roberta         FP16; token_embeddings and sentence_embedding; opset 14, weights and constants in two files
    qwen3-embedding     position_ids and an empty cache in, the cache out; opset 17
    nomic-bert          sentence_embedding alone; INT32, from torch's newer exporter, opset 18
    bert-cross-encoder  logits; from torch's newer exporter, weights in a file that is named as ours are
    bert-cls-buffers    bert-cls from torch's newer exporter, a table of position ids among the weights
    bert-cls-fixed      bert-cls for one text of 7 tokens and no other
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
import transformers as hf
from onnx import external_data_helper
from sentence_transformers import SentenceTransformer

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "tiny"
BATCH, SEQUENCE = "batch_size", "sequence_length"


class Graph(torch.nn.Module):
    """Takes tensors by position, as the exporters ask for."""

    def __init__(self, model: torch.nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.compute = model, forward

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.compute(self.model, *tensors)


def example(inputs: list[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    ids = torch.randint(10, 500, (2, 7), dtype=dtype, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    known["position_ids"] = torch.arange(7, dtype=dtype).expand(2, 7).contiguous()
    return {name: known[name] for name in inputs}


def old_exporter(path: Path, graph: Graph, feeds: dict[str, Any], outputs: list[str], opset: int) -> None:
    """TorchScript's, which optimum and most published graphs come from."""
    axes = {name: {0: BATCH, 1: SEQUENCE} for name in feeds}
    for name in feeds:
        if name.startswith("past"):
            axes[name] = {0: BATCH, 2: "past_sequence_length"}
    for name in outputs:
        axes[name] = (
            {0: BATCH} if name in ("sentence_embedding", "pooler_output", "logits") else {0: BATCH, 1: SEQUENCE}
        )
        if name.startswith("present"):
            axes[name] = {0: BATCH, 2: "total_sequence_length"}
    torch.onnx.export(
        graph,
        tuple(feeds.values()),
        path,
        dynamo=False,
        input_names=list(feeds),
        output_names=outputs,
        dynamic_axes=axes,
        opset_version=opset,
    )


def new_exporter(
    path: Path, graph: Graph, feeds: dict[str, Any], outputs: list[str], external: bool, fixed: bool = False
) -> None:
    dims = None if fixed else {0: torch.export.Dim(BATCH), 1: torch.export.Dim(SEQUENCE)}
    torch.onnx.export(
        graph,
        tuple(feeds.values()),
        path,
        dynamo=True,
        input_names=list(feeds),
        output_names=outputs,
        dynamic_shapes=None if fixed else (tuple(dims for _ in feeds),),
        opset_version=18,
        external_data=external,
        verbose=False,
    )


def without_notes(path: Path) -> None:
    """Drops where in which file on this disk each node came from."""
    model = onnx.load(path, load_external_data=False)
    model.ClearField("metadata_props")
    for graph in (model.graph, *model.functions):
        graph.ClearField("metadata_props")
        for part in (*graph.node, *graph.value_info):
            part.ClearField("doc_string")
            part.ClearField("metadata_props")
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.ClearField("metadata_props")
    path.write_bytes(model.SerializeToString(deterministic=True))


def split_weights(path: Path) -> None:
    """Puts the weights, and constants of nodes, into two files beside the model by turns."""
    model = onnx.load(path)
    files = ["model.onnx_data", "embeddings.weight"]
    external_data_helper.convert_model_to_external_data(model, size_threshold=64, convert_attribute=True)
    names = iter(files * 1000)
    for tensor in external_data_helper._get_all_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            external_data_helper.set_external_data(tensor, location=next(names))
    onnx.save(model, path)


def transformer(name: str, attention: str = "sdpa") -> Any:
    kind = hf.AutoModelForSequenceClassification if name.endswith("cross-encoder") else hf.AutoModel
    return kind.from_pretrained(TINY / name, dtype=torch.float32, attn_implementation=attention).eval()


def whole(name: str, dtype: torch.dtype) -> Any:
    model = SentenceTransformer(
        str(TINY / name), device="cpu", local_files_only=True, model_kwargs={"dtype": dtype}
    )
    return model.eval()


def bert_cls(path: Path) -> None:
    def forward(model: Any, *tensors: torch.Tensor) -> Any:
        return tuple(model(**dict(zip(feeds, tensors, strict=True)))[:2])

    feeds = example(["input_ids", "attention_mask", "token_type_ids"], torch.int64)
    # The fused attention came with opset 14.
    graph = Graph(transformer("bert-cls", attention="eager"), forward)
    old_exporter(path, graph, feeds, ["last_hidden_state", "pooler_output"], 11)


def xlm_roberta(path: Path) -> None:
    def forward(model: Any, *tensors: torch.Tensor) -> Any:
        features = model(dict(zip(feeds, tensors, strict=True)))
        return features["token_embeddings"], features["sentence_embedding"]

    feeds = example(["input_ids", "attention_mask"], torch.int64)
    graph = Graph(whole("xlm-roberta", torch.float16), forward)
    old_exporter(path, graph, feeds, ["token_embeddings", "sentence_embedding"], 14)
    split_weights(path)


def qwen3_embedding(path: Path) -> None:
    model = transformer("qwen3-embedding")
    layers = model.config.num_hidden_layers

    def forward(model: Any, ids: Any, mask: Any, positions: Any, *past: torch.Tensor) -> Any:
        cache = hf.DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return out.last_hidden_state, *present

    feeds = example(["input_ids", "attention_mask", "position_ids"], torch.int64)
    feeds["attention_mask"] = torch.ones(2, 10, dtype=torch.int64)
    feeds["position_ids"] = feeds["position_ids"] + 3
    names = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    feeds |= {f"past_key_values.{name}": torch.randn(2, heads, 3, width) for name in names}
    outputs = ["last_hidden_state", *(f"present.{name}" for name in names)]
    old_exporter(path, Graph(model, forward), feeds, outputs, 17)


def nomic_bert(path: Path) -> None:
    def forward(model: Any, *tensors: torch.Tensor) -> Any:
        return model(dict(zip(feeds, tensors, strict=True)))["sentence_embedding"]

    feeds = example(["input_ids", "attention_mask"], torch.int32)
    new_exporter(path, Graph(whole("nomic-bert", torch.float32), forward), feeds, ["sentence_embedding"], False)


def bert_cross_encoder(path: Path) -> None:
    def forward(model: Any, *tensors: torch.Tensor) -> Any:
        return model(**dict(zip(feeds, tensors, strict=True))).logits

    feeds = example(["input_ids", "attention_mask", "token_type_ids"], torch.int64)
    new_exporter(path, Graph(transformer("bert-cross-encoder"), forward), feeds, ["logits"], True)


def bert_cls_buffers(path: Path) -> None:
    def forward(model: Any, *tensors: torch.Tensor) -> Any:
        return model(**dict(zip(feeds, tensors, strict=True))).last_hidden_state

    feeds = example(["input_ids", "attention_mask", "token_type_ids"], torch.int64)
    model = transformer("bert-cls")
    # Longer than the checkpoint's own, as those of published models are: it is cut to the text's length.
    model.embeddings.register_buffer("position_ids", torch.arange(512).expand(1, -1).contiguous(), persistent=True)
    new_exporter(path, Graph(model, forward), feeds, ["last_hidden_state"], False)


def bert_cls_fixed(path: Path) -> None:
    def forward(model: Any, *tensors: torch.Tensor) -> Any:
        return model(**dict(zip(feeds, tensors, strict=True))).last_hidden_state

    feeds = example(["input_ids", "attention_mask", "token_type_ids"], torch.int64)
    feeds = {name: tensor[:1] for name, tensor in feeds.items()}
    new_exporter(path, Graph(transformer("bert-cls"), forward), feeds, ["last_hidden_state"], False, fixed=True)


MAKERS = (bert_cls, xlm_roberta, qwen3_embedding, nomic_bert, bert_cross_encoder, bert_cls_buffers, bert_cls_fixed)


def main() -> None:
    torch.set_num_threads(1)
    makers = {make.__name__.replace("_", "-"): make for make in MAKERS}
    for name in sys.argv[1:] or makers:
        make, folder = makers[name], HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        path = folder / "onnx" / "model.onnx" if make is xlm_roberta else folder / "model.onnx"
        path.parent.mkdir(parents=True)
        make(path)
        without_notes(path)


if __name__ == "__main__":
    main()
