"""A model that callers may name, as its configuration describes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from tritonclient.grpc.model_config_pb2 import ModelConfig

from build.errors import BuildError
from build.tasks import Task
from tools.shim.residency.families import steps_of, task_of


@dataclass(frozen=True)
class ServedModel:
    """One ensemble that callers may name."""

    name: str
    task: Task
    max_batch_size: int
    dimensions: int | None
    """Width of an embedding, of a token's vector, or of a sparse vector; None for a reranker."""
    max_tokens: int
    """Longest text, special tokens included; what is longer is cut. 0 where pages are read."""
    steps: tuple[str, ...]
    """Models that it is made of, which others may share; the first is its tokenizer."""
    prompts: Mapping[str, str]
    """Prompt name -> what it puts before a text."""
    takes_instruction: bool
    """Whether a caller may say what a reranker is to look for."""
    facts: Mapping[str, str]
    """What the builder wrote of the checkpoint into the ensemble's parameters."""

    @classmethod
    def of(cls, name: str, config: ModelConfig, tokenizer: ModelConfig, graph: str | None) -> ServedModel:
        """By its own configuration and that of its first step; `graph` is its fact of that name.

        Raises BuildError for a model that is none of ours.
        """
        task = task_of(config)
        if task is None:
            raise BuildError(f"{name} is no ensemble for any of the tasks {', '.join(get_args(Task))}")
        parameters = tokenizer.parameters
        facts = {key: value.string_value for key, value in config.parameters.items()}
        if graph:
            facts["graph"] = graph
        dimensions = {output.name: list(output.dims) for output in config.output}.get("embeddings")
        if dimensions is None and "dimensions" in facts:
            dimensions = [int(facts["dimensions"])]
        prompts = json.loads(parameters["prompts"].string_value) if "prompts" in parameters else {}
        return cls(
            name=name,
            task=task,
            max_batch_size=config.max_batch_size,
            dimensions=dimensions[0] if dimensions else None,
            max_tokens=int(parameters["max_tokens"].string_value or 0),
            steps=steps_of(config),
            # Without the one for calls that name none.
            prompts={prompt: text for prompt, text in prompts.items() if prompt},
            takes_instruction="instruction" in [one.name for one in config.input],
            facts=facts,
        )

    @property
    def tokenizer(self) -> str:
        """Its first step."""
        return self.steps[0]

    @property
    def minimum_dimensions(self) -> int | None:
        """The fewest that an embedding may be cut to; None where the model was not trained for it."""
        fewest = self.facts.get("minimum_dimensions")
        return int(fewest) if fewest else None

    @property
    def labels(self) -> list[str]:
        """What a classifier tells apart, in the order of its numbers."""
        return [str(label) for label in json.loads(self.facts.get("labels", "[]"))]

    @property
    def unit_length(self) -> bool:
        """Whether embeddings are known to come with length 1."""
        return self.facts.get("unit_length") == "true"


@dataclass(frozen=True)
class Absent:
    """A model that Triton could not load when it started."""

    cause: str
    task: Task | None
    """What it would be for, where that can be told."""
