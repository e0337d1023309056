"""What tests with real containers need where no image can be pulled: a base image and an index of wheels."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT

BASE = "triton-embeddings-tests/base:bookworm-haproxy"
CACHE = ROOT / ".cache" / "containers"
LOCKS = [ROOT / name for name in ("build/images/shim.lock", "build/images/triton-cpu.lock")]
EXTRAS = [ROOT / name for name in ("chat.lock", "documents.lock")]
TRASH = (
    "dev",
    "proc",
    "sys",
    "var/cache/apt",
    "var/lib/apt/lists",
    "usr/share/doc",
    "usr/share/locale",
    "usr/share/man",
)
INDEX_PORT = 18099
INDEX_PASSWORD = "a-password-of-the-index"
"""Which no image may remember; any is taken."""
"""Always the same, so that the engine's build cache serves the next run of the tests."""


def require(program: str) -> None:
    """Skips a test where `program` is not installed; fails it where REQUIRE_DOCKER=1."""
    if not shutil.which(program):
        (pytest.fail if os.environ.get("REQUIRE_DOCKER") == "1" else pytest.skip)(f"{program} is not installed")


@contextmanager
def engine() -> Iterator[str | None]:
    """Docker for as long as the context lasts, started where it does not run already; or why there can be none."""
    absent = [program for program in ("docker", "debootstrap", "docker-registry") if not shutil.which(program)]
    if absent:
        yield f"{' and '.join(absent)} not installed"
    elif answers():
        yield None
    elif os.geteuid() or not shutil.which("dockerd"):
        yield "no Docker engine answers, and only root can start one"
    else:
        CACHE.mkdir(parents=True, exist_ok=True)
        with (
            (CACHE / "dockerd.log").open("wb") as log,
            subprocess.Popen("dockerd", stdout=log, stderr=log) as daemon,
        ):
            try:
                until(lambda: answers() or daemon.poll() is not None, 60)
                yield f"dockerd ended, see {log.name}" if daemon.poll() is not None else None
            finally:
                daemon.terminate()


def answers() -> bool:
    """Whether an engine runs."""
    return subprocess.run(["docker", "info"], capture_output=True).returncode == 0


def make_base() -> str:
    """A slim Debian with Python and HAProxy, made by debootstrap: it stands in for the lock's images."""
    if subprocess.run(["docker", "image", "inspect", BASE], capture_output=True).returncode:
        folder = CACHE / "base"
        shutil.rmtree(folder, ignore_errors=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        packages = "--include=python3-venv,libpython3.11,haproxy"
        run("debootstrap", "--variant=minbase", packages, "bookworm", str(folder))
        trash = [f"--exclude=./{path}" for path in TRASH]
        archive = CACHE / "base.tar"
        run("tar", "-C", str(folder), "-cf", str(archive), *trash, ".")
        run("docker", "import", str(archive), BASE)
        archive.unlink()
        shutil.rmtree(folder)
    return BASE


@contextmanager
def package_index(locks: Sequence[Path] = LOCKS) -> Iterator[str]:
    """URL of an index on loopback with the locked wheels, which this machine's own pip has fetched."""
    folder = CACHE / "wheels"
    python = subprocess.check_output(["docker", "run", "--rm", BASE, "python3", "-V"], text=True).split()[1]
    version = ".".join(python.split(".")[:2])
    options = ["--only-binary=:all:", f"--python-version={version}", "--no-deps", "--require-hashes", "-q"]
    for lock in locks:
        run(sys.executable, "-m", "pip", "download", *options, "-r", str(lock), "-d", str(folder))
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
            yield f"http://somebody:{INDEX_PASSWORD}@127.0.0.1:{INDEX_PORT}/"
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


@contextmanager
def registry(port: int, folder: Path) -> Iterator[None]:
    """A real registry on loopback, which engines take without TLS."""
    config = folder / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: 127.0.0.1:{port}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder / 'registry'}}}}}\n"
    )
    with (
        (folder / "registry.log").open("wb") as log,
        subprocess.Popen(["docker-registry", "serve", config], stdout=log, stderr=log) as server,
    ):
        try:
            until(lambda: server.poll() is None and listens(port), 30)
            yield
        finally:
            server.terminate()


def listens(port: int) -> bool:
    """Whether something on loopback takes connections."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(condition: Callable[[], bool], seconds: float = 60) -> float:
    """Waits until `condition()` holds; returns how long that took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - started
