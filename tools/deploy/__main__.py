"""Runs the stack in containers: `make deploy`, `undeploy`, `logs`, `smoke` and `pin`.

Settings are environment variables, which docs/containers.md lists: TARGET is cpu, gpu or replicas, REPLICAS how
many of these, WATCH=1 adds Prometheus and Grafana, EXTRAS are chat, documents or both; the rest is read by
compose.yaml.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from build import gpu
from tools.command import CHAT_PORT, EMBED_PORT, RERANK_PORT, Ports
from tools.deploy.docker import DeployError, Docker, docker, extras
from tools.deploy.images import NEEDED, bring, check_pinned, digest, pin, read_lock
from tools.deploy.smoke import ask, smoke, watched

TARGETS = [profile for profile in NEEDED if not profile.startswith("watch")]

START_SECONDS = 900
"""How long a stack may take until it answers: large models are loaded, engines compile."""

RESTARTS = 2
"""A container that has been started again this often does not get any further by itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Does one of the commands; returns 1 with a sentence when that is not possible."""
    commands = {"check": check, "up": up, "down": down, "logs": logs, "smoke": converse, "pin": pin_images}
    parser = argparse.ArgumentParser(prog="python -m tools.deploy", description=str(__doc__).splitlines()[0])
    parser.add_argument("command", choices=commands)
    options = parser.parse_args(arguments)
    try:
        target = os.environ.get("TARGET") or "cpu"
        if target not in TARGETS:
            raise DeployError(f"TARGET is {target!r}: choose {' or '.join(TARGETS)}")
        commands[options.command](Docker.find(), target)
    except DeployError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def check(_: Docker, target: str) -> None:
    """What can be said before anything is built or pulled."""
    if os.environ.get("RUNTIME") == "torch":
        raise DeployError("the images have no torch: choose RUNTIME=onnxruntime or tensorrt, or `make serve`")
    if os.environ.get("RUNTIME") == "vllm":
        raise DeployError("the images have no vLLM: run NVIDIA's own that has, as docs/chat.md says")
    if target == "gpu" and extras():
        raise DeployError(
            f"the image of TARGET=gpu has no library for {' and '.join(extras())}: deploy them with TARGET=cpu"
        )
    check_pinned(read_lock(), profiles(target))
    check_keys()


def check_keys() -> None:
    """Raises DeployError for keys that would not reach the gateway, so that it would be open to everybody."""
    if os.environ.get("GATEWAY_API_KEYS"):
        raise DeployError(
            "GATEWAY_API_KEYS is set, which `docker inspect` would show: write the keys into a file, one a line, "
            "and name it by GATEWAY_API_KEYS_FILE"
        )
    file = os.environ.get("GATEWAY_API_KEYS_FILE")
    if file and not (Path(file).is_absolute() and Path(file).exists()):
        raise DeployError(f"GATEWAY_API_KEYS_FILE is {file}: name a file that is there, by its absolute path")


def up(compose: Docker, target: str) -> None:
    """Builds the images, starts the stack, waits until it answers, tries it and says where it is."""
    images = read_lock()
    check_pinned(images, profiles(target))
    for profile in profiles(target):
        for name in NEEDED[profile]:
            bring(images[name])
    environment = settings(images)
    compose.run([target], environment, "build")
    if target == "gpu" and os.environ.get("RUNTIME") == "tensorrt":
        # As whoever owns the model repository, since plans are written into it.
        environment |= {"PLANS_USER": f"{os.getuid()}:{os.getgid()}"}
        compose.run(["plans"], environment, "run", "--rm", "plans")
    started = time.monotonic()
    start(compose, target, environment)
    print(f"answers after {time.monotonic() - started:.0f} s", flush=True)
    converse(compose, target)


def start(compose: Docker, target: str, environment: Mapping[str, str]) -> None:
    """Starts the containers and waits for the gateway; raises DeployError where one cannot run, all removed."""
    before = {container: restarts(container) for container in containers(compose)}
    scale = ["--scale", f"triton-replica={os.environ.get('REPLICAS') or 2}"] if target == "replicas" else []
    command = compose.command(profiles(target), "up", "-d", *scale)
    starting = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (starting.poll() == 0 and answers(compose, target)):
            crashing = any(restarts(one) - before.get(one, 0) >= RESTARTS for one in containers(compose))
            if crashing or starting.returncode or time.monotonic() > deadline:
                starting.terminate()
                starting.wait()
                said = compose.output(profiles(target), environment, "logs", "--no-color", "--tail=20")
                down(compose, target)
                raise DeployError(f"the stack does not start and is taken down; it said\n{said}")
            time.sleep(0.5)
    finally:
        starting.terminate()
        starting.wait()


def down(compose: Docker, _: str) -> None:
    """Stops whatever of the stack runs and removes its containers and network; images stay for the next time."""
    compose.run([*NEEDED, "plans"], settings(read_lock()), "down", "--volumes", "--remove-orphans")


def logs(compose: Docker, target: str) -> None:
    """Follows what the containers write."""
    compose.run(profiles(target), settings(read_lock()), "logs", "--follow", "--tail=200")


def converse(compose: Docker, target: str) -> None:
    """Tries the running stack and prints its URLs."""
    embed, rerank = url(compose, target, "shim", EMBED_PORT), url(compose, target, "shim", RERANK_PORT)
    for line in smoke(embed, rerank):
        print(f"  {line}")
    routes = [f"{embed}/embed", f"{rerank}/rerank"]
    with suppress(DeployError):  # published with CHAT=1 alone
        routes.append(f"{url(compose, target, 'shim', CHAT_PORT)}/v1/chat/completions")
    print(f"gateway   {'  '.join(routes)}  (also /health, /models and /metrics)")
    grpc = url(compose, target, "triton", Ports.grpc).removeprefix("http://")
    if target == "replicas":
        print(f"HAProxy   gRPC {grpc}", flush=True)
    else:
        http, metrics = (url(compose, target, "triton", port) for port in (Ports.http, Ports.metrics))
        print(f"Triton    HTTP {http}  gRPC {grpc}  metrics {metrics}/metrics", flush=True)
    if is_watched():
        prometheus, grafana = url(compose, target, "prometheus", 9090), url(compose, target, "grafana", 3000)
        print(f"  {watched(prometheus, grafana)}")
        print(f"Prometheus {prometheus}  Grafana {grafana}", flush=True)


def pin_images(_: Docker, __: str) -> None:
    """Records the digests that the tags of the lock have now."""
    pin()


def settings(images: Mapping[str, str]) -> dict[str, str]:
    """What Compose is told beyond the caller's own environment."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    most = os.environ.get("TRITON_MEMORY") or f"{pages * size * 9 // 10 >> 20}m"
    # Of a GPU, or of the half of the machine that is not for what else runs on it.
    free = gpu.room(gpu.cards()) if os.environ.get("TARGET") == "gpu" else None
    models = os.environ.get("MODEL_MEMORY") or f"{(free * 9 // 10 if free else pages * size // 2) >> 20}MiB"
    digests = {"TRITON_IMAGE_DIGEST": digest(images["TRITONSERVER_IMAGE"])}
    return {**images, **digests, "TRITON_MEMORY": most, "MODEL_MEMORY": models}


def answers(compose: Docker, target: str) -> bool:
    """Whether the gateway says that a model has answered; what is said of the others, `smoke` shows."""
    try:
        return bool(ask(f"{url(compose, target, 'shim', EMBED_PORT)}/health?partial=1"))
    except DeployError:
        return False


def url(compose: Docker, target: str, service: str, port: int) -> str:
    """Where a container's port is on this machine."""
    service = f"{service}-{target}" if target != "cpu" and service in ("triton", "shim") else service
    address = compose.output(profiles(target), settings(read_lock()), "port", service, str(port))
    if not address or address.endswith(":0"):
        raise DeployError(f"{service} is not running: `make deploy` starts it, `make logs` says what happened")
    return f"http://{re.sub(r'^(0[.]0[.]0[.]0|127[.]0[.]0[.]1):', 'localhost:', address)}"


def is_watched() -> bool:
    """Whether Prometheus and Grafana belong to the stack."""
    return os.environ.get("WATCH") == "1"


def profiles(target: str) -> list[str]:
    """What of the Compose file is run."""
    return [target, *(profile for profile in ("watch", f"watch-{target}") if is_watched() and profile in NEEDED)]


def containers(compose: Docker) -> list[str]:
    """The stack's containers."""
    return compose.output([*NEEDED, "plans"], settings(read_lock()), "ps", "--quiet").split()


def restarts(container: str) -> int:
    """How often the engine has started a container again."""
    # Compose may have removed it since.
    return int(docker("inspect", "--format", "{{.RestartCount}}", container).stdout.strip() or 0)


if __name__ == "__main__":
    sys.exit(main())
