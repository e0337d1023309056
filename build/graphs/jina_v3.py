"""Jina Embeddings v3 (Sturua et al., 2024, arXiv:2409.10173) with one of its task adapters, on packed tokens.

Also what its code, jinaai/xlm-roberta-flash-implementation, makes of jina-colbert-v2 and jina-reranker-v2.

Input   input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.ragged`)
Output  last_hidden_state FP32 [T, H], zeros in slots without a token

XLM-RoBERTa with rotary positions or its own table of them. An adapter is a product of two thin matrices (LoRA:
Hu et al., 2021, arXiv:2106.09685) for each table and layer, which is added to them here. Names are those of the
published checkpoint, whose code is not run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from build.errors import BuildError
from build.graphs.bert import counted_positions
from build.graphs.blocks import attention, gelu, key_mask, rotary_angles, rotate, split_merged
from build.graphs.dimensions import Dimensions, split_evenly
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.parameters import Parameters
from build.graphs.ragged import last_hidden_state, ragged, ragged_inputs, with_unseen
from build.graphs.rope import Rotation, rope_theta
from build.sources.settings import Settings
from build.sources.weights import Weights

SAID = (
    *("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "type_vocab_size", "layer_norm_eps", "position_embedding_type"),
)
"""Keys that a configuration without adapters must have."""


@dataclass(frozen=True, kw_only=True)
class JinaV3(Dimensions):
    """The keys of a checkpoint's `config.json` that shape the graph; defaults are transformers' own.

    Those of the published checkpoint go by other names, where transformers has no adapters.
    """

    layers: int
    heads: int
    width: int
    """Of a head."""
    inner: int
    epsilon: float
    theta: float | None
    """Of rotary positions; None where there is a table of them."""
    rank: int
    scale: float
    """Of what an adapter adds."""

    @classmethod
    def of(cls, config: Settings) -> JinaV3:
        """Reads the configuration; raises BuildError on what this graph does not compute, naming the key."""
        return cls._read(config, "rotary", theta=20_000.0)

    @classmethod
    def of_flash(cls, config: Settings) -> JinaV3:
        """Reads that of the code without adapters, whose positions are of a table where it says `absolute`.

        It is published in two versions, whose defaults differ.
        """
        for key in SAID:
            if key not in config:
                raise BuildError(f"{config.path} has no {key}, and Jina's codes for it differ in what it is then")
        return cls._read(config, "rotary", "absolute", theta=10_000.0)

    @classmethod
    def _read(cls, config: Settings, *positions: str, theta: float) -> JinaV3:
        config.require("hidden_act", "gelu")
        config.require("position_embedding_type", *positions)
        config.require("truncate_dim", None)
        is_rotary = config.word("position_embedding_type", default=positions[0]) == "rotary"
        # As RoBERTa's, a table counts from the padding token's id on, and leaves that one out.
        first = 0 if is_rotary else config.integer("pad_token_id", default=1, least=0) + 1
        hidden_size = config.integer("hidden_size", default=1024)
        heads = config.integer("num_attention_heads", default=16)
        width = split_evenly(config, hidden_size, heads)
        config.require("head_dim", width)
        rank = config.integer("lora_rank", default=4)
        adapters = tuple(config.words("lora_adaptations", default=[]))
        config.require("load_trained_adapters", bool(adapters), default=False)
        return cls(
            hidden_size=hidden_size,
            vocab_size=config.integer("vocab_size", default=250002),
            positions=config.integer("max_position_embeddings", default=8194) - first,
            first_position=first,
            token_types=config.integer("type_vocab_size", default=1),
            adapters=adapters,
            layers=config.integer("num_hidden_layers", default=24),
            heads=heads,
            width=width,
            inner=config.integer("intermediate_size", default=4096),
            epsilon=config.number("layer_norm_eps", default=1e-5),
            theta=rope_theta(config, config.number("rotary_emb_base", default=theta)) if is_rotary else None,
            rank=rank,
            scale=config.number("lora_alpha", default=1) / rank,
        )


@dataclass(frozen=True)
class Adapted(Parameters):
    """A checkpoint's tensors with an adapter added to them, or without any."""

    jina: JinaV3

    def matrix(self, name: str, rows: int, columns: int) -> npt.NDArray[np.float32]:
        """The matrix [rows, columns] of a table or a linear layer.

        A table's adapter is A [rows, rank] B [rank, columns], a layer's is B [rows, rank] A [rank, columns].
        """
        if not self.jina.adapters:
            return self.weights.tensor(f"{name}.weight", rows, columns)
        stored, count, rank = f"{name}.parametrizations.weight", len(self.jina.adapters), self.jina.rank
        left, right = "AB" if name.startswith("embeddings.") else "BA"
        first = self.weights.tensor(f"{stored}.0.lora_{left}", count, rows, rank)
        second = self.weights.tensor(f"{stored}.0.lora_{right}", count, rank, columns)
        matrix = self.weights.tensor(f"{stored}.original", rows, columns)
        if self.jina.adapter is None:
            return matrix
        chosen = self.jina.adapters.index(self.jina.adapter)
        return np.asarray(matrix + first[chosen] @ second[chosen] * np.float32(self.jina.scale), np.float32)

    def linear(self, x: str, name: str, outputs: int, inputs: int, bias: bool = True) -> str:
        """x W^T + b: [..., inputs] -> [..., outputs]."""
        assert bias, "every layer has one"
        weight = self.g.weight(f"{name}.weight", self.matrix(name, outputs, inputs))
        return self.g.linear(
            x, weight, self.g.weight(f"{name}.bias", self.weights.tensor(f"{name}.bias", outputs))
        )


def write_jina_v3(g: OnnxGraph, jina: JinaV3, weights: Weights) -> None:
    """Writes the encoder into `g`, reading one layer at a time."""
    p, hidden, width, heads = Adapted(g, weights, jina), jina.hidden_size, jina.width, jina.heads
    r = with_unseen(g, ragged(g, *ragged_inputs(g)), jina.unseen_offset)
    mask = key_mask(g, r)
    angles = None if jina.theta is None else rotary_angles(g, r, Rotation.plain(jina.theta, width))

    # One segment per text, so its embedding is folded into every word.
    segment = p.matrix("embeddings.token_type_embeddings", jina.token_types, hidden)[0]
    vectors = p.matrix("embeddings.word_embeddings", jina.vocab_size, hidden) + segment
    words = g.weight("embeddings.word_embeddings.weight", vectors)
    x = g.op("Gather", words, r.token_ids)
    if angles is None:
        first = jina.first_position
        places = weights.tensor("embeddings.position_embeddings.weight", first + jina.positions, hidden)
        table = g.weight("embeddings.position_embeddings.weight", places[first - 1 :])
        x = g.op("Add", x, g.op("Gather", table, counted_positions(g, r, r.token_ids, first - 1)))
    x = p.layer_norm(x, "emb_ln", hidden, jina.epsilon)
    for i in range(jina.layers):
        layer = f"encoder.layers.{i}"
        q, k, v = split_merged(g, p.linear(x, f"{layer}.mixer.Wqkv", 3 * hidden, hidden), heads, width)
        if angles is not None:
            q, k = rotate(g, q, angles, width), rotate(g, k, angles, width)
        context = attention(g, q, k, v, r, mask, width**-0.5, heads, heads)
        projected = p.linear(context, f"{layer}.mixer.out_proj", hidden, hidden)
        x = p.layer_norm(g.op("Add", x, projected), f"{layer}.norm1", hidden, jina.epsilon)
        inner = gelu(g, p.linear(x, f"{layer}.mlp.fc1", jina.inner, hidden))
        x = g.op("Add", x, p.linear(inner, f"{layer}.mlp.fc2", hidden, jina.inner))
        x = p.layer_norm(x, f"{layer}.norm2", hidden, jina.epsilon)
    last_hidden_state(g, x, r, hidden)
