"""A vector for each token, by which texts are compared token for token (Khattab, 2020, arXiv:2004.12832).

Input   last_hidden_state FP32 [T * H], input_ids INT32 [T], lengths INT32 [B] (see `build.graphs.pooling`); slots
        whose id is -1 hold no token, or one whose vector is not kept
Output  token_embeddings FP32 [B, N, D], those that are kept in their order, and zeros; N is that of the
        text with most; vector_count INT32 [B, 1], how many there are

ColBERT puts a Dense layer and a norm behind each hidden state; without such modules the states are the vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from build.errors import BuildError
from build.graphs.modules import Dense, Module, Normalize
from build.graphs.onnx_graph import PACKED, OnnxGraph
from build.graphs.pooling import LOWEST, token_rows
from build.graphs.ragged import state_inputs
from build.graphs.sparse import compacted
from build.sources.checkpoint import MASK, Checkpoint
from build.sources.settings import Settings

NOTHING_TO_SCORE = -1e9
"""sentence-transformers' score of a passage of whose tokens none counts: below that of any other."""
VECTORS = "token_embeddings"
"""What the modules read and write."""
MODULES: dict[str, Callable[[Checkpoint, str, int, str], Module]] = {"Dense": Dense.of, "Normalize": Normalize.of}


@dataclass(frozen=True)
class Side:
    """How a text is read as a query, or as a document."""

    max_tokens: int | None = None
    """The longest; None for the model's own window."""
    least: int = 0
    """Shorter ones are filled up to so many tokens."""
    filling: int = 0
    """With this id."""
    skipped: tuple[int, ...] = ()
    """Ids whose vectors are not kept."""
    marker: int | None = None
    """The id that is put behind the first token, which counts as one of the longest."""
    leading: int = 0
    """So many vectors are not kept at the start."""

    def parameter(self, window: int) -> dict[str, object]:
        """As the tokenizer step reads it."""
        skipped = {"skipped": list(self.skipped)} if self.skipped else {}
        filled = {"least": self.least, "filling": self.filling} if self.least else {}
        marked = {"marker": self.marker} if self.marker is not None else {}
        led = {"leading": self.leading} if self.leading else {}
        return {"max_tokens": self.max_tokens or window, **filled, **skipped, **marked, **led}


@dataclass(frozen=True)
class MultiVector:
    """The modules of a checkpoint's `modules.json` behind its transformer, and how it reads either side."""

    hidden_size: int
    modules: tuple[Module, ...] = ()
    query: Side = Side()
    document: Side = Side()
    """Its skipped and leading vectors are also those of a text without a word on it."""
    unseen: bool = False
    """Whether the tokens that fill a query up are seen by none."""

    @property
    def unit_length(self) -> bool:
        """Whether vectors are known to come with length 1."""
        return bool(self.modules) and isinstance(self.modules[-1], Normalize)

    @property
    def width(self) -> int:
        """Of a vector."""
        return self.modules[-1].width if self.modules else self.hidden_size

    @property
    def longest(self) -> int:
        """Tokens of the longest query or document, 0 where nothing is said of either."""
        return max(side.max_tokens or 0 for side in (self.query, self.document))

    @property
    def has_sides(self) -> bool:
        """Whether queries and documents are read unlike."""
        return (self.query, self.document) != (Side(), Side())

    @classmethod
    def of(cls, checkpoint: Checkpoint, hidden_size: int, vocabulary: int) -> MultiVector:
        """Reads the modules; of a model that pools, or has none, the hidden states are the vectors.

        Raises BuildError on what these graphs do not write, naming it.
        """
        kinds = [module.kind for module in checkpoint.modules]
        if MASK not in kinds and (not kinds or "Pooling" in kinds):
            return cls(hidden_size)
        if kinds[:1] != ["Transformer"] or kinds.count(MASK) != 1 or set(kinds[1:]) - {MASK, *MODULES}:
            raise BuildError(
                f"{checkpoint.folder / 'modules.json'} lists {', '.join(kinds)}; vectors of tokens are written "
                f"for Transformer, one {MASK} and any of {', '.join(MODULES)}"
            )
        modules: list[Module] = []
        skipped: dict[str, tuple[int, ...]] = {}
        for module in checkpoint.modules[1:]:
            if module.kind == MASK:
                skipped = _skipped(checkpoint, module.path)
                continue
            width = modules[-1].width if modules else hidden_size
            modules.append(MODULES[module.kind](checkpoint, module.path, width, VECTORS))
        query, document, unseen = _sides(checkpoint, skipped, vocabulary)
        return cls(hidden_size, tuple(modules), query, document, unseen)


def _skipped(checkpoint: Checkpoint, path: str) -> dict[str, tuple[int, ...]]:
    """Task -> ids whose vectors do not count in it: those of words that are a token of their own."""
    config = checkpoint.settings(checkpoint.folder / path / "config.json")
    config.require("keep_only_token_ids", None, [])
    words = config.words("skiplist_words", default=[])
    said = config.find("skiplist_tasks")
    tasks = ["document"] if said is None else [said] if isinstance(said, str) else said
    if not isinstance(tasks, list) or not {"query", "document"}.issuperset(tasks):
        raise BuildError(f"{config.path} has skiplist_tasks = {tasks}; there are query and document")
    return dict.fromkeys(tasks, ids_of(checkpoint, words))


def ids_of(checkpoint: Checkpoint, words: Iterable[str]) -> tuple[int, ...]:
    """Of the words that are a token of their own."""
    return tuple(sorted(i for word in words if (i := checkpoint.tokenizer.token_to_id(word)) is not None))


def filling(checkpoint: Checkpoint, said: Settings, word: str | None = None) -> int:
    """The id that queries are filled up with: of a `word`, or of what hides one, or else of an end."""
    word = word or checkpoint.mask_token or checkpoint.named_token("eos")
    if (found := checkpoint.tokenizer.token_to_id(word)) is None:
        raise BuildError(
            f"{said.path} fills queries up with {word!r}, which is no token: say one as query_expansion.token"
        )
    return found


def _sides(
    checkpoint: Checkpoint, skipped: dict[str, tuple[int, ...]], vocabulary: int
) -> tuple[Side, Side, bool]:
    """Query, document, and whether what fills a query up is seen by none."""
    window = checkpoint.window
    query, document = Side(skipped=skipped.get("query", ())), Side(skipped=skipped.get("document", ()))
    if window is None:
        return query, document, False
    lengths = [
        window.integer(f"{name}_length") if f"{name}_length" in window else None for name in ("query", "document")
    ]
    document = Side(lengths[1], skipped=document.skipped)
    expansion = window.inner("query_expansion")
    if expansion is None:
        return Side(lengths[0], skipped=query.skipped), document, False
    expansion.require("strategy", "fixed", "min")
    least, attend = expansion.integer("length"), expansion.flag("attend", default=False)
    own = filling(checkpoint, window, expansion.find("token") and expansion.word("token"))
    if own in query.skipped:
        word = checkpoint.tokenizer.id_to_token(own)
        raise BuildError(f"{window.path} fills queries up with {word!r}, whose vectors the checkpoint leaves out")
    longest = least if expansion.find("strategy") == "fixed" else lengths[0] and max(lengths[0], least)
    return Side(longest, least, own + vocabulary * (not attend), query.skipped), document, not attend


def write_vectors(g: OnnxGraph, vectors: MultiVector) -> None:
    """Writes the modules behind a transformer, and leaves out what is not kept."""
    x, input_ids, lengths = state_inputs(g, vectors.hidden_size)
    for module in vectors.modules:
        x = module.write(g, x)
    if g.traits.packed_attention:
        kept = g.op("KeptOfTexts", x, input_ids, lengths, domain=PACKED)
        g.output(VECTORS, kept, TensorProto.FLOAT, ["batch", "most", vectors.width])
        count = g.op("CountOfKept", input_ids, lengths, domain=PACKED)
        g.output("vector_count", count, TensorProto.INT32, ["batch", 1])
        return
    slot, real = token_rows(g, input_ids, lengths)
    places, place, counts = compacted(g, g.op("Cast", real, to=TensorProto.BOOL))
    slots = g.op("Gather", g.op("Reshape", slot, g.constant([-1], np.int64)), places)
    nothing = g.constant(np.zeros((1, vectors.width)), np.float32)
    kept = g.op("Concat", g.op("Gather", x, slots), nothing, axis=0)
    g.output(VECTORS, g.op("Gather", kept, place), TensorProto.FLOAT, ["batch", "most", vectors.width])
    g.output("vector_count", g.op("Cast", counts, to=TensorProto.INT32), TensorProto.INT32, ["batch", 1])


def write_maxsim(g: OnnxGraph, width: int) -> None:
    """Scores a passage by the sum over a query's vectors of the largest product with one of the passage's.

    Input   query_token_embeddings FP32 [B, N, D], passage_token_embeddings FP32 [B, M, D]; query_vector_count,
            passage_vector_count, query_token_count, passage_token_count INT32 [B, 1]; query_truncated,
            passage_truncated BOOL [B, 1]
    Output  logit FP32 [B, 1], the sum; score FP32 [B, 1] = (1 + logit / query_vector_count) / 2, 0..1;
            token_count INT32 [B, 1], the sum; truncated BOOL [B, 1], whether either text was cut

    Of a passage without vectors the logit is NOTHING_TO_SCORE and the score 0; of a query without, they are 0
    and 0.5.
    """

    def pair(name: str, dtype: int, shape: Iterable[int | str]) -> tuple[str, str]:
        sides = {"query": "queries", "passage": "passages"}
        first, second = (
            g.input(f"{side}_{name}", dtype, ["batch", *(many if one == "many" else one for one in shape)])
            for side, many in sides.items()
        )
        return first, second

    query, passage = pair(VECTORS, TensorProto.FLOAT, ["many", width])
    query_count, passage_count = pair("vector_count", TensorProto.INT32, [1])
    counts = pair("token_count", TensorProto.INT32, [1])
    truncated = pair("truncated", TensorProto.BOOL, [1])

    def is_real(vectors: str, count: str) -> str:
        """[B, N] BOOL."""
        size = g.op("Gather", g.op("Shape", vectors), g.constant(1, np.int64))
        column = g.op("Range", g.constant(0, np.int64), size, g.constant(1, np.int64))
        return g.op("Less", g.op("Cast", column, to=TensorProto.INT32), count)

    products = g.op("MatMul", query, g.op("Transpose", passage, perm=[0, 2, 1]))
    there = g.op("Unsqueeze", is_real(passage, passage_count), g.constant([1], np.int64))
    products = g.op("Where", there, products, g.constant(LOWEST, np.float32))
    best = g.op("ReduceMax", products, g.constant([2], np.int64), keepdims=0)
    best = g.op("Where", is_real(query, query_count), best, g.constant(0, np.float32))
    # One after the other, so that zeros behind them change no bit.
    running = g.op("CumSum", best, g.constant(1, np.int64))
    logit = g.op("Gather", running, g.constant([-1], np.int64), axis=1)
    is_empty = g.op("Equal", passage_count, g.constant(0, np.int32))
    logit = g.op("Where", is_empty, g.constant(NOTHING_TO_SCORE, np.float32), logit)
    count = g.op("Max", query_count, g.constant(1, np.int32))
    mean = g.op("Div", logit, g.op("Cast", count, to=TensorProto.FLOAT))
    # Rounding may carry the mean of a text with itself past 1.
    mean = g.op("Clip", mean, g.constant(-1, np.float32), g.constant(1, np.float32))
    half = g.constant(0.5, np.float32)
    g.output("score", g.op("Add", g.op("Mul", mean, half), half), TensorProto.FLOAT, ["batch", 1])
    g.output("logit", logit, TensorProto.FLOAT, ["batch", 1])
    g.output("token_count", g.op("Add", *counts), TensorProto.INT32, ["batch", 1])
    g.output("truncated", g.op("Or", *truncated), TensorProto.BOOL, ["batch", 1])
