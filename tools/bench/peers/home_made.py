"""The usual home-made gateway: tokenize, pad to the longest, call an encoder in Triton, pool in numpy.

It runs in an environment of its own, under uvicorn, with CHECKPOINT and TRITON (host:port) in the environment.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoTokenizer
from tritonclient.grpc import InferenceServerClient, InferInput

MAX_TOKENS = 256

app = FastAPI()
tokenizer = AutoTokenizer.from_pretrained(os.environ["CHECKPOINT"])
triton = InferenceServerClient(os.environ["TRITON"])


class Call(BaseModel):  # type: ignore[misc]
    """The body of /embed."""

    texts: list[str]


@app.post("/embed")  # type: ignore[untyped-decorator]
def embed(call: Call) -> dict[str, Any]:
    """One padded batch of all texts of the call."""
    encoded = tokenizer(call.texts, padding="longest", truncation=True, max_length=MAX_TOKENS, return_tensors="np")
    inputs = []
    for name in ("input_ids", "attention_mask"):
        array = encoded[name].astype(np.int64)
        inputs.append(InferInput(name, array.shape, "INT64").set_data_from_numpy(array))
    states = triton.infer("encoder", inputs).as_numpy("last_hidden_state")
    mask = encoded["attention_mask"][..., None]
    means = (states * mask).sum(axis=1) / mask.sum(axis=1)
    return {"embeddings": (means / np.linalg.norm(means, axis=1, keepdims=True)).tolist()}
