"""What a configuration says of rotary positions (Su et al., 2021, arXiv:2104.09864).

transformers 5 writes `rope_parameters`; 4 wrote `rope_theta` and `rope_scaling`, with `type` for `rope_type`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log, pi

import numpy as np
import numpy.typing as npt

from build.errors import BuildError
from build.sources.settings import Settings


@dataclass(frozen=True)
class Rotation:
    """How the pairs of a head's values turn from place to place."""

    frequencies: tuple[float, ...]
    """Of each pair: the angle from one place to the next."""
    scale: float = 1.0
    """Of the cosines and sines."""

    @classmethod
    def plain(cls, theta: float, width: int) -> Rotation:
        """Of a head of `width` values, as the paper has it."""
        return cls(tuple(_frequencies(theta, width)))


KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
"""Of rotary positions, as transformers calls them."""


def rotation(
    config: Settings, width: int, positions: int, theta: float, kinds: tuple[str, ...] = KINDS
) -> Rotation:
    """Of heads of `width` values, scaled or not; `positions` and `theta` are for what is not said.

    Raises BuildError for a kind of scaling that is not among the `kinds` that the model's code knows.
    """
    if width % 2:
        raise BuildError(f"{config.path} has heads of {width} values, and rotary positions turn pairs of them")
    said, theta = _said(config, theta)
    if said is None:
        return Rotation.plain(theta, width)
    for name in ("rope_type", "type"):
        said.require(name, *kinds)
    frequencies = _frequencies(theta, width)
    match said.word("rope_type", "type", default="default"):
        case "linear":  # places lie closer together (Chen et al., 2023, arXiv:2306.15595)
            return Rotation(tuple(frequencies / said.number("factor")))
        case "ntk":  # all of them by one factor more than their base has it (Su, 2023, kexue.fm/archives/9706, 6)
            factor = max(said.number("factor"), 1.0)  # positions are stretched and never drawn together
            return Rotation(tuple(_frequencies(theta * factor, width) / factor ** (2 / width)))
        case "yarn":
            return _yarn(said, theta, width, positions)
        case "llama3":
            return Rotation(tuple(_llama3(said, frequencies, positions)))
        case "dynamic":
            said.number(
                "factor"
            )  # of the base in texts of more than `positions` tokens, and none of those is served
    return Rotation(tuple(frequencies))


def rope_theta(config: Settings, default: float) -> float:
    """The base of the rotation; `default` is the reference's own. Raises BuildError for scaled positions."""
    said, theta = _said(config, default)
    return theta if said is None else theta_of(said, theta)


def thetas_by_type(said: Settings | None, defaults: dict[str, float]) -> dict[str, float]:
    """Type of layer -> its base, where `said` has an object for each type; `defaults` where it does not."""
    inner = {kind: None if said is None else said.inner(kind) for kind in defaults}
    return {kind: base if (one := inner[kind]) is None else theta_of(one, base) for kind, base in defaults.items()}


def theta_of(said: Settings, default: float) -> float:
    """The base that one object of rotary positions names; BuildError where it scales them."""
    said.require("rope_type", "default")
    said.require("type", "default")
    said.require("partial_rotary_factor", 1.0, 1)
    return said.number("rope_theta", default=default)


def _said(config: Settings, default: float) -> tuple[Settings | None, float]:
    """The object of rotary positions, and their base; BuildError where it is named in two ways."""
    config.require("partial_rotary_factor", 1.0, 1)
    said = config.inner("rope_parameters", "rope_scaling")
    theta = config.number("rope_theta", default=default)
    if said is None:
        return None, theta
    said.require("partial_rotary_factor", 1.0, 1)
    inner = said.number("rope_theta", default=theta)
    if "rope_theta" in config and inner != theta:
        raise BuildError(f"{config.path} has rope_theta = {theta} and rope_parameters.rope_theta = {inner}")
    return said, inner


def _frequencies(theta: float, width: int) -> npt.NDArray[np.float64]:
    return np.asarray(theta ** -(np.arange(0, width, 2, dtype=np.float64) / width))


def _yarn(said: Settings, theta: float, width: int, positions: int) -> Rotation:
    """Divided for slow pairs, in part for those between (Peng et al., 2023, arXiv:2309.00071)."""
    if theta <= 1:
        raise BuildError(f"{said.path} has rope_theta = {theta}; positions of yarn are written for bases above 1")
    factor = said.number("factor")
    original = said.integer("original_max_position_embeddings", default=positions)

    def pair(turns: float) -> float:
        """The one that turns so often in the original length."""
        return width * log(original / (turns * 2 * pi)) / (2 * log(theta))

    first, last = pair(said.number("beta_fast", default=32)), pair(said.number("beta_slow", default=1))
    if said.flag("truncate", default=True):
        first, last = floor(first), ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    divided = np.clip((np.arange(width // 2) - first) / (last - first or 0.001), 0, 1)
    frequencies = _frequencies(theta, width)

    def temperature(weight: float) -> float:
        return 0.1 * weight * log(max(factor, 1)) + 1

    scale = temperature(1)
    weights = [said.number(name, default=1) for name in ("mscale", "mscale_all_dim")]
    if "mscale" in said and "mscale_all_dim" in said:
        scale = temperature(weights[0]) / temperature(weights[1])
    return Rotation(
        tuple(frequencies * (1 - divided) + frequencies / factor * divided),
        said.number("attention_factor", default=scale),
    )


def _llama3(said: Settings, frequencies: npt.NDArray[np.float64], positions: int) -> npt.NDArray[np.float64]:
    """Divided for pairs that turn seldom in the original length, as Llama 3.1's own code has it."""
    factor, low, high = (said.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise BuildError(f"{said.path} has low_freq_factor = {low}, which must be below high_freq_factor = {high}")
    turns = frequencies * said.integer("original_max_position_embeddings", default=positions) / (2 * pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(frequencies / factor * (1 - kept) + frequencies * kept)
