"""`make deploy`: real containers from the real Compose file, and what it says where there is no Docker."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import containers
import numpy as np
import pytest
import yaml
from conftest import ROOT, Answer, Reference, Stack, free_ports, send
from load import Load

from tools.deploy import images, smoke
from tools.deploy.docker import DeployError

FOLDER = ROOT / "tools" / "deploy"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
IMAGES = ROOT / "build" / "images"
LOCKS = sorted(IMAGES.glob("*.lock"))
PROJECT = "triton-embeddings-tests"
STORAGE = "prometheus:/prometheus"
SECRET = "secret:/run/triton"
PORTS = {"EMBED_PORT": "embed", "RERANK_PORT": "rerank", "HTTP_PORT": "http", "GRPC_PORT": "grpc"}


def pins(lock: Path) -> set[str]:
    return set(re.findall(r"^\S+==\S+", lock.read_text(), re.MULTILINE))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_images_install_what_is_served_and_tested_here(lock: Path) -> None:
    assert pins(lock) <= pins(ROOT / "serve.lock")


def test_the_lock_has_the_images_that_are_referenced_and_no_others() -> None:
    used = set(re.findall(r"\$\{(\w+_IMAGE)\}", (FOLDER / "compose.yaml").read_text()))
    assert used == set(images.read_lock())
    assert used == {name for names in images.NEEDED.values() for name in names}
    for service in COMPOSE["services"].values():
        ours = service["image"].startswith("${IMAGES:-triton-embeddings}/")
        assert ours == ("build" in service)
        assert ours or re.fullmatch(r"\$\{\w+_IMAGE\}", service["image"])
    for dockerfile in IMAGES.glob("*.Dockerfile"):
        assert set(re.findall(r"^FROM (\S+)", dockerfile.read_text(), re.MULTILINE)) == {"${BASE}"}


@pytest.mark.parametrize(
    ("profile", "count"), [("cpu", 2), ("gpu", 2), ("replicas", 3), ("watch", 2), ("watch-gpu", 1)]
)
def test_services_are_confined(profile: str, count: int) -> None:
    services = [service for service in COMPOSE["services"].values() if profile in service["profiles"]]
    assert len(services) == count
    for service in services:
        # Our own images have both already.
        assert "build" in service or (int(service["user"].split(":")[0]) and service["healthcheck"]["test"])
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["restart"] == "unless-stopped"
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}
        for port in service.get("ports", []):
            own = "TRITON_" * port.endswith((":8200", ":8201", ":8202"))
            assert port.startswith(f"${{{own}BIND_ADDRESS:-127.0.0.1}}:")
        writable = [volume for volume in service.get("volumes", []) if not volume.endswith(":ro")]
        assert set(writable) <= {STORAGE, SECRET}


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_memory_and_processes_are_bounded(name: str) -> None:
    service = COMPOSE["services"][name]
    assert {"mem_limit", "pids_limit"} <= service.keys()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"GATEWAY_API_KEYS": "a-key-of-the-gateway"}, "which `docker inspect` would show"),
        ({"GATEWAY_API_KEYS_FILE": "keys"}, "by its absolute path"),
        ({"GATEWAY_API_KEYS_FILE": "/none/keys"}, "name a file that is there"),
    ],
)
def test_keys_that_would_not_reach_the_gateway(tmp_path: Path, environment: dict[str, str], words: str) -> None:
    program(tmp_path, "docker", "echo 26.1.0")
    assert words in deploy("check", tmp_path, ALLOW_UNPINNED="1", **environment)


def test_every_file_of_the_watchers_is_mounted() -> None:
    volumes = [volume for service in COMPOSE["services"].values() for volume in service.get("volumes", [])]
    mounted = {volume.split(":")[0] for volume in volumes if volume.startswith("./watch/")}
    assert mounted == {f"./watch/{path.name}" for path in (FOLDER / "watch").iterdir()}


def deploy(command: str, programs: Path, **environment: str) -> str:
    """What `python -m tools.deploy` says on a machine that has these programs only; it must fail."""
    environment = {"PATH": str(programs), **environment}
    arguments = [sys.executable, "-m", "tools.deploy", command]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    return done.stderr


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_laptop_without_docker(tmp_path: Path) -> None:
    said = deploy("up", tmp_path)
    assert "docker is not installed" in said
    assert "`make serve` needs neither" in said


def test_docker_without_compose(tmp_path: Path) -> None:
    program(tmp_path, "docker", "exit 1")
    program(tmp_path, "docker-compose", "echo 1.25.0")
    said = deploy("up", tmp_path)
    assert "no docker-compose from 1.29 on" in said
    assert "`make serve` needs neither" in said


def test_an_engine_that_does_not_run(tmp_path: Path) -> None:
    program(
        tmp_path, "docker", 'if [ "$1" = compose ]; then echo v2.30.1; else echo "is it running?" >&2; exit 1; fi'
    )
    assert "no Docker engine answers (is it running?)" in deploy("up", tmp_path)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_unpinned_image_is_refused(tmp_path: Path, target: str) -> None:
    program(tmp_path, "docker", "echo 2.30.1")
    loose = {"PYTHON_IMAGE": "python:3", "TRITONSERVER_IMAGE": "nvcr.io/nvidia/tritonserver:1"}
    said = deploy("check", tmp_path, TARGET=target, **loose)
    assert "python:3" in said
    assert ("nvcr.io" in said) == (target == "gpu")
    assert "`make pin`" in said


def test_watchers_are_pinned_too(tmp_path: Path) -> None:
    program(tmp_path, "docker", "echo 2.30.1")
    pinned = {"PYTHON_IMAGE": f"python:3@sha256:{'0' * 64}"}
    said = deploy(
        "check", tmp_path, WATCH="1", GRAFANA_IMAGE="grafana:1", PROMETHEUS_IMAGE="prometheus:1", **pinned
    )
    assert "not pinned to a digest: prometheus:1, grafana:1: run" in said
    said = deploy("check", tmp_path, WATCH="1", TARGET="gpu", DCGM_EXPORTER_IMAGE="dcgm-exporter:1", **pinned)
    assert "dcgm-exporter:1" in said


def test_a_pinned_image_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALLOW_UNPINNED", raising=False)
    images.check_pinned({"PYTHON_IMAGE": f"python:3@sha256:{'0' * 64}"}, ["cpu"])


def test_an_unknown_target(tmp_path: Path) -> None:
    assert "choose cpu or gpu" in deploy("up", tmp_path, TARGET="tpu")


def test_no_image_has_torch(tmp_path: Path) -> None:
    program(tmp_path, "docker", "echo 2.30.1")
    assert "choose RUNTIME=onnxruntime or tensorrt" in deploy("check", tmp_path, TARGET="gpu", RUNTIME="torch")


def test_no_image_has_vllm(tmp_path: Path) -> None:
    program(tmp_path, "docker", "echo 2.30.1")
    assert "the images have no vLLM" in deploy("check", tmp_path, TARGET="gpu", RUNTIME="vllm")


def test_chat_and_documents_need_a_cpu(tmp_path: Path) -> None:
    program(tmp_path, "docker", "echo 2.30.1")
    said = deploy("check", tmp_path, TARGET="gpu", EXTRAS="documents chat")
    assert "has no library for documents and chat: deploy them with TARGET=cpu" in said


@pytest.mark.parametrize(("image", "asked"), [("nvcr.io/nvidia/tritonserver:1", True), ("python:3", False)])
def test_ngc_is_asked_for_when_it_is_needed(monkeypatch: pytest.MonkeyPatch, image: str, asked: bool) -> None:
    def docker(*arguments: str, **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(arguments, 1, "", "unauthorized")

    monkeypatch.setattr(images, "docker", docker)
    with pytest.raises(DeployError, match="unauthorized") as error:
        images.bring(image)
    assert ("NGC_API_KEY" in str(error.value)) == asked


def test_the_key_comes_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGC_API_KEY", "one")
    assert images.ngc_key() == "one"
    (tmp_path / "key").write_text("two\n")
    monkeypatch.setenv("NGC_API_KEY_FILE", str(tmp_path / "key"))
    assert images.ngc_key() == "two"


def test_smoke_of_a_gateway_with_keys(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed, rerank = free_ports(2)
    ports = ["--embed-port", str(embed), "--rerank-port", str(rerank)]
    command = [sys.executable, "-m", "tools.shim", "--triton", f"127.0.0.1:{stack.ports['grpc']}", *ports]
    urls = f"http://127.0.0.1:{embed}", f"http://127.0.0.1:{rerank}"
    (tmp_path / "keys").write_text("the-first-of-two-keys\nthe-second-of-two-keys\n")
    keys = {"GATEWAY_API_KEYS_FILE": str(tmp_path / "keys")}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | keys, stdout=subprocess.DEVNULL) as gateway:
        try:
            containers.until(lambda: containers.listens(embed), 30)
            with pytest.raises(DeployError, match="answers 401"):
                smoke.smoke(*urls)
            monkeypatch.setenv("GATEWAY_API_KEYS_FILE", keys["GATEWAY_API_KEYS_FILE"])
            assert len(smoke.smoke(*urls)) == 2
        finally:
            gateway.terminate()
    for service in ("shim", "shim-gpu"):
        assert COMPOSE["services"][service]["environment"].keys() >= {
            *keys,
            "GATEWAY_ALIASES",
            "GATEWAY_ALLOW_ORIGIN",
        }


@dataclass
class Deployed:
    """The stack in containers, and the commands as an operator gives them."""

    environment: dict[str, str]
    gateway: Stack
    """Only its calls are used: the processes are in the containers."""
    checkout: Path = ROOT

    def make(self, target: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = ["make", target, f"PYTHON={sys.executable}", *words]
        return subprocess.run(command, cwd=self.checkout, env=self.environment, capture_output=True, text=True)

    def container(self, service: str) -> str:
        (found,) = self.containers(service)
        return found

    def containers(self, service: str) -> list[str]:
        project = self.environment["COMPOSE_PROJECT_NAME"]
        labels = [f"label=com.docker.compose.project={project}", f"label=com.docker.compose.service={service}"]
        filters = (word for label in labels for word in ("--filter", label))
        return docker("ps", "--all", "--quiet", *filters).split()

    def inspect(self, service: str, template: str) -> str:
        return docker("inspect", "--format", template, self.container(service))

    def python(self, service: str, code: str) -> subprocess.CompletedProcess[str]:
        """Runs Python in a container."""
        return python(self.container(service), code)

    def call(self) -> Answer:
        return self.gateway.post("embed", "/embed", {"texts": ["now"]})


def python(container: str, code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a container."""
    return subprocess.run(["docker", "exec", container, "python", "-c", code], capture_output=True, text=True)


KEY = "a-key-for-the-containers"


def docker(*arguments: str) -> str:
    return subprocess.check_output(["docker", *arguments], text=True).strip()


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    """A base image on a Docker engine; without one the test is skipped, or fails where REQUIRE_DOCKER=1."""
    with containers.engine() as missing:
        if missing and os.environ.get("REQUIRE_DOCKER") == "1":
            pytest.fail(missing)
        if missing:
            pytest.skip(missing)
        yield containers.make_base()


@contextmanager
def deployment(base: str, folder: Path, project: str, **settings: str) -> Iterator[Deployed]:
    """What `make deploy` starts."""
    gateway = Stack(folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment |= {name: str(gateway.ports[port]) for name, port in PORTS.items()}
    environment |= {
        "METRICS_PORT": str(gateway.ports["metrics"]),
        "PYTHON_IMAGE": base,
        "HAPROXY_IMAGE": base,
        "ALLOW_UNPINNED": "1",
        "COMPOSE_PROJECT_NAME": project,
        "IMAGES": PROJECT,
        "BUILD_NETWORK": "host",
        **settings,
    }
    with containers.package_index() as index:
        stack = Deployed(environment | {"PIP_INDEX_URL": index}, gateway)
        started = time.monotonic()
        done = stack.make("deploy")
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        print(f"deployed in {time.monotonic() - started:.0f} s\n{done.stdout[-1000:]}")
    yield stack
    stack.make("undeploy")


@pytest.fixture(scope="module")
def deployed(base: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    with deployment(base, tmp_path_factory.mktemp("deployed"), PROJECT) as running:
        yield running


with_containers = pytest.mark.timeout(1200)


@with_containers
def test_it_answers_as_the_embedded_server_does(deployed: Deployed, stack: Stack, reference: Reference) -> None:
    np.testing.assert_array_equal(deployed.gateway.embed(reference.texts), stack.embed(reference.texts))
    query, documents = reference.texts[0], reference.texts[1:40]
    assert deployed.gateway.rerank(query, documents) == stack.rerank(query, documents)
    (vector,) = deployed.gateway.infer("minilm", text=["straight to Triton"])["embeddings"]
    np.testing.assert_array_equal([vector], stack.infer("minilm", text=["straight to Triton"])["embeddings"])


@with_containers
def test_smoke(deployed: Deployed) -> None:
    done = deployed.make("smoke")
    assert done.returncode == 0
    assert "minilm: 3 texts, 384 dimensions, in order" in done.stdout
    assert f"http://localhost:{deployed.gateway.ports['embed']}/embed" in done.stdout


@with_containers
def test_the_liveness_probe_runs_in_the_container(deployed: Deployed) -> None:
    probe = ("python3", "-m", "tools.alive", "--work-folder", "/run/triton")
    docker("exec", deployed.container("triton"), *probe)


@with_containers
@pytest.mark.parametrize("service", ["triton", "shim"])
def test_containers_are_confined(deployed: Deployed, service: str) -> None:
    assert deployed.inspect(service, "{{.Config.User}}") == "10001:10001"
    assert deployed.inspect(service, "{{.HostConfig.ReadonlyRootfs}}") == "true"
    mounts = deployed.inspect(service, "{{range .Mounts}}{{.Destination}}={{.RW}} {{end}}").split()
    # Where Triton writes its secret, in memory.
    writable = ["/run/triton=true"] if service == "triton" else []
    assert [mount for mount in mounts if mount.endswith("=true")] == writable
    written = deployed.python(service, "open('/app/written', 'w')")
    assert "Read-only file system" in written.stderr
    listening = deployed.inspect(service, "{{range .NetworkSettings.Ports}}{{range .}}{{.HostIp}} {{end}}{{end}}")
    assert set(listening.split()) == {"127.0.0.1"}
    limits = deployed.inspect(service, "{{.HostConfig.Memory}} {{.HostConfig.PidsLimit}}").split()
    assert min(map(int, limits)) > 0


@with_containers
@pytest.mark.usefixtures("deployed")
@pytest.mark.parametrize("name", ["triton-cpu", "shim"])
def test_images_do_not_remember_the_password_of_an_index(name: str) -> None:
    image = f"{PROJECT}/{name}"
    known = docker("history", "--no-trunc", image) + docker("image", "inspect", image)
    assert "/opt/venv" in known
    assert containers.INDEX_PASSWORD not in known


@with_containers
def test_keys_come_in_a_file(deployed: Deployed, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n")
    (tmp_path / "keys").chmod(0o644)
    tmp_path.chmod(0o755)
    embed, rerank = free_ports(2)
    own = json.loads(docker("inspect", deployed.container("shim")))[0]
    assert {mount["Destination"]: mount["Source"] for mount in own["Mounts"]}["/run/keys"] == "/dev/null"
    options = ["--network", "host", "--volume", f"{tmp_path}/keys:/run/keys:ro", "--rm", "--detach"]
    command = ["--embed-port", str(embed), "--rerank-port", str(rerank), "--triton", "127.0.0.1:1"]
    gateway = docker("run", *options, "--env", "GATEWAY_API_KEYS_FILE=/run/keys", f"{PROJECT}/shim", *command)
    try:
        containers.until(lambda: containers.listens(embed), 30)
        url = f"http://127.0.0.1:{embed}/embed"
        assert send(urllib.request.Request(url, b'{"texts": ["a"]}')).status == 401
        bearer = {"Authorization": f"Bearer {KEY}"}
        assert send(urllib.request.Request(url, b'{"texts": ["a"]}', bearer)).status == 503
        assert KEY not in docker("inspect", gateway)
    finally:
        docker("kill", gateway)


@with_containers
def test_prometheus_watches_the_containers(deployed: Deployed, base: str, tmp_path: Path) -> None:
    """Debian's Prometheus stands in for PROMETHEUS_IMAGE; GRAFANA_IMAGE only says that it is there."""
    for name in ("prometheus", "promtool"):
        if not (found := shutil.which(name)):
            pytest.skip("prometheus is not installed (Debian: apt install prometheus)")
        shutil.copy(found, tmp_path)
    stand_ins = {
        "prometheus": "COPY prometheus promtool /bin/\nRUN mkdir /prometheus && chown 65534:65534 /prometheus",
        "grafana": "RUN mkdir /srv/api && echo {} >/srv/api/health\nCMD python3 -m http.server 3000 -d /srv",
    }
    ports = free_ports(len(stand_ins))
    environment = deployed.environment | {"WATCH": "1"}
    for (name, commands), port in zip(stand_ins.items(), ports, strict=True):
        (tmp_path / "Dockerfile").write_text(f"FROM {base}\n{commands}\n")
        image = f"{PROJECT}/{name}"
        docker("build", "--quiet", "--tag", image, str(tmp_path))
        environment |= {f"{name.upper()}_IMAGE": image, f"{name.upper()}_PORT": str(port)}
    done = Deployed(environment, deployed.gateway).make("deploy")
    assert done.returncode == 0, done.stderr
    assert "Prometheus hears gateway, triton" in done.stdout
    assert "Prometheus http://localhost:{}  Grafana http://localhost:{}".format(*ports) in done.stdout
    url = f"http://127.0.0.1:{ports[0]}/api/v1"
    ready = smoke.ask(f"{url}/query?query=gateway_model_ready")["data"]["result"]
    assert {one["metric"]["model"]: one["value"][1] for one in ready} == {"minilm": "1", "minilm-rerank": "1"}
    assert {group["name"] for group in smoke.ask(f"{url}/rules")["data"]["groups"]} == {"alerts", "ratios"}
    assert deployed.inspect("prometheus", "{{.Config.User}}") == "65534:65534"
    assert deployed.inspect("prometheus", "{{.HostConfig.ReadonlyRootfs}}") == "true"
    containers.until(lambda: deployed.inspect("prometheus", "{{.State.Health.Status}}") == "healthy", 60)


KILL_TRITON = """
import os, pathlib
for comm in pathlib.Path("/proc").glob("[0-9]*/comm"):
    if comm.read_text().strip() == "tritonserver":
        os.kill(int(comm.parent.name), 9)
"""


@with_containers
def test_triton_dies_and_comes_back(deployed: Deployed) -> None:
    before = deployed.gateway.embed(["before and after"])
    assert deployed.python("triton", KILL_TRITON).returncode in (0, 137)
    answer = deployed.call()
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) >= 1
    containers.until(lambda: deployed.call().status == 200, 60)
    assert deployed.gateway.get("embed", "/health").status == 200
    assert deployed.inspect("triton", "{{.RestartCount}}") == "1"
    np.testing.assert_array_equal(deployed.gateway.embed(["before and after"]), before)
    assert "tritonserver was killed (SIGKILL" in docker_logs(deployed.container("triton"))


def docker_logs(container: str) -> str:
    return subprocess.run(["docker", "logs", container], capture_output=True, text=True).stderr


@with_containers
def test_a_container_that_cannot_start_is_shown(deployed: Deployed) -> None:
    broken = Deployed(deployed.environment | {"MODELS": "nonsense"}, deployed.gateway)
    done = broken.make("deploy")
    assert done.returncode != 0
    assert "no model 'nonsense' in /models" in done.stderr, done.stderr
    assert deployed.make("deploy").returncode == 0


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of this one, whose model repository the other tests do not see."""
    own = tmp_path / "checkout"
    unlike = shutil.ignore_patterns(".git", ".venv*", ".*_cache", ".cache", "__pycache__", "docs", "tests")
    shutil.copytree(ROOT, own, ignore=unlike)
    for name in (".venv", ".cache"):
        (own / name).symlink_to(ROOT / name)
    return own


@with_containers
def test_chat_and_documents_are_there_where_they_are_asked_for(deployed: Deployed, checkout: Path) -> None:
    from test_documents import HEADING, LABELS, LINE, TOP, layout, page, read

    for module in ("openvino_genai", "rapidocr"):
        assert f"No module named {module!r}" in deployed.python("triton", f"import {module}").stderr
    (port,) = free_ports(1)
    assert "8103/tcp" not in deployed.inspect("shim", "{{.NetworkSettings.Ports}}")
    own = Deployed(deployed.environment | {"CHAT_PORT": str(port)}, deployed.gateway, checkout)
    # Their weights come from the usual index: the one for images has none.
    usual = {name: value for name, value in own.environment.items() if name != "PIP_INDEX_URL"}
    usual |= {name: value for name, value in os.environ.items() if name == "PIP_INDEX_URL"}
    built = replace(own, environment=usual).make("build", "CHAT=1", "DOCUMENTS=1")
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    with containers.package_index([*containers.LOCKS, *containers.EXTRAS]):
        done = own.make("deploy", "CHAT=1", "DOCUMENTS=1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    url = f"http://localhost:{port}/v1/chat/completions"
    assert url in done.stdout
    call = {"messages": [{"role": "user", "content": smoke.QUESTION}]}
    (choice,) = smoke.ask(url, call)["choices"]
    assert choice["message"]["content"] == "The capital of France is Paris."
    _, texts, _ = read(own.gateway, page()[TOP])
    assert [text.decode() for text in texts] == [HEADING, *[LINE] * 4]
    labels, _, scores = (tensor[0] for tensor in layout(own.gateway, page()))
    assert {"picture", "table", "text"} <= {LABELS[label] for label in labels[scores > 0]}
    assert deployed.gateway.embed(["beside them"]).shape == (1, 384)


@with_containers
def test_undeploy_leaves_nothing(deployed: Deployed) -> None:
    for service in ("shim", "triton"):
        started = time.monotonic()
        docker("stop", "--time=40", deployed.container(service))
        assert time.monotonic() - started < 20
        assert deployed.inspect(service, "{{.State.ExitCode}}") == "0"
    done = deployed.make("undeploy")
    assert done.returncode == 0, done.stderr
    project = f"label=com.docker.compose.project={PROJECT}"
    for kind in (["ps", "--all"], ["network", "ls"], ["volume", "ls"]):
        assert docker(*kind, "--quiet", "--filter", project) == ""
    done = deployed.make("smoke")
    assert done.returncode != 0
    assert "`make deploy` starts it" in done.stderr


TEXTS = """
import urllib.request
lines = urllib.request.urlopen("http://127.0.0.1:8202/metrics").read().decode().splitlines()
print(next(line.split()[-1] for line in lines if line.startswith('nv_inference_count{model="minilm-tokenizer"')))
"""
"""Prints how many texts a Triton has embedded."""


@with_containers
def test_a_replica_that_dies_takes_no_call_along(base: str, tmp_path: Path) -> None:
    with deployment(base, tmp_path, f"{PROJECT}-replicas", TARGET="replicas") as service:
        one, other = service.containers("triton-replica")
        with Load(service.gateway, statuses=[200]) as load:
            load.answers()
            containers.until(
                lambda: all(float(python(replica, TEXTS).stdout or 0) > 50 for replica in (one, other)), 60
            )
            assert python(one, KILL_TRITON).returncode in (0, 137)
            load.answers()
            containers.until(lambda: docker("inspect", "--format", "{{.RestartCount}}", one) == "1", 60)
            containers.until(lambda: float(python(one, TEXTS).stdout or 0) > 100, 60)
        done = service.make("smoke")
        assert done.returncode == 0, done.stderr
        assert f"HAProxy   gRPC localhost:{service.gateway.ports['grpc']}" in done.stdout


@with_containers
def test_pin(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a real registry."""
    (port,) = free_ports(1)
    image = f"127.0.0.1:{port}/library/python:3"
    lock = tmp_path / "images.lock"
    lock.write_text(f"# A comment.\nPYTHON_IMAGE={image}\n")
    monkeypatch.setattr(images, "LOCK", lock)
    monkeypatch.delenv("PYTHON_IMAGE", raising=False)
    with containers.registry(port, tmp_path):
        docker("tag", base, image)
        pushed = re.findall(r"digest: (\S+)", docker("push", image))
        images.pin()
        assert lock.read_text() == f"# A comment.\nPYTHON_IMAGE={image}@{pushed[0]}\n"
        images.pin()
        pinned = images.read_lock()
        assert pinned == {"PYTHON_IMAGE": f"{image}@{pushed[0]}"}
        images.check_pinned(pinned, ["cpu"])
        docker("rmi", image)
        images.bring(pinned["PYTHON_IMAGE"])
        assert docker("image", "inspect", "--format", "{{.Id}}", pinned["PYTHON_IMAGE"]) == docker(
            "image", "inspect", "--format", "{{.Id}}", base
        )
        docker("rmi", pinned["PYTHON_IMAGE"])
        with pytest.raises(DeployError, match="cannot get"):
            images.resolve(f"127.0.0.1:{port}/library/nothing:1")
