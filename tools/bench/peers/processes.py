"""Other people's environments and servers."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tools.bench.server import Process
from tools.command import ROOT

HERE = Path(__file__).parent
CACHE = ROOT / ".cache" / "peers"
START_SECONDS = 600
OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}


def environment(name: str) -> Path:
    """The Python of a virtual environment with the pinned packages of `name`.txt, made once."""
    folder, pins = CACHE / name, HERE / f"{name}.txt"
    stamp = folder / pins.name
    python = folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != pins.read_text():
        print(f"installing {name}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-input", "-r", str(pins)], check=True)
        shutil.copy(pins, stamp)
    return python


@contextmanager
def listening(words: list[str], port: int, environment: dict[str, str]) -> Iterator[Process]:
    """Runs a server while the block runs, from the moment that it listens on `port`."""
    CACHE.mkdir(parents=True, exist_ok=True)
    log = CACHE / "servers.log"
    with (
        log.open("a") as output,
        subprocess.Popen(words, cwd=ROOT, env=os.environ | environment, stdout=output, stderr=output) as process,
    ):
        try:
            for _ in range(START_SECONDS * 10):
                with socket.socket() as probe:
                    if not probe.connect_ex(("127.0.0.1", port)):
                        break
                if process.poll() is not None:
                    raise SystemExit(f"{words[0]} did not start: {log} has its last words")
                time.sleep(0.1)
            yield Process(psutil.Process(process.pid))
        finally:
            process.terminate()
