"""What a family is built for: the runtime that executes its graphs and the precision they compute in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnx import TensorProto
from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

from build.errors import BuildError


@dataclass(frozen=True)
class Traits:
    """What a runtime is like: which of Triton's backends it is, and how that hands a batch over."""

    backend: str
    """The name that config.pbtxt knows it by."""
    file: str
    """What it loads from the version folder."""
    kind: int
    """Where its instances run, a `ModelInstanceGroup.Kind`."""
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")
    """What it computes in."""
    gpu_precisions: tuple[str, ...] = ()
    """What it computes in on a GPU only, where that is asked for by name."""
    packed: bool = False
    """Tokens come without the slots between them, and attention takes them so."""
    needs_width: bool = False
    """Shapes cannot follow from values, so the width of rows comes as the shape of an input of its own."""
    masks: str = "boolean"
    """How attention is told which keys a query sees. `boolean`: always by a mask. `additive`: causal ones by
    `is_causal`, others by what is added to the scores. `counts`: by `is_causal`, the number of keys, or a mask."""
    narrow_states: bool = False
    """Hidden states pass from encoder to head in the encoder's precision; if not, in fp32."""
    softmax_precision: int | None = TensorProto.FLOAT
    """What attention's softmax is taken in; None where the runtime takes no word on it."""

    @property
    def one_step(self) -> bool:
        """Whether an encoder and its head are one model, so that hidden states stay in its process."""
        return self.backend == "python"


RUNTIMES = {
    "openvino": Traits("python", "model.onnx", ModelInstanceGroup.KIND_CPU),
    # On a CPU it has no bf16 arithmetic; on a GPU a mask rules its flash attention out.
    "onnxruntime": Traits(
        "onnxruntime",
        "model.onnx",
        ModelInstanceGroup.KIND_AUTO,
        precisions=("fp32", "fp16"),
        gpu_precisions=("bf16",),
        narrow_states=True,
        masks="counts",
    ),
    # Its attention has no kernel for fp32 and takes no word on the softmax; TensorRT-RTX 1.7 cannot compile every
    # boolean mask.
    "tensorrt": Traits(
        "tensorrt",
        "model.plan",
        ModelInstanceGroup.KIND_GPU,
        precisions=("bf16", "fp16"),
        needs_width=True,
        narrow_states=True,
        masks="additive",
        softmax_precision=None,
    ),
    "torch": Traits(
        "python", "model.onnx", ModelInstanceGroup.KIND_AUTO, packed=True, narrow_states=True, masks="counts"
    ),
}
"""Steps of ours run `openvino` and `torch`: `onnx_runner.py` and `torch_runner.py`. Triton runs the others."""

WRITERS = {
    "vllm": Traits(
        "python",
        "config.json",
        ModelInstanceGroup.KIND_GPU,
        precisions=("bf16",),
        gpu_precisions=("fp32", "fp16"),
    ),
}
"""What writes text, by a checkpoint that it reads itself in place of a graph: the step `vllm_generator.py`."""

TOKEN_LIMITS = (512, 2048, 8192)
"""Tokens in a batch for which an engine of fixed size keeps kernels, beside the largest batch."""


def token_limits(texts: int, longest: int) -> list[int]:
    """Tokens that each optimisation profile has room for, the last of them for the largest batch."""
    return [*(limit for limit in TOKEN_LIMITS if limit < texts * longest), texts * longest]


PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Target:
    """A runtime and a precision."""

    runtime: str = "openvino"
    """One of RUNTIMES or WRITERS."""
    precision: str = "fp32"
    """One of PRECISIONS: the encoder's arithmetic; heads are small and stay in fp32."""
    encoder: str | None = None
    """The precision of the encoder before a head."""

    @classmethod
    def of(cls, runtime: str, precision: str | None, allowed: Sequence[str], name: str) -> Target:
        """The runtime with `precision`, or the first `allowed` one that it has; BuildError where it cannot."""
        traits = (RUNTIMES | WRITERS)[runtime]
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
    def traits(self) -> Traits:
        """What the runtime is like."""
        return (RUNTIMES | WRITERS)[self.runtime]


def others_than_packed(with_width: bool = True) -> str:
    """The runtimes that run a graph of rows; without those that must know shapes beforehand, if asked."""
    others = [
        name
        for name, runtime in RUNTIMES.items()
        if not runtime.packed and (with_width or not runtime.needs_width)
    ]
    return f"{', '.join(others[:-1])} or {others[-1]}"
