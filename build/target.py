"""What a family is built for: the runtime that executes its models and the precision they compute in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

from build.errors import BuildError
from build.runtimes import DEFAULT, RUNTIMES, Runtime

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Target:
    """A runtime and a precision."""

    runtime: str = DEFAULT
    """One of RUNTIMES."""
    precision: str = "fp32"
    """One of PRECISIONS: the encoder's arithmetic; heads are small and stay in fp32."""
    encoder: str | None = None
    """The precision of the encoder before a head."""

    @classmethod
    def of(cls, runtime: str, precision: str | None, allowed: Sequence[str], name: str) -> Target:
        """The runtime with `precision`, or the first `allowed` one that it has; BuildError where it cannot."""
        traits = RUNTIMES[runtime]
        both = [one for one in allowed if one in (*traits.precisions, *traits.gpu_precisions)]
        if precision is not None and precision not in both:
            raise BuildError(f"{name} cannot be built for {runtime} in {precision}: choose {' or '.join(both)}")
        return cls(runtime, precision or next((one for one in both if one in traits.precisions), both[0]))

    @property
    def head(self) -> Target:
        """What the head behind an encoder of this target is built for."""
        return replace(self, precision="fp32", encoder=self.precision)

    @property
    def states(self) -> str:
        """The precision in which hidden states pass from encoder to head."""
        return (self.encoder or self.precision) if self.traits.narrow_states else "fp32"

    @property
    def kind(self) -> int:
        """Where its instances run, a `ModelInstanceGroup.Kind`."""
        on_gpu = (self.encoder or self.precision) in self.traits.gpu_precisions
        return int(ModelInstanceGroup.KIND_GPU) if on_gpu else self.traits.kind

    @property
    def traits(self) -> Runtime:
        """What the runtime is like."""
        return RUNTIMES[self.runtime]
