"""The nvidia-pytriton wheel, of which only binaries are used: where they are, and what they need around them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from tools import access
from tools.command import ServerError
from tools.triton import stubs

STUB_NUMPY2 = Path(__file__).with_name("stub_numpy2.py")


def server() -> Path:
    """The folder of tritonserver: `bin`, `backends`, `caches`, `python_backend_stubs`."""
    return _site_packages() / "pytriton" / "tritonserver"


def libraries() -> Path:
    """The folder of the shared libraries that tritonserver needs."""
    return _site_packages() / "nvidia_pytriton.libs"


def _site_packages() -> Path:
    """Where the wheel is installed; the package itself is not imported. Raises ServerError where it is not."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError("the nvidia-pytriton wheel is not installed: run `make setup`")
    return Path(spec.origin).parent.parent


def assemble_backends(work_folder: Path) -> Path:
    """A backend directory whose Python backend has the stub of the running Python."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server() / "python_backend_stubs" / version / stubs.PROGRAM
    if not stub.exists():
        raise ServerError(f"Python {version} has no stub in the wheel: use Python 3.10 to 3.13")
    folder = work_folder / f"backends-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "python").mkdir(parents=True)
    for file in (*(server() / "backends" / "python").iterdir(), stub, STUB_NUMPY2):
        (folder / "python" / file.name).symlink_to(file)
    # The module that every stub imports first brings the NumPy 2 support in.
    utils = folder / "python" / "triton_python_backend_utils.py"
    source = utils.read_text()
    utils.unlink()
    utils.write_text(f"{source}\nimport {STUB_NUMPY2.stem}  # noqa\n")
    return folder


def environment(with_object_store: bool) -> dict[str, str]:
    """The environment in which tritonserver finds its libraries and the stub finds this virtual environment."""
    folders = [str(libraries()), str(sysconfig.get_config_var("LIBDIR"))]
    folders += filter(None, [os.environ.get("LD_LIBRARY_PATH")])
    # The stub ignores PYTHONPATH and takes site-packages from the python3 that PATH finds first.
    search = [str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)]
    return {
        **access.passed_on(os.environ, with_object_store),
        "LD_LIBRARY_PATH": os.pathsep.join(folders),
        "PATH": os.pathsep.join(search),
        # As nvidia-smi counts them.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
