"""The images that come from outside: which ones, pinned by digest in `images.lock`, and how they get here."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from tools.deploy.docker import DeployError, docker, docker_api

LOCK = Path(__file__).with_name("images.lock")
NEEDED = {
    "cpu": ("PYTHON_IMAGE",),
    "gpu": ("PYTHON_IMAGE", "TRITONSERVER_IMAGE"),
    "replicas": ("PYTHON_IMAGE", "HAPROXY_IMAGE"),
    "watch": ("PROMETHEUS_IMAGE", "GRAFANA_IMAGE"),
    "watch-gpu": ("DCGM_EXPORTER_IMAGE",),
}
"""Profile of the Compose file -> the entries of the lock that its images are, or are built from."""

NGC = "nvcr.io/"
NGC_USER = "$oauthtoken"
"""What NGC wants as the name of whoever has an API key; nothing to be filled in."""

NGC_LOGIN = (
    "nvcr.io wants a login: make a key at ngc.nvidia.com, set NGC_API_KEY, or NGC_API_KEY_FILE to a file with it, "
    f"or run `docker login nvcr.io -u '{NGC_USER}'` and paste the key"
)


def read_lock() -> dict[str, str]:
    """Name -> image of every entry, where the environment has not another image under that name."""
    entries = re.findall(r"^(\w+)=(.+)$", LOCK.read_text(), re.MULTILINE)
    return {name: os.environ.get(name) or image for name, image in entries}


def digest(image: str) -> str:
    """The digest that `image` is pinned to, or nothing."""
    return image.partition("@")[2]


def check_pinned(images: Mapping[str, str], profiles: Sequence[str]) -> None:
    """Raises DeployError when an image of `profiles` has no digest, unless ALLOW_UNPINNED=1 is set."""
    needed = [images[name] for profile in profiles for name in NEEDED[profile]]
    loose = [image for image in needed if not digest(image)]
    if loose and os.environ.get("ALLOW_UNPINNED") != "1":
        raise DeployError(
            f"not pinned to a digest: {', '.join(loose)}: run `make pin` where the registry can be reached, "
            "or set ALLOW_UNPINNED=1 to take whatever the tag names today"
        )


def bring(image: str) -> None:
    """Pulls `image` unless it is here; raises DeployError when it cannot be had."""
    if docker("image", "inspect", image).returncode == 0:
        return
    key = ngc_key() if image.startswith(NGC) else None
    if key:
        docker("login", NGC.rstrip("/"), "--username", NGC_USER, "--password-stdin", feed=key)
    print(f"pulling {image}", flush=True)
    pulled = docker("pull", "--quiet", image)
    if pulled.returncode:
        raise DeployError(_unreachable(image, pulled.stderr.strip()))


def pin() -> None:
    """Writes into the lock the digest that every tag has in its registry now."""
    for name, image in read_lock().items():
        tagged = image.partition("@")[0]
        pinned = f"{tagged}@{resolve(tagged)}"
        LOCK.write_text(re.sub(rf"^{name}=.*$", f"{name}={pinned}", LOCK.read_text(), flags=re.MULTILINE))
        print(pinned, flush=True)


def resolve(image: str) -> str:
    """The digest of a tag, of all its platforms together, as the engine gets it from the registry."""
    key = ngc_key() if image.startswith(NGC) else None
    login = json.dumps({"username": NGC_USER, "password": key} if key else {})
    headers = {"X-Registry-Auth": base64.urlsafe_b64encode(login.encode()).decode()}
    status, answer = docker_api(f"/distribution/{quote(image)}/json", headers)
    if status != 200:
        raise DeployError(_unreachable(image, str(answer.get("message", answer))))
    return str(answer["Descriptor"]["digest"])


def ngc_key() -> str | None:
    """The API key of NVIDIA's registry, from the environment or the file that it names."""
    if file := os.environ.get("NGC_API_KEY_FILE"):
        try:
            return Path(file).read_text().strip()
        except OSError as error:
            raise DeployError(f"cannot read NGC_API_KEY_FILE {file}: {error.strerror}") from None
    return os.environ.get("NGC_API_KEY")


def _unreachable(image: str, reason: str) -> str:
    return f"cannot get {image}: {reason}" + (f"\n  {NGC_LOGIN}" if image.startswith(NGC) else "")
