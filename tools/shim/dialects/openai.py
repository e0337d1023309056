"""OpenAI's embeddings and models, with the fields that NVIDIA NIM, Jina and vLLM add to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

from build.tasks import Task
from tools.shim.body import Positive, Text, Vector
from tools.shim.dialects.encodings import Encoding, encoded
from tools.shim.dialects.lengths import check_tokens, normalised
from tools.shim.errors import GatewayError, bad_request
from tools.shim.gateway import Gateway
from tools.shim.residency.loader import Residency
from tools.shim.residency.tracked import ModelStatus
from tools.shim.routes import Get, Post, Reply
from tools.shim.served_model import ServedModel

PROMPTS = {
    "passage": "document",
    "search_query": "query",
    "search_document": "document",
    "retrieval.query": "query",
    "retrieval.passage": "document",
}
"""`input_type` or `task` -> prompt name, where they differ."""

TEXT_ALONE = "this server's models read text only"

SEND_TEXT = "send text (langchain's OpenAIEmbeddings does so with check_embedding_ctx_length=False)"


@dataclass(frozen=True)
class TextInput:
    """A text as Jina also takes it."""

    text: Text
    image: Annotated[None, TEXT_ALONE] = None
    pdf: Annotated[None, TEXT_ALONE] = None


@dataclass(frozen=True)
class EmbeddingsCall:
    """Text to embed; `input_type`, or Jina's `task`, names the prompt to put before it.

    The fields from `embedding_type` on are Jina's, those from `truncate_prompt_tokens` on vLLM's.
    """

    input: Text | list[Text | TextInput]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    user: str | None = None
    input_type: str | None = None
    truncate: Annotated[Literal["NONE", "END"], "texts are cut at their end only"] | bool | None = None
    modality: Annotated[Literal["text"], TEXT_ALONE] | list[Annotated[Literal["text"], TEXT_ALONE]] | None = None
    embedding_type: Encoding | None = None
    task: str | None = None
    normalized: bool | None = None
    late_chunking: Annotated[Literal[False], "every text is embedded by itself"] | None = None
    return_multivector: Annotated[Literal[False], "a text gets one vector"] | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Annotated[Literal["right"], "texts are cut at their end only"] | None = None
    add_special_tokens: (
        Annotated[Literal[True], "models are given the tokens that they were trained with"] | None
    ) = None
    normalize: bool | None = None
    use_activation: bool | None = None
    embed_dtype: Annotated[Literal["float32"], "vectors are sent as they are computed"] | None = None
    endianness: Annotated[Literal["native", "little"], "base64 holds little-endian float32"] | None = None
    request_id: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    messages: Annotated[None, "send the texts as input"] = None
    mm_processor_kwargs: Annotated[None, TEXT_ALONE] = None

    @staticmethod
    def check(content: dict[str, Any]) -> None:
        """Refuses token ids in their own words."""
        refuse_token_ids(content, "input", SEND_TEXT)


def refuse_token_ids(content: dict[str, Any], field: str, advice: str = "send text") -> None:
    """Raises GatewayError 400 where a field of a body holds token ids instead of text."""
    first = content.get(field)
    while isinstance(first, list) and first:
        first = first[0]
    if isinstance(first, int):
        raise bad_request(f"{field} holds token ids, whose meaning differs from model to model: {advice}")


class Embedding(TypedDict):
    """Numbers, or base64 of little-endian float32; whole ones where int8, uint8 or bits were asked for."""

    object: Literal["embedding"]
    index: int
    embedding: Vector | str


class Usage(TypedDict):
    """Tokens of all texts, prompts and special tokens included."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    """One embedding for each text, in order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Model(TypedDict):
    """A served model: OpenAI's fields, and what decides how it can be used."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    task: Task
    dimensions: int | None
    minimum_dimensions: int | None
    max_tokens: int
    pooling: str | None
    prompts: list[str]
    precision: str | None
    """As it was built."""
    computes_in: str | None
    """What its encoder has chosen where it was loaded, such as bf16 on a CPU that has it. Null until then, and
    where there is no choice but `precision`."""
    source: str | None
    revision: str | None
    graph: str | None
    """sha256 of graphs, weights, tokenizer, prompts and window, where the gateway reads the repository."""
    ignored: str | None
    """What the build passed over of the checkpoint, because it was told to."""
    residency: ModelStatus | None
    """Where models are loaded as they are called."""


class Models(TypedDict):
    """What is served."""

    object: Literal["list"]
    data: list[Model]


async def embeddings(gateway: Gateway, call: EmbeddingsCall) -> Reply:
    """Embeds texts."""
    inputs = [call.input] if isinstance(call.input, str) else call.input
    texts = [one if isinstance(one, str) else one.text for one in inputs]
    kind = call.input_type or call.task
    prompt = PROMPTS.get(kind, kind) if kind else None
    cut = call.truncate not in ("NONE", False)
    result = await gateway.embed(texts, call.model, prompt=prompt, dimensions=call.dimensions, truncate=cut)
    check_tokens(result, call.truncate_prompt_tokens, "truncate_prompt_tokens")
    rows = result.tensors["embeddings"]
    for field in ("normalized", "normalize", "use_activation"):
        if (wanted := getattr(call, field)) is not None:
            rows = normalised(result, wanted, field)
    vectors = encoded(rows, encoding_of(call), result.model.name)
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    usage = {"prompt_tokens": result.tokens, "total_tokens": result.tokens}
    return Reply({"object": "list", "data": data, "model": result.model.name, "usage": usage}, result)


def encoding_of(call: EmbeddingsCall) -> Encoding:
    """What OpenAI's field and that of NIM and Jina ask for together; GatewayError 400 if that is not one thing."""
    if call.encoding_format != "base64":
        return call.embedding_type or "float"
    if call.embedding_type not in (None, "float", "base64"):
        raise bad_request(
            f"embedding_type {call.embedding_type!r} comes as a list: send it with encoding_format 'float', since "
            "'base64' holds float32"
        )
    return "base64"


async def models(gateway: Gateway) -> Reply:
    """Lists what is served."""
    served = await gateway.upstream.models()
    return Reply({"object": "list", "data": [describe(model, gateway.upstream.residency) for model in served]})


async def model(gateway: Gateway, model: str) -> Reply:
    """Describes one model, by its name, an alias or its checkpoint's source."""
    return Reply(describe(await gateway.upstream.named(model), gateway.upstream.residency))


def describe(model: ServedModel, residency: Residency | None) -> Model:
    """A model as the list has it, and what of it is in memory where that changes."""
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "triton",
        "task": model.task,
        "dimensions": model.dimensions,
        "minimum_dimensions": model.minimum_dimensions,
        "max_tokens": model.max_tokens,
        "pooling": model.facts.get("pooling"),
        "prompts": sorted(model.prompts),
        "precision": model.facts.get("precision"),
        "computes_in": residency.computes_in(model.name) if residency else None,
        "source": model.facts.get("source"),
        "revision": model.facts.get("revision"),
        "graph": model.facts.get("graph"),
        "ignored": model.facts.get("ignored"),
        "residency": residency.describe(model.name) if residency else None,
    }


def error(error: GatewayError) -> tuple[int, object]:
    """OpenAI's error object; `code` is the gateway's own word."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return error.status, {"error": {"message": error.message, "type": kind, "param": None, "code": error.type}}


ROUTES: list[Post | Get] = [
    *(
        Post(path, EmbeddingsCall, embeddings, Embeddings, error=error)
        for path in ("/v1/embeddings", "/embeddings")
    ),
    Get("/v1/models", models, Models, error=error),
    *(Get(path, model, Model, error=error) for path in ("/v1/models/{model}", "/models/{model}")),
]
