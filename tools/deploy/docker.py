"""Docker and Compose: whether they are here, and what is asked of them."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPOSE_FILE = Path(__file__).with_name("compose.yaml")
CHAT_FILE = COMPOSE_FILE.with_name("chat.yaml")
PROJECT = "triton-embeddings"
OLDEST_COMPOSE = (1, 29)
INSTALL = "Debian, Ubuntu: apt install docker.io docker-compose"
WITHOUT = "`make serve` needs neither Docker nor Compose"


class DeployError(Exception):
    """Something is missing or has failed; the message says what and how to go on."""


@dataclass(frozen=True)
class Docker:
    """A Docker engine that answers, and a Compose that can drive it."""

    compose: tuple[str, ...]
    """`docker compose`, or `docker-compose` of 1.29 or newer."""

    @classmethod
    def find(cls) -> Docker:
        """What this machine has; raises DeployError with what is missing."""
        if not shutil.which("docker"):
            raise DeployError(f"docker is not installed ({INSTALL}); {WITHOUT}")
        compose = _compose()
        if compose is None:
            oldest = ".".join(map(str, OLDEST_COMPOSE))
            raise DeployError(
                f"there is no Compose v2 and no docker-compose from {oldest} on ({INSTALL}); {WITHOUT}"
            )
        answer = docker("version", "--format", "{{.Server.Version}}")
        if answer.returncode:
            raise DeployError(
                f"no Docker engine answers ({_last_line(answer.stderr)}): start it, "
                f"and belong to the group docker or be root; {WITHOUT}"
            )
        return cls(compose)

    def command(self, profiles: Sequence[str], *arguments: str) -> list[str]:
        """A Compose command on this stack; every setting reaches it through the environment."""
        project = os.environ.get("COMPOSE_PROJECT_NAME", PROJECT)
        files = [COMPOSE_FILE, CHAT_FILE] if "chat" in extras() else [COMPOSE_FILE]
        options = [word for file in files for word in ("-f", str(file))]
        options += [word for profile in profiles for word in ("--profile", profile)]
        return [*self.compose, "-p", project, *options, *arguments]

    def run(self, profiles: Sequence[str], environment: Mapping[str, str], *arguments: str) -> None:
        """Runs a Compose command; raises DeployError when it fails."""
        done = subprocess.run(self.command(profiles, *arguments), env={**os.environ, **environment})
        if done.returncode:
            raise DeployError(f"{' '.join([*self.compose, *arguments])} ended with status {done.returncode}")

    def output(self, profiles: Sequence[str], environment: Mapping[str, str], *arguments: str) -> str:
        """What a Compose command prints; nothing where it fails."""
        command = self.command(profiles, *arguments)
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        return done.stdout.strip()


def extras() -> list[str]:
    """What of chat and documents the stack is to have, beside the rest."""
    return os.environ.get("EXTRAS", "").split()


def docker(*arguments: str, feed: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs docker itself; the caller looks at the status."""
    return subprocess.run(["docker", *arguments], input=feed, capture_output=True, text=True)


def docker_api(path: str, headers: Mapping[str, str]) -> tuple[int, Any]:
    """GET on the engine's own API: what the command line of every Docker version can do is less than that."""
    host = (
        os.environ.get("DOCKER_HOST")
        or docker("context", "inspect", "--format", "{{.Endpoints.docker.Host}}").stdout.strip()
    )
    if not host.startswith("unix://"):
        raise DeployError(f"the engine at {host} is not on this machine: run this where its socket is")
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.connect(host.removeprefix("unix://"))
        connection.request("GET", path, headers=dict(headers))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except OSError as error:
        raise DeployError(f"the Docker engine at {host} does not answer: {error}") from None
    finally:
        connection.close()


def _compose() -> tuple[str, ...] | None:
    for command in (("docker", "compose"), ("docker-compose",)):
        if not shutil.which(command[0]):
            continue
        done = subprocess.run([*command, "version", "--short"], capture_output=True, text=True)
        version = re.match(r"v?(\d+)\.(\d+)", done.stdout)
        if done.returncode == 0 and version and tuple(map(int, version.groups())) >= OLDEST_COMPOSE:
            return command
    return None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[-1]
