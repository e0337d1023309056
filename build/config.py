"""Reads the config.pbtxt of a model in a repository."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from build.errors import BuildError

REPOSITORY = Path(__file__).parents[1] / "model_repository"
"""The default model repository."""

CACHE = REPOSITORY.parent / ".cache"
"""What builds download, and what they keep of their work."""

RECORD = "build.json"
"""What a family was built from and into, kept in the folder of its first ensemble."""


def read_config(repository: Path, model: str) -> ModelConfig:
    """The configuration of one model; raises BuildError when the repository has none that can be read."""
    path = repository / model / "config.pbtxt"
    try:
        config: ModelConfig = text_format.Parse(path.read_text(), ModelConfig())
        return config
    except (FileNotFoundError, NotADirectoryError):
        raise BuildError(f"no model {model!r} in {repository}: build it with `python -m build.make`") from None
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise BuildError(f"{path} is not a model configuration: {error}") from None


def runtime_of(config: ModelConfig) -> str:
    """The runtime of a model: its parameter `runtime`, or else the name of its Triton backend."""
    return str(config.parameters["runtime"].string_value or config.backend)


def is_called(config: ModelConfig) -> bool:
    """Whether callers name a model: it is an ensemble or writes text, and no step of one."""
    return config.platform == "ensemble" or bool(config.model_transaction_policy.decoupled)
