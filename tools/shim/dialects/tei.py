"""Text Embeddings Inference: `/embed` with `inputs`, `/rerank` with `texts`, `/embed_sparse`, `/` for all.

Also `/embed_all`, `/predict`, `/similarity`, `/tokenize` and `/info`.

It has no field for a model, so the first of each task answers, but where nobody else speaks a route: `model` is an
addition there. As with its own `--auto-truncate`, which is on unless
told otherwise, texts are cut to the window where a call does not say.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal, TypedDict, get_args

import numpy as np
import orjson

from build.tasks import Task
from tools.shim.body import MAX_ITEMS, Lenient, Positive, Query, Text, Vector
from tools.shim.dialects.lengths import normalised
from tools.shim.dialects.openai import refuse_token_ids
from tools.shim.errors import GatewayError, bad_request
from tools.shim.gateway import Gateway
from tools.shim.routes import Get, Post, Reply

Side = Literal["Left", "left", "Right", "right"]

ERROR_TYPES = {
    "not_ready": "Unhealthy",
    "overloaded": "Overloaded",
    "unauthorized": "Unauthorized",
    "timeout": "Backend",
    "upstream": "Backend",
    "internal": "Backend",
}
"""The gateway's word -> TEI's; every other is about the body."""


@dataclass(frozen=True)
class EmbedCall(Lenient):
    """Texts to embed behind the prompt called `prompt_name`."""

    inputs: Text | list[Text]
    truncate: bool | None = None
    truncation_direction: Side | None = None
    prompt_name: str | None = None
    normalize: bool | None = None
    dimensions: Positive | None = None

    @staticmethod
    def check(content: dict[str, Any]) -> None:
        """Refuses token ids in their own words."""
        refuse_token_ids(content, "inputs")


@dataclass(frozen=True)
class RaggedCall(Lenient):
    """Texts to embed behind the prompt called `prompt_name`; without a model, by the first that answers so."""

    inputs: Text | list[Text]
    truncate: bool | None = None
    truncation_direction: Side | None = None
    prompt_name: str | None = None
    model: str | None = None

    @staticmethod
    def check(content: dict[str, Any]) -> None:
        """Refuses token ids in their own words."""
        refuse_token_ids(content, "inputs")


class Weight(TypedDict):
    """One place of a sparse vector, and what is there."""

    index: int
    value: float


@dataclass(frozen=True)
class RerankCall(Lenient):
    """Texts to order by how well they answer the query; raw scores are logits. `top_n` is litellm's addition."""

    query: Query
    texts: list[str]
    truncate: bool | None = None
    truncation_direction: Side | None = None
    raw_scores: bool = False
    return_text: bool = False
    top_n: Positive | None = None


class Rank(TypedDict):
    """One text, by its place in the call; `text` where it was asked for."""

    index: int
    score: float


@dataclass(frozen=True)
class PredictCall(Lenient):
    """A text, a pair of texts, or a list of lists of which each holds a text or a pair; raw scores are logits."""

    inputs: Text | list[Text | list[str]]
    truncate: bool | None = None
    truncation_direction: Side | None = None
    raw_scores: bool = False
    model: str | None = None

    @staticmethod
    def check(content: dict[str, Any]) -> None:
        """Refuses token ids in their own words."""
        refuse_token_ids(content, "inputs")


@dataclass(frozen=True)
class RootCall(Lenient):
    """The body of `/embed`, or where no model embeds that of `/embed_sparse`, or else of `/predict`."""

    inputs: Text | list[Text | list[str]]
    truncate: bool | None = None
    truncation_direction: Side | None = None
    prompt_name: str | None = None
    normalize: bool | None = None
    dimensions: Positive | None = None
    raw_scores: bool = False

    @staticmethod
    def check(content: dict[str, Any]) -> None:
        """Refuses token ids in their own words."""
        refuse_token_ids(content, "inputs")


class Prediction(TypedDict):
    """One label, and how much speaks for it."""

    score: float
    label: str


@dataclass(frozen=True)
class TokenizeCall(Lenient):
    """Texts to tokenize as the model reads them, cut to its window."""

    inputs: Text | list[Text]
    add_special_tokens: bool = True
    prompt_name: str | None = None


class Token(TypedDict):
    """One token, and its characters in prompt and text; special tokens have none there."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


@dataclass(frozen=True)
class Sentences(Lenient):
    """A text, and others to compare with it."""

    source_sentence: Text
    sentences: list[Text]


@dataclass(frozen=True)
class SimilarityParameters(Lenient):
    """As of `/embed`."""

    truncate: bool | None = None
    truncation_direction: Side | None = None
    prompt_name: str | None = None


@dataclass(frozen=True)
class SimilarityCall(Lenient):
    """Texts to compare with one."""

    inputs: Sentences
    parameters: SimilarityParameters | None = None


class Info(TypedDict):
    """The model that answers `/embed`, or where none does `/embed_sparse`, `/rerank` or `/predict`."""

    model_id: str
    model_sha: str | None
    model_dtype: str | None
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str


async def embed(gateway: Gateway, call: EmbedCall) -> Reply:
    """Embeds texts."""
    check_direction(call.truncation_direction)
    result = await gateway.embed(
        as_list(call.inputs),
        prompt=call.prompt_name,
        dimensions=call.dimensions,
        truncate=call.truncate is not False,
    )
    return Reply(normalised(result, call.normalize is not False, "normalize"), result)


async def embed_sparse(gateway: Gateway, call: RaggedCall) -> Reply:
    """Embeds texts as what is not zero of their vectors, by index."""
    check_direction(call.truncation_direction)
    result = await gateway.embed_sparse(
        as_list(call.inputs), call.model, prompt=call.prompt_name, truncate=call.truncate is not False
    )
    rows = zip(result.tensors["indices"][:, 0], result.tensors["values"][:, 0], strict=True)
    weights = [
        [{"index": i, "value": value} for i, value in zip(indices.tolist(), values, strict=True)]
        for indices, values in rows
    ]
    return Reply(weights, result)


async def embed_all(gateway: Gateway, call: RaggedCall) -> Reply:
    """Embeds each token of each text."""
    check_direction(call.truncation_direction)
    result = await gateway.embed_all(
        as_list(call.inputs), call.model, prompt=call.prompt_name, truncate=call.truncate is not False
    )
    return Reply(list(result.tensors["token_embeddings"][:, 0]), result)


async def similarity(gateway: Gateway, call: SimilarityCall) -> Reply:
    """Compares texts by the cosines of their embeddings."""
    parameters = call.parameters or SimilarityParameters()
    check_direction(parameters.truncation_direction)
    result = await gateway.embed(
        [call.inputs.source_sentence, *call.inputs.sentences],
        prompt=parameters.prompt_name,
        truncate=parameters.truncate is not False,
    )
    source, *others = normalised(result, True, "normalize")
    return Reply([float(other @ source) for other in others], result)


async def rerank(gateway: Gateway, call: RerankCall) -> Reply:
    """Orders texts."""
    check_direction(call.truncation_direction)
    result = await gateway.rerank(call.query, call.texts, truncate=call.truncate is not False)
    scores = result.logits if call.raw_scores else result.shares
    ranks: list[dict[str, Any]] = [
        {"index": int(i), "score": float(scores[i])} for i in result.order[: call.top_n]
    ]
    if call.return_text:
        for rank in ranks:
            rank["text"] = call.texts[rank["index"]]
    return Reply(ranks, result)


async def predict(gateway: Gateway, call: PredictCall) -> Reply:
    """Classifies texts or pairs of texts: of each, all labels by descending score."""
    check_direction(call.truncation_direction)
    is_batch, inputs = sequences(call.inputs)
    result = await gateway.classify(inputs, call.model, truncate=call.truncate is not False)
    labels = result.model.labels
    predictions: list[list[Prediction]] = [
        [{"score": float(row[i]), "label": labels[i]} for i in np.argsort(-row, kind="stable")]
        for row in result.tensors["logits" if call.raw_scores else "probabilities"]
    ]
    return Reply(predictions if is_batch else predictions[0], result)


async def root(gateway: Gateway, call: RootCall) -> Reply:
    """Does what the first of the tasks is, of those that models are served for."""
    tasks = {model.task for model in await gateway.upstream.models()}
    cut, side, prompt = call.truncate, call.truncation_direction, call.prompt_name
    if "classify" in tasks and not {"embed", "embed_sparse"} & tasks:
        return await predict(gateway, PredictCall(call.inputs, cut, side, call.raw_scores))
    inputs = [call.inputs] if isinstance(call.inputs, str) else call.inputs
    texts = [one for one in inputs if isinstance(one, str)]
    if len(texts) < len(inputs):
        raise bad_request("inputs has lists of texts, which only a classifier takes: send a list of texts")
    if "embed" in tasks or "embed_sparse" not in tasks:
        return await embed(gateway, EmbedCall(texts, cut, side, prompt, call.normalize, call.dimensions))
    return await embed_sparse(gateway, RaggedCall(texts, cut, side, prompt))


async def tokenize(gateway: Gateway, call: TokenizeCall) -> Reply:
    """Tokenizes texts."""
    result = await gateway.tokenize(as_list(call.inputs), call.prompt_name)
    texts: list[list[Token]] = [orjson.loads(tokens) for tokens in result.tensors["tokens"][:, 0]]
    if not call.add_special_tokens:
        texts = [[token for token in tokens if not token["special"]] for tokens in texts]
    return Reply(texts, result)


async def info(gateway: Gateway) -> Reply:
    """Describes the model."""
    served = await gateway.upstream.models()
    model = min(served, key=lambda model: get_args(Task).index(model.task))
    if model.task == "classify":
        labels = {str(i): label for i, label in enumerate(model.labels)}
        kind: dict[str, Any] = {
            "classifier": {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}
        }
    elif model.task == "rerank":
        kind = {"reranker": {"id2label": {"0": "score"}, "label2id": {"score": 0}}}
    else:
        kind = {"embedding": {"pooling": model.facts.get("pooling")}}
    content: Info = {
        "model_id": model.facts.get("source", model.name),
        "model_sha": model.facts.get("revision"),
        "model_dtype": DTYPES.get(model.facts.get("precision", "")),
        "model_type": kind,
        "max_concurrent_requests": gateway.lanes.short.requests,
        "max_input_length": model.max_tokens,
        "max_batch_tokens": model.max_batch_size * model.max_tokens,
        "max_batch_requests": model.max_batch_size,
        "max_client_batch_size": MAX_ITEMS,
        "auto_truncate": True,
        "tokenization_workers": 1,
        "version": "1.9",
    }
    return Reply(content)


DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def as_list(inputs: str | list[str]) -> list[str]:
    """One text as a list of one."""
    return [inputs] if isinstance(inputs, str) else inputs


def sequences(inputs: str | list[str | list[str]]) -> tuple[bool, list[tuple[str, ...]]]:
    """Whether it is a batch, and the texts and pairs in it; raises GatewayError 400 for others."""
    if isinstance(inputs, str):
        return False, [(inputs,)]
    texts = [one for one in inputs if isinstance(one, str)]
    lists = [one for one in inputs if isinstance(one, list)]
    if texts and lists:
        raise bad_request("inputs has texts beside lists: a batch is [[text], [text, text], ...]")
    for i, one in enumerate(lists or [texts]):
        where = f"inputs[{i}]" if lists else "inputs"
        if len(one) > 2:
            raise bad_request(
                f"{where} has {len(one)} texts: send one or a pair, or a batch [[text], [text], ...]"
            )
        if not one[0]:
            raise bad_request(f"{where} is empty: every text needs at least one character")
    return bool(lists), [tuple(one) for one in lists or [texts]]


def check_direction(side: str | None) -> None:
    """Refuses to cut at the front."""
    if side in ("Left", "left"):
        raise bad_request("texts are cut at their end only: leave truncation_direction out or set it to Right")


def error(error: GatewayError) -> tuple[int, object]:
    """TEI's error object; its habit for a text over the window is 413."""
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE if error.type == "too_long" else error.status
    return status, {"error": error.message, "error_type": ERROR_TYPES.get(error.type, "Validation")}


ROOT_GIVES: Any = list[Vector] | list[list[Weight]] | list[Prediction] | list[list[Prediction]]

ROUTES: list[Post | Get] = [
    Post("/embed", EmbedCall, embed, list[Vector], key="inputs", error=error),
    Post("/", RootCall, root, ROOT_GIVES, key="inputs", error=error),
    *(Post(path, RerankCall, rerank, list[Rank], key="texts", error=error) for path in ("/rerank", "/")),
    Post("/embed_all", RaggedCall, embed_all, list[list[Vector]], key="inputs", error=error),
    Post("/embed_sparse", RaggedCall, embed_sparse, list[list[Weight]], key="inputs", error=error),
    Post("/predict", PredictCall, predict, list[Prediction] | list[list[Prediction]], key="inputs", error=error),
    Post("/similarity", SimilarityCall, similarity, list[float], error=error),
    Post("/tokenize", TokenizeCall, tokenize, list[list[Token]], error=error),
    Get("/info", info, Info, error=error),
]
