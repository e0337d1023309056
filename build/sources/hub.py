"""Checkpoints of the Hugging Face Hub, by commit, kept in the Hub's own cache, which other tools share.

Only what a build reads is brought: JSON, safetensors, or an ONNX graph with its data; never pickles, never code.
HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import fcntl
import posixpath
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
from huggingface_hub import (
    HfApi,
    RepoFile,
    constants,
    get_cached_repo_tree,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers

from build.catalog import Hub
from build.errors import BuildError
from build.sources.checkpoint import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATES,
    METADATA,
    MODULES,
    PROMPTS,
    STATIC,
    WINDOWS,
    Checkpoint,
)
from build.sources.files import PREPROCESSOR, SHARDS, WEIGHTS, git_digest, git_hash, sha256
from build.sources.onnx_file import data_files, parse_onnx
from build.sources.settings import Settings, read_json
from build.sources.vocabularies import ADDED_TOKENS, OTHERS, SPECIAL_TOKENS, TOKENIZER_CONFIG, VOCABULARIES

ADAPTER = "adapter_config.json"
GENERATION = "generation_config.json"
"""What a language model that writes says besides."""
HEADS = ("colbert_linear.safetensors", "sparse_linear.safetensors")
"""Small layers in files of their own, as bge-m3's."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def pin(source: Hub) -> Hub:
    """The same source with its revision as a commit; raises BuildError when the Hub or its cache knows none."""
    if re.fullmatch("[0-9a-f]{40}", source.revision):
        return source
    with _explained(source):
        revision = HfApi().resolve_revision(source.repository, revision=source.revision)
    if not re.fullmatch("[0-9a-f]{40}", str(revision.resolved)):
        raise BuildError(f"{constants.ENDPOINT} names no commit for {source.revision} of {source.repository}")
    print(f"{source.repository}: {source.revision} is commit {revision.resolved}", flush=True)
    return replace(source, revision=revision.resolved)


def describe(source: Hub) -> Path:
    """The folder of the files that say what kind of checkpoint a pinned source is, without its weights."""
    with _explained(source):
        return _folder(_describing(source))


def _describing(source: Hub) -> dict[str, Path]:
    """The files of settings that a build reads, by their names in the repository."""
    there = _listing(source)
    paths = {MODULES: _bring(source, MODULES)} if MODULES in there else {}
    modules = Checkpoint(_folder(paths)).modules if paths else []
    inner = modules[0].path if modules and modules[0].kind in ("Transformer", STATIC) else ""
    vocabularies = [name for name in (*VOCABULARIES.values(), *OTHERS) if posixpath.join(inner, name) in there]
    tokenizer = ["tokenizer.json"] if posixpath.join(inner, "tokenizer.json") in there else vocabularies
    # What looks at pictures has no tokenizer.
    words = tokenizer or [PREPROCESSOR if PREPROCESSOR in there else "tokenizer.json"]
    wanted = [posixpath.join(inner, name) for name in ("config.json", *words)]
    if modules and modules[0].kind == STATIC and wanted[0] not in there:
        del wanted[0]  # which sentence-transformers does not write
    beside = [TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, *WINDOWS, ADAPTER, METADATA, *HEADS]
    beside += [CHAT_TEMPLATE, GENERATION]
    optional = [posixpath.join(inner, name) for name in beside]
    optional += sorted(name for name in there if posixpath.dirname(name) == posixpath.join(inner, CHAT_TEMPLATES))
    optional += [PROMPTS, *(posixpath.join(module.path, "config.json") for module in modules)]
    for name in dict.fromkeys([*wanted, *(name for name in optional if name in there)]):
        paths[name] = _bring(source, name)
    return paths


def _folder(paths: Mapping[str, Path]) -> Path:
    """Where the files of a repository are, by one of them."""
    name, path = next(iter(paths.items()))
    return path.parents[name.count("/")]


def names(source: Hub) -> set[str]:
    """Every file of a pinned source."""
    with _explained(source):
        return _listing(source)


def fetch(source: Hub, exported: str | None = None) -> tuple[Path, dict[str, str]]:
    """The folder of a pinned source and the sha256 of each of its files that a build reads.

    Of the transformer it brings the `exported` graph, if one is named, else the weights.
    Asks the Hub only for what its cache does not hold, and goes on with a download that was cut off. Raises
    BuildError when the checkpoint cannot be had, has no weights that are data, or is not what the Hub holds.
    """
    with _explained(source):
        there = _listing(source)
        paths = _describing(source)
        folder = _folder(paths)
        checkpoint = Checkpoint(folder)
        inner = checkpoint.transformer.relative_to(folder).as_posix()
        for module in checkpoint.modules[1:]:
            if (name := posixpath.join(module.path, WEIGHTS)) in there:
                paths[name] = _bring(source, name)
        for name in [exported] if exported else _weights(source, there, "" if inner == "." else inner):
            paths[name] = _bring(source, name)
            if name.endswith(".onnx"):
                data = [
                    posixpath.join(posixpath.dirname(name), file) for file in data_files(parse_onnx(paths[name]))
                ]
                paths |= {file: _bring(source, file) for file in data}
        kept = _tree(source)
    return folder, {name: _checked(path, kept[name]) for name, path in paths.items()}


def _weights(source: Hub, there: Iterable[str], inner: str) -> list[str]:
    """The files in the folder `inner` that hold the transformer: one or several of safetensors."""
    index, whole = (posixpath.join(inner, name) for name in (SHARDS, WEIGHTS))
    if whole in there:  # as transformers, which reads the other only without it
        return [whole]
    if index in there:
        path = _bring(source, index)
        shards = Settings(path, read_json(path)).inner("weight_map")
        if shards is None:
            raise BuildError(f"{path} has no weight_map")
        return [index, *sorted({posixpath.join(inner, shards.word(tensor)) for tensor in shards})]
    pickles = sorted(name for name in there if name.endswith(PICKLES))
    raise BuildError(
        f"{_name(source)} has its weights in {', '.join(pickles)} only: pickles can run code and are never read; "
        f"name a revision that has {WEIGHTS}"
        if pickles
        else f"{_name(source)} has neither {WEIGHTS} nor an ONNX graph"
    )


def _listing(source: Hub) -> set[str]:
    """Every file of the repository at the commit."""
    return set(_tree(source))


def _tree(source: Hub) -> dict[str, RepoFile]:
    """Every file of the repository at the commit, with the hash that the Hub keeps it by."""
    try:
        files = get_cached_repo_tree(source.repository, revision=source.revision)
    except CachedRepoTreeNotFoundError:
        # Only a snapshot's download keeps the listing, and only with it can a cache be known to be whole.
        snapshot_download(source.repository, revision=source.revision, allow_patterns=["config.json"])
        files = get_cached_repo_tree(source.repository, revision=source.revision)
    return {file.path: file for file in files}


def _bring(source: Hub, name: str) -> Path:
    """One file of the repository in the cache, from the cache if it is there."""
    if name not in _listing(source):
        raise BuildError(f"{_name(source)} has no {name}")
    cached = try_to_load_from_cache(source.repository, name, revision=source.revision)
    if isinstance(cached, str):
        return Path(cached)
    _download(source, name)
    return Path(hf_hub_download(source.repository, name, revision=source.revision))


def _download(source: Hub, name: str) -> None:
    """Puts a large file where the cache keeps contents by hash; small ones, which have no sha256, are left out.

    huggingface_hub itself begins a file anew in every process.
    """
    url = hf_hub_url(source.repository, name, revision=source.revision)
    about = get_hf_file_metadata(url)
    if about.etag is None or about.size is None or not re.fullmatch("[0-9a-f]{64}", about.etag):
        return
    folder = repo_folder_name(repo_id=source.repository, repo_type="model")
    blob = Path(constants.HF_HUB_CACHE, folder, "blobs", about.etag)
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(f"{about.etag}.part")
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if blob.exists():  # another build, which was waited for
            return
        missing, free = about.size - file.tell(), shutil.disk_usage(part).free
        if missing > free:
            raise BuildError(
                f"{name} of {_name(source)} needs {missing / 1e9:.1f} GB more, but {constants.HF_HUB_CACHE} "
                f"has {free / 1e9:.1f} GB free: make room, or set HF_HOME to a folder on another disk"
            )
        http_get(
            url,
            file,
            resume_size=file.tell(),
            headers=build_hf_headers(),
            expected_size=about.size,
            displayed_filename=name,
        )
        file.flush()
        if (found := sha256(part)) != about.etag:
            part.unlink()
            raise BuildError(f"{url} came with sha256 {found}, the Hub says {about.etag}: build again")
        part.rename(blob)


def _checked(path: Path, kept: RepoFile) -> str:
    """The sha256 of a file in the cache; raises BuildError when it is not the one that the Hub's listing has."""
    found = sha256(path)
    # What is large is known by the first, and is not read a second time.
    if kept.blob_id != pointer_hash(found, path.stat().st_size) and kept.blob_id != git_hash(path):
        raise BuildError(
            f"{path.resolve()} is damaged, or not what {constants.ENDPOINT} lists: delete it and {path}, and "
            "build again"
        )
    return found


def pointer_hash(content_sha256: str, size: int) -> str:
    """What git knows a large file by: the hash of the text that Git LFS keeps in its place.

    The cached listing has this one only, of all files; Git LFS's specification fixes the text to the byte.
    """
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{content_sha256}\nsize {size}\n".encode()
    digest = git_digest(len(pointer))
    digest.update(pointer)
    return digest.hexdigest()


def _name(source: Hub) -> str:
    return f"{source.repository} at {source.revision[:12]}"


@contextmanager
def _explained(source: Hub) -> Iterator[None]:
    """Turns what huggingface_hub raises into one sentence."""
    try:
        yield
    except (OSError, httpx2.HTTPError, HFValidationError, RevisionResolutionError) as error:
        raise BuildError(_sentence(source, error)) from error


def _sentence(source: Hub, error: BaseException) -> str:
    # It wraps what the Hub said in its own "cannot find it in the cache".
    while not isinstance(error, HfHubHTTPError | OfflineModeIsEnabled) and error.__cause__ is not None:
        error = error.__cause__
    endpoint, name = constants.ENDPOINT, source.repository
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: accept its licence at {endpoint}/{name}, then set HF_TOKEN to a token of yours"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no folder {name!r}, and {endpoint} has no such model, or not for you without HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {source.revision!r}"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"{endpoint} refuses {name} with status {status}: set HF_TOKEN to a token that may read it"
        return f"{endpoint} answered with status {status} when asked for {_name(source)}: build again later"
    if isinstance(error, HFValidationError):
        return f"{name!r} is neither a folder nor a name of the Hub's"
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not hold all of {_name(source)}"
    if isinstance(error, OSError) and error.strerror is not None:
        return f"cannot write to {error.filename or constants.HF_HUB_CACHE}: {error.strerror}"
    return (
        f"{endpoint} cannot be reached for {_name(source)}, which is not all in the cache: download it elsewhere "
        f"and build the folder by MODEL=path/to/folder, or set HF_ENDPOINT to a mirror ({error})"
    )
