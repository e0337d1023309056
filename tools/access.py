"""Who may manage Triton, and what its processes get of their caller's environment.

Whoever loads a model runs code: the body of a load may carry a `model.py`. Triton guards none of this by itself,
and a browser sends such a call for any web page. So these APIs are closed behind a secret, over HTTP and gRPC
alike. Each start makes its own, in a file that only the server's own user can read.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

HEADER = "triton-secret"
"""What a call over HTTP carries the secret in."""

GRPC_HEADER = f"triton-grpc-protocol-{HEADER}"
"""The same over gRPC."""

RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")
"""The APIs that change what the server runs, reads or writes; inference, health, configurations stay open."""

PASSED_ON = re.compile(
    r"PATH|LD_LIBRARY_PATH|LD_PRELOAD|HOME|TMPDIR|TZ|LANG|LANGUAGE|PYTHON\w+|GENERATOR_CACHE_TOKENS"
    r"|(?!\w*(KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL))"
    r"(CUDA|ENCODER|KMP|LC|MALLOC|MKL|NCCL|NVIDIA|OMP|ONEDNN|OPENBLAS|OPENVINO|OV|PYTORCH|TCMALLOC|TORCH|TRITON"
    r"|UCX)_\w+"
)
"""Environment variables that Triton and its models are given: others may be secrets, and are of no use to them."""

OBJECT_STORES = re.compile(r"(AWS|GOOGLE|AZURE|GCS|S3)_\w+|(HTTPS?|NO)_PROXY|SSL_CERT_\w+", re.IGNORECASE)
"""What Triton needs besides to read a repository from one."""


def secret_file(work_folder: Path, http_port: int) -> Path:
    """Where the secret of the Triton on a port lies."""
    return work_folder / f"triton-{http_port}.secret"


def make_secret(file: Path) -> str:
    """A new secret, written to `file` for its owner alone."""
    secret = secrets.token_urlsafe(32)
    with suppress(FileNotFoundError):
        file.unlink()
    file.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(secret)
    return secret


def restrictions(secret: str) -> list[str]:
    """The arguments that close tritonserver's APIs behind `secret`."""
    closed = f"{','.join(RESTRICTED)}:{HEADER}={secret}"
    return [f"--http-restricted-api={closed}", f"--grpc-restricted-protocol={closed}"]


def passed_on(environment: Mapping[str, str], with_object_store: bool) -> dict[str, str]:
    """What of the caller's environment Triton and its models are given."""
    return {
        name: value
        for name, value in environment.items()
        if PASSED_ON.fullmatch(name) or (with_object_store and OBJECT_STORES.fullmatch(name))
    }


def hide_arguments(pid: int, secret: str) -> None:
    """Blanks the secret in the command line that every user of this machine can read of a child process."""
    with suppress(OSError):  # it has ended, or the kernel forbids it
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        start, end = (int(fields[number]) for number in (45, 46))
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            words = memory.read(end - start)
            blank = words.replace(secret.encode(), b"*" * len(secret))
            memory.seek(start)
            memory.write(blank)
