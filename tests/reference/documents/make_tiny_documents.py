"""Makes a tiny random layout model of docling's architecture, exported to ONNX as docling publishes its own.

It is an RT-DETR v2 that ends in labels, boxes and scores. Beside the graph lie the checkpoint's configuration
files, and in expected.npz what transformers' own class gives on page.png, upright and mirrored.

It is run by hand, in the environment of ../requirements.txt with onnx and Pillow.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection
from transformers.models.rt_detr.configuration_rt_detr_resnet import RTDetrResNetConfig

FOLDER = Path(__file__).parent
LABELS = [
    *("caption", "footnote", "formula", "list_item", "page_footer", "page_header", "picture", "section_header"),
    *("table", "text", "title", "document_index", "code", "checkbox_selected", "checkbox_unselected", "form"),
    "key_value_region",
]
SIZES = torch.tensor([[596, 842], [842, 596]])
"""Width and height of the two pages."""


def pages(side: int) -> torch.Tensor:
    """[2, 3, side, side] in 0..1: the page's upper left corner, upright and mirrored."""
    image = Image.open(FOLDER / "page.png").convert("RGB").crop((0, 0, side, side))
    upright = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
    return torch.from_numpy(np.stack([upright, upright[:, :, ::-1]]))


class Layout(torch.nn.Module):
    """RT-DETR with the last step of its authors' export: the best pairs of query and class, in pixels."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, orig_target_sizes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.model(pixel_values=images)
        middle, size = found.pred_boxes[..., :2], found.pred_boxes[..., 2:]
        boxes = torch.cat([middle - size / 2, middle + size / 2], -1)
        boxes = boxes * orig_target_sizes.repeat(1, 2)[:, None].to(boxes.dtype)
        queries, classes = found.logits.shape[1:]
        scores, order = torch.topk(found.logits.sigmoid().flatten(1), queries, dim=-1)
        place = (order // classes)[..., None].expand(-1, -1, 4)
        return order % classes, torch.gather(boxes, 1, place), scores


def spread(model: torch.nn.Module) -> None:
    """Widens random weights, so that results tell inputs and places apart."""
    for name, parameter in model.named_parameters():
        if "class_embed" in name and name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.5 if "input_proj" in name else 0.15)


def save(name: str, model: torch.nn.Module, inputs: dict[str, torch.Tensor], outputs: list[str]) -> None:
    """Writes the graph, and what it is to give."""
    folder = FOLDER / name
    with torch.no_grad():
        given = model(*inputs.values())
    given = given if isinstance(given, tuple) else (given,)
    arrays = {key: value.numpy() for key, value in zip(outputs, given, strict=True)}
    np.savez_compressed(folder / "expected.npz", **arrays)
    torch.onnx.export(
        model,
        tuple(inputs.values()),
        folder / "model.onnx",
        input_names=list(inputs),
        output_names=outputs,
        dynamic_axes={key: {0: "N"} for key in (*inputs, *outputs)},
        opset_version=17,
        dynamo=False,
    )


def heron() -> None:
    """The layout model."""
    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 32, 32, 32],
        depths=[1, 1, 1, 1],
        layer_type="bottleneck",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrV2Config(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[32, 32, 32],
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=32,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        num_queries=40,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    model = RTDetrV2ForObjectDetection(config).eval()
    spread(model)
    write_json("heron/config.json", model.config.to_dict() | {"architectures": ["RTDetrV2ForObjectDetection"]})
    size = {"height": 640, "width": 640}
    write_json(
        "heron/preprocessor_config.json",
        {
            "do_normalize": False,
            "do_pad": False,
            "do_rescale": True,
            "do_resize": True,
            "image_processor_type": "RTDetrImageProcessor",
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": size,
        },
    )
    inputs = {"images": pages(640), "orig_target_sizes": SIZES}
    save("heron", Layout(model), inputs, ["labels", "boxes", "scores"])


def write_json(name: str, content: object) -> None:
    path = FOLDER / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1, sort_keys=True, default=str) + "\n")


if __name__ == "__main__":
    heron()
