"""What the rest of a family needs to know of its encoder."""

from __future__ import annotations

from dataclasses import dataclass

from build.errors import BuildError
from build.sources.settings import Settings

COUNTED_FROM_PADDING = ("camembert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl")
"""Model types without a graph that count positions as RoBERTa does."""

SLIDING, FULL = "sliding_attention", "full_attention"
"""What a layer is called in `layer_types`: each token sees a window around it, or the whole text."""


@dataclass(frozen=True)
class Dimensions:
    """What tokenizer, heads and steps must know of an encoder.

    Sizes, offsets of ids, adapters, and what its classifier reads.
    """

    hidden_size: int
    """Width of the hidden states."""
    vocab_size: int
    """Rows of the table of words."""
    positions: int
    """How many tokens the encoder has positions for."""
    longest: int = 0
    """How many tokens a text that is served may have, 0 where that is not known."""
    token_types: int = 1
    """Segments that it tells apart; of 0 it has no table."""
    first_position: int = 0
    """Row of the position table that the first token takes."""
    segment_offset: int = 0
    """What is added to the ids of a pair's second text, 0 where the two are not told apart."""
    unseen_offset: int = 0
    """What is added to the ids of tokens that see others and are seen by none, 0 without such tokens."""
    window: int = 0
    """A token of a sliding layer sees those fewer than so many places away; 0 where it sees all."""
    padding: int = 0
    """The id in cells without a token, where a graph asks for one."""
    adapters: tuple[str, ...] = ()
    """What its tasks are called that there are adapters for."""
    adapter: str | None = None
    """The one of them that is added to its weights."""
    tied: bool = False
    """Whether a language model's head is its table of words."""
    head_pooling: str = "cls"
    """What a classifier reads of the tokens' states, by its name in `build.graphs.pooling`."""
    head_padding: int | None = None
    """The id that a decoder's classifier passes over at a text's end."""
    head_epsilon: float = 0
    """Epsilon of the norm in a classifier's head; 0 where there is none."""
    head_temperature: float = 1
    """What a classifier's logit is divided by."""


def any_dimensions(config: Settings) -> Dimensions:
    """Of a model whose graph somebody else exported, by all the names that are common for a key."""
    model_type = config.find("model_type")
    # RoBERTa counts from the padding token's id on, and leaves that one out.
    counted = model_type in COUNTED_FROM_PADDING
    first = config.integer("pad_token_id", default=1, least=0) + 1 if counted else 0
    rows = config.integer("n_positions" if "n_positions" in config else "max_position_embeddings")
    return Dimensions(
        hidden_size=config.integer("hidden_size", "n_embd", "dim", "d_model"),
        vocab_size=config.integer("vocab_size"),
        positions=rows - first,
        token_types=config.integer("type_vocab_size", default=1, least=0),
        first_position=first,
        padding=max(0, config.integer("pad_token_id", default=0, least=-1)),
    )


def layer_types(config: Settings, usual: list[str]) -> tuple[str, ...]:
    """SLIDING or FULL of each layer, as `usual` where nothing is said; raises BuildError for another type."""
    kinds = config.words("layer_types", default=usual)
    if len(kinds) != len(usual) or not {SLIDING, FULL}.issuperset(kinds):
        raise BuildError(f"{config.path} has layer_types other than {len(usual)} of {SLIDING} and {FULL}")
    return tuple(kinds)


def split_evenly(config: Settings, hidden_size: int, heads: int) -> int:
    """The width of a head; raises BuildError where they do not fill the hidden state."""
    if hidden_size % heads:
        raise BuildError(
            f"{config.path} has a hidden state of {hidden_size} values, which {heads} heads cannot share"
        )
    return hidden_size // heads


def shared_evenly(config: Settings, heads: int, groups: int) -> int:
    """How many heads of keys and values there are; BuildError where those of queries cannot share them evenly."""
    if heads % groups:
        raise BuildError(f"{config.path} has {heads} heads of queries, which cannot share {groups} of keys evenly")
    return groups
