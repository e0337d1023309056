"""A checkpoint's encoder as transformers has it, padded and with an attention mask, as ONNX.

It runs in an environment of its own: `export.py CHECKPOINT model.onnx`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AutoModel


class Encoder(torch.nn.Module):  # type: ignore[misc]
    """input_ids, attention_mask [batch, width] -> last_hidden_state [batch, width, hidden]."""

    def __init__(self, checkpoint: str) -> None:
        super().__init__()
        self.model = AutoModel.from_pretrained(checkpoint, attn_implementation="eager").eval()

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        """As transformers computes it."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def main() -> None:
    """Traces and writes."""
    checkpoint, path = sys.argv[1:]
    sample = torch.ones((2, 8), dtype=torch.int64)
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "batch", 1: "width"} for name in [*names, "last_hidden_state"]}
    torch.onnx.export(
        Encoder(checkpoint),
        (sample, sample),
        path,
        input_names=names,
        output_names=["last_hidden_state"],
        dynamic_axes=axes,
        dynamo=False,
    )


if __name__ == "__main__":
    main()
