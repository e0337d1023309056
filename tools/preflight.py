"""Checks that this machine and this Python can run the server, before anything is installed.

Runs on a bare interpreter: `python3 -m tools.preflight`. Standard library only, in syntax that old Pythons read.
With `--lock` it prints the name of the lock that belongs on this machine: `gpu` where torch can use a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import platform
import sys
import sysconfig
from collections.abc import Iterator, Sequence

from build import gpu

PYTHONS = ((3, 10), (3, 13))
MACHINES = ("x86_64", "aarch64")
GLIBC = (2, 35)
BUNDLED_LIBPYTHON = (3, 13)
"""The one Python whose shared library the Triton wheel carries itself."""


def problems() -> Iterator[str]:
    """Every reason why the server cannot run here, as a sentence that says what to change."""
    version = sys.version_info[:2]
    lowest, highest = (".".join(map(str, python)) for python in PYTHONS)
    if not PYTHONS[0] <= version <= PYTHONS[1]:
        yield (
            f"this is Python {platform.python_version()}, the server needs {lowest} to {highest}: "
            "name another with `make PYTHON=python3.12 ...`"
        )
        return
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        yield (
            f"this is {sys.platform} on {platform.machine()}, the embedded Triton needs Linux on x86_64 or "
            "aarch64: mount model_repository/ into NVIDIA's tritonserver image instead"
        )
        return
    library, found = platform.libc_ver()
    if library != "glibc" or tuple(map(int, found.split(".")[:2])) < GLIBC:
        needed = ".".join(map(str, GLIBC))
        yield (
            f"the C library is {library or 'unknown'} {found}, the embedded Triton needs glibc {needed} "
            "(Debian 12, Ubuntu 22.04 or newer)"
        )
    if importlib.util.find_spec("ensurepip") is None:
        package = f"python{version[0]}.{version[1]}-venv"
        yield f"Python has no ensurepip: install it (Debian, Ubuntu: apt install {package})"
    if version != BUNDLED_LIBPYTHON and not loadable(libpython()):
        yield (
            f"{libpython()} is missing, which Triton's Python backend needs: install it (Debian, Ubuntu: "
            f"apt install libpython{version[0]}.{version[1]}) or use a Python built with --enable-shared"
        )


def libpython() -> str:
    """The shared library of the running Python, as Triton's Python backend asks for it."""
    return f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0"


def loadable(library: str) -> bool:
    """Whether the loader finds `library` by itself or in this Python's library folder."""
    for name in (library, f"{sysconfig.get_config_var('LIBDIR')}/{library}"):
        try:
            ctypes.CDLL(name)
            return True
        except OSError:
            continue
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints every problem, and why a GPU is not used; returns 1 when there is a problem."""
    parser = argparse.ArgumentParser(prog="python -m tools.preflight", description=str(__doc__).splitlines()[0])
    parser.add_argument("--lock", action="store_true", help="print the name of the lock for this machine instead")
    options = parser.parse_args(arguments)
    cards = gpu.cards()
    reasons = list(gpu.problems(cards))
    if options.lock:
        print("gpu" if cards and not reasons else "serve")
        return 0
    found = list(problems())
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    for reason in reasons:
        print(f"note: the GPU is not used: {reason}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
