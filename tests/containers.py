"""What tests with real containers need where no image can be pulled: a base image and an index of wheels."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from conftest import ROOT

BASE = "triton-embeddings-tests/base:bookworm"
CACHE = ROOT / ".cache" / "containers"
LOCKS = ("serve.lock", "build/images/shim.lock")
INDEX_PORT = 18099
"""Always the same, so that the engine's build cache serves the next run of the tests."""


def missing() -> str | None:
    """Why there can be no containers here, or None."""
    for program in ("docker", "debootstrap"):
        if not shutil.which(program):
            return f"{program} is not installed"
    if subprocess.run(["docker", "info"], capture_output=True).returncode:
        return "no Docker engine answers"
    return None


def make_base() -> str:
    """A slim Debian with Python, made by debootstrap: it stands in for the lock's PYTHON_IMAGE."""
    if subprocess.run(["docker", "image", "inspect", BASE], capture_output=True).returncode:
        folder = CACHE / "base"
        shutil.rmtree(folder, ignore_errors=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        packages = "--include=python3-venv,libpython3.11"
        run("debootstrap", "--variant=minbase", packages, "bookworm", str(folder))
        trash = ["--exclude=./var/cache/apt", "--exclude=./var/lib/apt/lists", "--exclude=./usr/share/doc"]
        devices = ["--exclude=./dev", "--exclude=./proc", "--exclude=./sys"]
        archive = subprocess.Popen(["tar", "-C", folder, "-c", *trash, *devices, "."], stdout=subprocess.PIPE)
        subprocess.run(["docker", "import", "-", BASE], stdin=archive.stdout, check=True)
        assert archive.wait() == 0
        shutil.rmtree(folder)
    return BASE


@contextmanager
def package_index() -> Iterator[str]:
    """URL of an index on loopback with the locked wheels, which this machine's own pip has fetched."""
    folder = CACHE / "wheels"
    python = subprocess.check_output(["docker", "run", "--rm", BASE, "python3", "-V"], text=True).split()[1]
    version = ".".join(python.split(".")[:2])
    options = ["--only-binary=:all:", f"--python-version={version}", "--no-deps", "--require-hashes", "-q"]
    for lock in LOCKS:
        run(sys.executable, "-m", "pip", "download", *options, "-r", str(ROOT / lock), "-d", str(folder))
    index = CACHE / "index"
    shutil.rmtree(index, ignore_errors=True)
    for wheel in folder.iterdir():
        project = index / re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()
        project.mkdir(parents=True, exist_ok=True)
        os.link(wheel, project / wheel.name)
    handler = functools.partial(QuietHandler, directory=str(index))
    with http.server.ThreadingHTTPServer(("127.0.0.1", INDEX_PORT), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{INDEX_PORT}/"
        finally:
            server.shutdown()
            thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """A folder's listing is a project's page: links to its files."""

    def log_message(self, *_: object) -> None:
        pass


def run(*command: str) -> None:
    """Runs a command that must succeed, and shows what it said where it did not."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def until(condition: object, seconds: float) -> None:
    """Waits until `condition()` holds."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)
