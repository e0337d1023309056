"""What a configuration says of rotary positions (Su et al., 2021, arXiv:2104.09864).

transformers 5 writes `rope_parameters`; 4 wrote `rope_theta` and `rope_scaling`. Only plain rotation is written.
"""

from __future__ import annotations

from build.errors import BuildError
from build.settings import Settings


def rope_theta(config: Settings, default: float) -> float:
    """The base of the rotation; `default` is the reference's own. Raises BuildError for scaled positions."""
    config.require("partial_rotary_factor", 1.0, 1)
    said = config.inner("rope_parameters", "rope_scaling")
    theta = config.number("rope_theta", default=default)
    if said is None:
        return theta
    inner = theta_of(said, theta)
    if "rope_theta" in config and inner != theta:
        raise BuildError(f"{config.path} has rope_theta = {theta} and rope_parameters.rope_theta = {inner}")
    return inner


def thetas_by_type(said: Settings | None, defaults: dict[str, float]) -> dict[str, float]:
    """Type of layer -> its base, where `said` has an object for each type; `defaults` where it does not."""
    inner = {kind: None if said is None else said.inner(kind) for kind in defaults}
    return {kind: base if (one := inner[kind]) is None else theta_of(one, base) for kind, base in defaults.items()}


def theta_of(said: Settings, default: float) -> float:
    """The base that one object of rotary positions names."""
    said.require("rope_type", "default")
    said.require("type", "default")
    said.require("partial_rotary_factor", 1.0, 1)
    return said.number("rope_theta", default=default)
