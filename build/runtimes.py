"""The runtimes, one entry each: what is rendered, copied and refused for a runtime follows from its entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import TensorProto
from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

from build.tasks import DOCUMENT_TASKS, TASKS


@dataclass(frozen=True)
class Runtime:
    """What executes a family's models: one of Triton's backends, or a step of ours in its Python backend."""

    backend: str
    """Triton's backend, by its name in config.pbtxt."""
    kind: int
    """Where its instances run, a `ModelInstanceGroup.Kind`."""
    tasks: tuple[str, ...]
    """Tasks of `build.tasks` that it runs."""
    file: str = "model.onnx"
    """What it loads from the version folder."""
    step: str = ""
    """The file of `build/steps`, without .py, that runs a graph; "" where a backend of Triton's does."""
    parameters: tuple[str, ...] = ()
    """Parameters of a graph's model that the step reads: some of precision, threads, token_budget and spread."""
    generator: str = ""
    """The file of `build/steps`, without .py, that runs a language model; "" where it runs none."""
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")
    """What it computes in."""
    gpu_precisions: tuple[str, ...] = ()
    """What it computes in on a GPU only, where that is asked for by name."""
    token_budget: int = 0
    """Tokens in one engine call of the step."""
    least_texts: int = 0
    """Texts that one batch has room for at least: the step cuts batches by tokens."""
    cache_tokens: int = 0
    """Tokens that a language model's cache has room for: those of all prompts and answers under way."""
    packed_attention: bool = False
    """Attention, too, runs on packed tokens [T']: rows [B, S] are never opened, and tokens come without the slots
    between them. (Linear layers are packed in every runtime.)"""
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
    def joins_head(self) -> bool:
        """Whether an encoder and its head are one model, so that hidden states stay in its process."""
        return bool(self.step)


FIXED = ("embed", "rerank", "classify")
"""Tasks that give every text as many numbers."""
RAGGED = ("embed_all", "embed_sparse")
"""Tasks that give a text as many numbers as follow from it, so that shapes follow from values."""

DEFAULT = "openvino"

RUNTIMES = {
    # Larger calls gain nothing on a CPU and leave less to share among its cores.
    "openvino": Runtime(
        "python",
        ModelInstanceGroup.KIND_CPU,
        tasks=(*TASKS, *DOCUMENT_TASKS),
        step="onnx_runner",
        parameters=("precision", "threads", "token_budget", "spread"),
        generator="openvino_generator",
        token_budget=512,
        cache_tokens=16384,
    ),
    # On a CPU it has no bf16 arithmetic; on a GPU a mask rules its flash attention out.
    "onnxruntime": Runtime(
        "onnxruntime",
        ModelInstanceGroup.KIND_AUTO,
        tasks=(*FIXED, *RAGGED, "layout", "picture"),
        precisions=("fp32", "fp16"),
        gpu_precisions=("bf16",),
        narrow_states=True,
        masks="counts",
    ),
    # Its attention has no kernel for fp32 and takes no word on the softmax; TensorRT-RTX 1.7 cannot compile every
    # boolean mask.
    "tensorrt": Runtime(
        "tensorrt",
        ModelInstanceGroup.KIND_GPU,
        tasks=FIXED,
        file="model.plan",
        precisions=("bf16", "fp16"),
        needs_width=True,
        narrow_states=True,
        masks="additive",
        softmax_precision=None,
    ),
    # It wants a GPU: calls and batches are large enough to fill one, with short texts, too.
    "torch": Runtime(
        "python",
        ModelInstanceGroup.KIND_AUTO,
        tasks=(*FIXED, *RAGGED),
        step="torch_runner",
        parameters=("token_budget",),
        token_budget=16384,
        least_texts=256,
        packed_attention=True,
        narrow_states=True,
        masks="counts",
    ),
    # It loads the checkpoint itself, not a graph.
    "vllm": Runtime(
        "python",
        ModelInstanceGroup.KIND_GPU,
        tasks=("generate",),
        file="config.json",
        generator="vllm_generator",
        precisions=("bf16",),
        gpu_precisions=("fp32", "fp16"),
        cache_tokens=32768,
    ),
}
"""Name, as in `--runtime` and the parameter `runtime` of models of ours -> runtime."""


def runtimes_for(tasks: Sequence[str], rows: bool = False) -> str:
    """The runtimes of all these tasks, as words for an error; `rows`: those whose attention opens rows."""
    names = [
        name
        for name, runtime in RUNTIMES.items()
        if {*tasks} <= {*runtime.tasks} and not (rows and runtime.packed_attention)
    ]
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


TOKEN_LIMITS = (512, 2048, 8192)
"""Tokens in a batch for which an engine of fixed size keeps kernels, beside the largest batch."""


def token_limits(texts: int, longest: int) -> list[int]:
    """Tokens that each optimisation profile has room for, the last of them for the largest batch."""
    return [*(limit for limit in TOKEN_LIMITS if limit < texts * longest), texts * longest]
