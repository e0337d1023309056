"""Reranking heads: what turns the encoded query and passage into a score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from onnx import TensorProto
from tokenizers import Tokenizer

from build.errors import BuildError
from build.graphs.blocks import gelu
from build.graphs.dimensions import Dimensions
from build.graphs.modules import ACTIVATIONS
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.parameters import Parameters
from build.graphs.pooling import POOL, first_token, last_but, last_token
from build.graphs.ragged import state_inputs
from build.sources.checkpoint import Checkpoint
from build.sources.weights import Weights


@dataclass(frozen=True)
class Head:
    """What a logit is computed from."""

    p: Parameters
    encoder: Dimensions
    tokenizer: Tokenizer
    states: str
    """[T, H]."""
    input_ids: str
    """[T]."""
    lengths: str
    """[B]."""
    labels: int = 1
    """How many a classifier gives."""

    def first(self) -> str:
        """[B, H]: the state of each item's first token."""
        return first_token(self.p.g, self.states, self.input_ids, self.lengths)

    def last(self) -> str:
        """[B, H]: the state of each item's last token."""
        return last_token(self.p.g, self.states, self.input_ids, self.lengths)

    def pooled(self) -> str:
        """[B, H]: each item's states as the configuration pools them."""
        return POOL[self.encoder.head_pooling](self.p.g, self.states, self.input_ids, self.lengths)


Logit: TypeAlias = Callable[[Head], str]
"""-> [B, labels]."""


@dataclass(frozen=True)
class Reranker:
    """What makes a score of an encoder's states."""

    logit: Logit
    template: dict[str, Any] | None = None
    """The text around query and passage, where they are not read as a pair."""
    is_worded: bool = False
    """True for decoders: a classifier of one label reads a pair in the words of a template, one of several labels
    without."""

    @property
    def is_instructed(self) -> bool:
        """Whether a call may say what it is that a passage is judged by."""
        return self.template is not None and not {"instruction", "instructed"}.isdisjoint(self.template)


def score_activation(checkpoint: Checkpoint) -> str:
    """What sentence-transformers' CrossEncoder makes a score of a logit with, one of ACTIVATIONS.

    Raises BuildError for one that is not written. What names no class of torch it does not run, nor do we.
    """
    config = checkpoint.config
    said = [config.find("sbert_ce_default_activation_function")]
    if (own := config.inner("sentence_transformers")) is not None:
        own.skip(["version"])
        if "activation_fn" in own or own.is_null("activation_fn"):
            said = [own.find("activation_fn")]
    if checkpoint.is_cross_encoder:
        said.insert(0, checkpoint.library.find("activation_fn"))
    for name in map(str, said):
        library, _, kind = name.rpartition(".")
        if not name.startswith("torch."):
            continue
        if not f"{library}.".startswith("torch.nn.") or kind not in ACTIVATIONS:
            raise BuildError(
                f"{checkpoint.folder} makes scores of logits with {name}; scores are written for torch.nn's "
                f"{', '.join(ACTIVATIONS)}"
            )
        return kind
    return "Sigmoid"


def write_scoring(
    g: OnnxGraph, encoder: Dimensions, weights: Weights, tokenizer: Tokenizer, logit: Logit, activation: str
) -> None:
    """Scores each pair by one logit over its tokens.

    Input   last_hidden_state FP32 [T * H], input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.pooling`)
    Output  logit FP32 [B, 1]; score FP32 [B, 1] = activation(logit), of ACTIVATIONS
    """
    value = logit(Head(Parameters(g, weights), encoder, tokenizer, *state_inputs(g, encoder.hidden_size)))
    write_scores(g, value, activation)


PROBABILITIES: dict[str, Callable[[OnnxGraph, str], str]] = {
    "single_label_classification": lambda g, x: g.op("Softmax", x, axis=1),
    "multi_label_classification": lambda g, x: g.op("Sigmoid", x),
}
"""`problem_type` of `config.json` -> what transformers' pipeline makes of the logits of a text."""


def write_classifying(
    g: OnnxGraph,
    encoder: Dimensions,
    weights: Weights,
    tokenizer: Tokenizer,
    logit: Logit,
    labels: int,
    problem: str,
) -> None:
    """Gives each text or pair as many numbers as there are labels.

    Input   last_hidden_state FP32 [T * H], input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.pooling`)
    Output  logits FP32 [B, labels]; probabilities FP32 [B, labels], one of PROBABILITIES
    """
    inputs = state_inputs(g, encoder.hidden_size)
    value = logit(Head(Parameters(g, weights), encoder, tokenizer, *inputs, labels=labels))
    g.output("probabilities", PROBABILITIES[problem](g, value), TensorProto.FLOAT, ["batch", labels])
    g.output("logits", value, TensorProto.FLOAT, ["batch", labels])


def write_scores(g: OnnxGraph, logit: str, activation: str) -> None:
    """Both outputs of `logit` [B, 1]."""
    g.output("score", ACTIVATIONS[activation](g, logit), TensorProto.FLOAT, ["batch", 1])
    g.output("logit", logit, TensorProto.FLOAT, ["batch", 1])


def bert_logit(head: Head) -> str:
    """BERT's pooler and a classifier over the first token: w tanh(W h + b) + c."""
    return _two_layers(head, "pooler.dense", "classifier")


def roberta_logit(head: Head) -> str:
    """RoBERTa's classification head over the first token: w tanh(W h + b) + c."""
    return _two_layers(head, "classifier.dense", "classifier.out_proj")


def distilbert_logit(head: Head) -> str:
    """DistilBERT's classifier over the first token: w max(W h + b, 0) + c."""
    return _two_layers(head, "pre_classifier", "classifier", "Relu")


def electra_logit(head: Head) -> str:
    """ELECTRA's classification head of one label over the first token: w gelu(W h + b) + c."""
    return _two_layers(head, "classifier.dense", "classifier.out_proj", "Gelu")


def deberta_logit(head: Head) -> str:
    """DeBERTa's pooler and a classifier of one label over the first token: w gelu(W h + b) + c."""
    return _two_layers(head, "pooler.dense", "classifier", "Gelu")


def modernbert_logit(head: Head) -> str:
    """ModernBERT's prediction head and a classifier over the pooled tokens: w norm(gelu(W h)) + c."""
    hidden = head.encoder.hidden_size
    inner = gelu(head.p.g, head.p.linear(head.pooled(), "head.dense", hidden, hidden, bias=False))
    normed = head.p.layer_norm(inner, "head.norm", hidden, head.encoder.head_epsilon, bias=False)
    return head.p.linear(normed, "classifier", head.labels, hidden)


def last_token_logit(head: Head) -> str:
    """A decoder's classifier over the last token but those for padding, which a text may end with: w h."""
    padding = head.encoder.head_padding
    last = (
        head.last() if padding is None else last_but(head.p.g, padding, head.states, head.input_ids, head.lengths)
    )
    return head.p.linear(last, "score", head.labels, head.encoder.hidden_size, bias=False)


def pooled_logit(head: Head) -> str:
    """A classifier of one label over the pooled tokens of a decoder, by its temperature: w h / t."""
    weight = head.p.weights.tensor("score.weight", 1, head.encoder.hidden_size) / head.encoder.head_temperature
    return head.p.g.linear(head.pooled(), head.p.g.weight("score.weight", weight))


def _two_layers(head: Head, first: str, second: str, activation: str = "Tanh") -> str:
    hidden = head.encoder.hidden_size
    inner = head.p.g.op(activation, head.p.linear(head.first(), first, hidden, hidden))
    return head.p.linear(inner, second, head.labels, hidden)


def asked_logit(head: Head, yes: str, no: str) -> str:
    """The language model's logit of the token `yes` over `no` after the last token.

    The softmax over these two is the sigmoid of their difference, so two rows of the head are all that is kept.
    """
    true, false = (head.tokenizer.token_to_id(word) for word in (yes, no))
    if true is None or false is None:
        raise BuildError(
            f"tokenizer.json has no single token for {yes!r} and {no!r}, which the model is asked for"
        )
    return _logit_of(head, true, false)


def logit_score(checkpoint: Checkpoint, path: str) -> Logit:
    """What sentence-transformers' LogitScore in the folder `path` asks for: one token's logit, less another's."""
    config = checkpoint.settings(checkpoint.folder / path / "config.json")
    config.require("module_input_name", "causal_logits")
    true = config.integer("true_token_id", least=0)
    false = config.integer("false_token_id", least=0) if "false_token_id" in config else None
    return lambda head: _logit_of(head, true, false)


def _logit_of(head: Head, true: int, false: int | None) -> str:
    """A language model's logit of a token after the last one, less that of another."""
    size = head.encoder.vocab_size
    if (last := max(true, false or 0)) >= size:
        raise BuildError(f"the score is of token {last}, but the language model knows {size}")
    name = "embed_tokens.weight" if head.encoder.tied else "lm_head.weight"
    rows = head.p.weights.tensor(name, size, head.encoder.hidden_size)
    row = rows[true] if false is None else rows[true] - rows[false]
    return head.p.g.linear(head.last(), head.p.g.weight("yes_minus_no", row[None]))


def write_cosine_scoring(g: OnnxGraph, dimensions: int) -> None:
    """Scores a passage by the cosine of its embedding with the query's (a bi-encoder).

    Input   query_embeddings, passage_embeddings FP32 [B, D], both of unit length;
            query_token_count, passage_token_count INT32 [B, 1]; query_truncated, passage_truncated BOOL [B, 1]
    Output  logit FP32 [B, 1], the cosine, -1..1; score FP32 [B, 1] = (1 + logit) / 2, 0..1;
            token_count INT32 [B, 1], the sum; truncated BOOL [B, 1], whether either text was cut
    """

    def pair(name: str, dtype: int, width: int) -> tuple[str, str]:
        return (
            g.input(f"query_{name}", dtype, ["batch", width]),
            g.input(f"passage_{name}", dtype, ["batch", width]),
        )

    query, passage = pair("embeddings", TensorProto.FLOAT, dimensions)
    counts = pair("token_count", TensorProto.INT32, 1)
    truncated = pair("truncated", TensorProto.BOOL, 1)

    products = g.op("Mul", query, passage)
    cosine = g.op("ReduceSum", products, g.constant([1], np.int64), keepdims=1)
    # Rounding may carry the cosine of a text with itself past 1.
    logit = g.op("Clip", cosine, g.constant(-1, np.float32), g.constant(1, np.float32))
    half = g.constant(0.5, np.float32)
    g.output("score", g.op("Add", g.op("Mul", logit, half), half), TensorProto.FLOAT, ["batch", 1])
    g.output("logit", logit, TensorProto.FLOAT, ["batch", 1])
    g.output("token_count", g.op("Add", *counts), TensorProto.INT32, ["batch", 1])
    g.output("truncated", g.op("Or", *truncated), TensorProto.BOOL, ["batch", 1])
