"""Several Tritons behind HAProxy, with the committed configuration: one that goes away takes no call along."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import containers
import numpy as np
import psutil
import pytest
from conftest import ROOT, Reference, Stack, free_ports
from load import Load, Proxy, Split
from tritonclient.utils import InferenceServerException

from tools import alive
from tools.access import secret_file

CONFIGURATION = (ROOT / "tools" / "deploy" / "haproxy.cfg").read_text()


@dataclass
class Replica(Stack):
    """One `python -m tools.triton` process. Only those calls are used that go to Triton itself."""

    def launch(self) -> None:
        ports = [
            word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", str(self.ports[name]))
        ]
        command = [sys.executable, "-m", "tools.triton", "--work-folder", str(self.work_folder), *ports]
        with self._output("errors").open("wb") as errors:
            self.process = subprocess.Popen([*command, *self.options], cwd=ROOT, stdout=errors, stderr=errors)

    def start(self) -> Replica:
        self.launch()
        containers.until(self.ready, 60)
        return self

    def ready(self) -> bool:
        assert self.process.poll() is None, self.errors()
        if not all(containers.listens(self.ports[name]) for name in ("http", "grpc", "metrics")):
            return False
        return self.get("http", "/v2/health/ready").status == 200

    def steps(self) -> list[psutil.Process]:
        """The processes of the Python backend."""
        return psutil.Process(self.triton().pid).children()

    def texts(self) -> float:
        """How many it has embedded."""
        return self.metric("nv_inference_count", model="minilm-tokenizer")


@contextmanager
def gateway(stack: Stack, triton: str) -> Iterator[None]:
    """`python -m tools.shim` on the ports of `stack`."""
    ports = ["--embed-port", str(stack.ports["embed"]), "--rerank-port", str(stack.ports["rerank"])]
    with subprocess.Popen([sys.executable, "-m", "tools.shim", "--triton", triton, *ports], cwd=ROOT) as process:
        try:
            yield
        finally:
            process.terminate()


@contextmanager
def balancer(folder: Path, replicas: list[Replica]) -> Iterator[str]:
    """HAProxy with the committed configuration, but for where it listens and where the replicas are."""
    (port,) = free_ports(1)
    servers = [
        f"server triton-{i} 127.0.0.1:{replica.ports['grpc']} port {replica.ports['http']}"
        for i, replica in enumerate(replicas)
    ]
    text, found = re.subn(r"server-template .*", "\n    ".join(servers), CONFIGURATION)
    assert found == 1
    text, found = re.subn("connect port 8200", "connect", text)
    assert found == 1
    text, found = re.subn("bind :8201", f"bind 127.0.0.1:{port}", text)
    assert found == 1
    configuration = folder / "haproxy.cfg"
    configuration.write_text(text)
    with subprocess.Popen(["haproxy", "-db", "-f", configuration]) as process:
        try:
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


@dataclass
class Service:
    """Two replicas, HAProxy and the gateway."""

    replicas: list[Replica]
    gateway: Stack


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    containers.require("haproxy")
    folder = tmp_path_factory.mktemp("replicas")
    replicas = [Replica(folder / str(i)) for i in range(2)]
    front = Stack(folder)
    with ExitStack() as running:
        for replica in replicas:
            replica.work_folder.mkdir()
            running.callback(lambda one: one.process.poll() is None and one.stop(), replica)
            replica.launch()
        containers.until(lambda: all(replica.ready() for replica in replicas), 60)
        address = running.enter_context(balancer(folder, replicas))
        running.enter_context(gateway(front, address))
        containers.until(lambda: healthy(front), 30)
        yield Service(replicas, front)


def healthy(front: Stack) -> bool:
    return containers.listens(front.ports["embed"]) and front.get("embed", "/health").status == 200


@pytest.fixture(scope="module")
def texts(reference: Reference) -> list[str]:
    """Short ones, so that many calls take little time."""
    return sorted(reference.texts, key=len)[:64]


def test_calls_go_to_every_replica_and_give_the_same_bits(
    service: Service, stack: Stack, texts: list[str]
) -> None:
    before = [replica.texts() for replica in service.replicas]
    with Load(service.gateway, statuses=[200]) as load:
        load.answers(400)
    shares = [replica.texts() - start for replica, start in zip(service.replicas, before, strict=True)]
    assert min(shares) > sum(shares) / 10, shares
    np.testing.assert_array_equal(service.gateway.embed(texts), stack.embed(texts))


def kill(replica: Replica) -> None:
    replica.triton().kill()


def kill_a_step(replica: Replica) -> None:
    replica.steps()[0].kill()


def stop(replica: Replica) -> None:
    replica.process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(("end", "status"), [(kill, 1), (kill_a_step, 1), (stop, 0)])
def test_a_replica_that_goes_away_takes_no_call_along(
    service: Service, end: Callable[[Replica], None], status: int
) -> None:
    one, other = service.replicas
    with Load(service.gateway, statuses=[200]) as load:
        load.answers()
        end(one)
        load.answers()
        assert one.process.wait(60) == status
        load.answers()
        one.start()
        containers.until(lambda: one.texts() > 100, 60)
        load.answers()
    assert other.process.poll() is None


def test_an_answer_that_breaks_off_is_asked_for_again(service: Service, tmp_path: Path) -> None:
    """HAProxy ends it as if it were whole, which gRPC calls an unknown error."""
    texts = [f"text {i} of many" for i in range(500)]
    expected = service.gateway.embed(texts)
    whole = service.replicas[0]
    proxy = Proxy(whole.ports["grpc"])
    broken = replace(whole, ports=whole.ports | {"grpc": proxy.port})
    front = Stack(tmp_path)
    with balancer(tmp_path, [broken]) as address, gateway(front, address):
        containers.until(lambda: healthy(front), 30)
        proxy.room, proxy.once = 100_000, True
        assert (front.embed(texts) == expected).all()
        assert proxy.room is None
    proxy.close()


def test_with_no_replica_left_callers_hear_of_it_at_once(service: Service) -> None:
    for replica in service.replicas:
        stop(replica)
    for replica in service.replicas:
        assert replica.process.wait(60) == 0
    started = time.monotonic()
    answer = service.gateway.post("embed", "/embed", {"texts": ["now"]})
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert time.monotonic() - started < 5
    for replica in service.replicas:
        replica.start()
    containers.until(lambda: healthy(service.gateway), 30)


def test_every_address_of_a_name_is_used(service: Service, tmp_path: Path) -> None:
    """As in Kubernetes, where there is no HAProxy: gRPC itself balances over what DNS says."""
    front = Stack(tmp_path)
    addresses = ",".join(f"127.0.0.1:{replica.ports['grpc']}" for replica in service.replicas)
    with gateway(front, f"ipv4:{addresses}"):
        containers.until(lambda: healthy(front), 30)
        with Load(front, statuses=[200]) as load:
            load.answers()
            service.replicas[0].triton().kill()
            load.answers()
        assert service.replicas[0].process.wait(60) == 1
        service.replicas[0].start()
        with Load(front, statuses=[200]) as load:
            load.answers()
            containers.until(lambda: service.replicas[0].texts() > 0, 60)
            before = [replica.texts() for replica in service.replicas]
            load.answers()
        shares = [replica.texts() - start for replica, start in zip(service.replicas, before, strict=True)]
    assert min(shares) > sum(shares) / 5, shares


def test_connections_are_renewed_and_lose_nothing(tmp_path: Path) -> None:
    replica = Replica(tmp_path, ["--connection-seconds", "1"])
    front = Stack(tmp_path / "gateway")
    replica.start()
    try:
        with gateway(front, f"127.0.0.1:{replica.ports['grpc']}"):
            containers.until(lambda: healthy(front), 30)
            with Load(front, clients=4, statuses=[200]) as load:
                load.answers()
                peers = set()
                for _ in range(30):
                    peers |= {
                        connection.raddr
                        for connection in psutil.Process(replica.triton().pid).net_connections("tcp")
                        if connection.status == "ESTABLISHED" and connection.laddr.port == replica.ports["grpc"]
                    }
                    time.sleep(0.1)
            assert len(peers) >= 3
    finally:
        assert replica.stop() == 0


def failures(stack: Stack) -> int:
    return int(stack.statistics("minilm")["inference_stats"]["fail"]["count"])


def test_alive(tmp_path: Path) -> None:
    """With the supervisor stopped, which would not let Triton survive the death of a step."""
    own = Split(tmp_path).start()
    probe = ["--http-port", str(own.ports["http"]), "--work-folder", str(own.work_folder)]
    supervisor, triton = own.commands["triton"], own.tritonserver()
    try:
        assert alive.main(probe) == 0
        with Load(own, clients=16, statuses=[200]) as load:
            load.answers()
            for _ in range(3):
                assert alive.main(probe) == 0
        supervisor.send_signal(signal.SIGSTOP)
        next(step for step in triton.children() if "minilm-tokenizer" in " ".join(step.cmdline())).kill()
        containers.until(lambda: alive.main(probe) == 1, 10)
        # Once more, and not again and again: a call of the gateway fails twice as often as one without it.
        counts = []
        for call in (lambda: None, lambda: own.infer("minilm", text=["now"]), lambda: own.embed(["now"])):
            with suppress(InferenceServerException, AssertionError):
                call()
            time.sleep(1)
            counts.append(failures(own))
        assert counts[2] - counts[1] == 2 * (counts[1] - counts[0]) > 0
        triton.suspend()
        assert alive.main(probe) == 1
        triton.resume()
        supervisor.send_signal(signal.SIGCONT)
        assert supervisor.wait(60) == 1
    finally:
        supervisor.send_signal(signal.SIGCONT)
        own.end()
    assert alive.main(probe) == 1


def test_a_model_that_is_unloaded_meanwhile_is_no_death(monkeypatch: pytest.MonkeyPatch, own_stack: Stack) -> None:
    """Between the list of models and the question what each is."""
    listed = alive.loaded

    def unloads(*words: str) -> list[str]:
        names = listed(*words)
        for name in ("minilm-rerank", "minilm-scoring"):
            assert own_stack.manage(f"models/{name}/unload").status == 200
        containers.until(lambda: not {"minilm-rerank", "minilm-scoring"} & {*listed(*words)}, 10)
        assert "minilm-rerank" in names
        return names

    place = ["--http-port", str(own_stack.ports["http"]), "--work-folder", str(own_stack.work_folder)]
    with monkeypatch.context() as patched:
        patched.setattr(alive, "loaded", unloads)
        assert alive.main(place) == 0
    assert alive.main(place) == 0


def test_a_triton_that_does_not_know_the_secret(capsys: pytest.CaptureFixture[str], own_stack: Stack) -> None:
    secret_file(own_stack.work_folder, own_stack.ports["http"]).write_text("another")
    place = ["--http-port", str(own_stack.ports["http"]), "--work-folder", str(own_stack.work_folder)]
    assert alive.main(place) == 1
    assert "Triton refuses to say what is loaded: HTTP Error 403" in capsys.readouterr().err


def test_a_busy_triton_is_alive(monkeypatch: pytest.MonkeyPatch, stack: Stack) -> None:
    """A text that waits longer than the probe does is no death."""
    started = alive.ask

    def impatient(url: str, *rest: Any) -> object:
        if url.endswith("/infer"):
            raise TimeoutError
        return started(url, *rest)

    monkeypatch.setattr(alive, "ask", impatient)
    place = ["--http-port", str(stack.ports["http"]), "--work-folder", str(stack.work_folder)]
    assert alive.main(place) == 0
