"""Many models, one memory: families are loaded by their first call, and others make room, on a real Triton."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import ROOT, TINY, Answer, Stack, cosines
from containers import listens, until
from test_families import TEXTS, expected
from tiny import EMBEDDERS, build_tiny

from build import make
from tools.access import secret_file
from tools.shim.residency.families import HINT, families, fingerprint, hint, keep_hint
from tools.shim.residency.rules import RESIDENCE
from tools.triton import stubs
from tools.triton.embedded import WATCH_SECONDS

SECONDS = float(os.environ.get("RESIDENCY_SECONDS", "40"))
"""Of the load that changes its mind all the time."""

MB = 10**6


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve families of the tiny embedders."""
    folder = tmp_path_factory.mktemp("residency") / "repository"
    for i in range(12):
        build_tiny([EMBEDDERS[i % len(EMBEDDERS)]], "--name", name(i), "--repository", str(folder))
    return folder


@dataclass
class Sizes:
    """Bytes of families, as the gateway counts them."""

    first: int
    """Of the first, alone."""
    three: int
    """Of three that came one after another: libraries' pages count the less the more processes have them."""
    next: int
    """Of one more, before its first load."""


@pytest.fixture(scope="module")
def sizes(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Sizes:
    folder = tmp_path_factory.mktemp("sizes")
    own = Path(shutil.copytree(repository, folder / "repository"))  # where it is kept what a family took
    stack = served(folder / "stack", own, 10**10, "--preload", name(0)).start()
    first = models(stack)[name(0)]["bytes"]
    for i in (1, 2):
        embed(stack, name(i))
    time.sleep(2.5)  # a process looks at itself once a second, and the gateway every other
    listed = models(stack)
    assert stack.stop() == 0
    return Sizes(first, sum(listed[name(i)]["bytes"] for i in range(3)), listed[name(3)]["bytes"])


@pytest.fixture(scope="module")
def family(sizes: Sizes) -> int:
    """A third of the memory that three have room in, and a fourth one has none beside them."""
    return (sizes.three + sizes.next // 2) // 3


def name(i: int) -> str:
    return f"{EMBEDDERS[i % len(EMBEDDERS)]}-{i}"


def reference(model: str) -> Any:
    return expected(model.rpartition("-")[0])["embeddings"]


def served(folder: Path, repository: Path, memory: float, *options: str, **environment: str) -> Stack:
    """A stack with so many bytes for models."""
    words = ["--repository", str(repository), "--memory", f"{memory / MB:.0f}MB"]
    return Stack(folder, [*words, *options], {"ENCODER_PRECISION": "fp32", **environment})


@pytest.fixture
def three(tmp_path: Path, repository: Path, family: int) -> Iterator[Stack]:
    """A stack of its own with memory for three families, and one of them loaded."""
    own = Path(shutil.copytree(repository, tmp_path / "repository"))
    stack = served(tmp_path / "stack", own, 3 * family, "--preload", name(0)).start()
    yield stack
    processes = stack.tree()
    assert stack.stop() == 0
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    assert not stack.segments()


def models(stack: Stack) -> dict[str, Any]:
    return {model["name"]: model for model in stack.get("embed", "/models").json()["models"]}


def states(stack: Stack) -> dict[str, str]:
    return {key: model["state"] for key, model in models(stack).items() if model["state"] != "absent"}


def embed(stack: Stack, model: str, count: int = 1, **headers: str) -> Answer:
    """The first texts that there is a reference for."""
    fields = {key.replace("_", "-"): value for key, value in headers.items()}
    return stack.post("embed", "/embed", {"texts": TEXTS[:count], "model": model}, fields)


def is_right(answer: Answer, model: str) -> bool:
    vectors = np.array(answer.json()["embeddings"], np.float32)
    return bool(cosines(vectors, reference(model)[: len(vectors)]).min() > 0.99999)


def test_a_first_call_loads_and_the_least_recently_used_goes(three: Stack) -> None:
    assert states(three) == {name(0): "loaded"}
    for i in (1, 2):
        answer = embed(three, name(i))
        assert is_right(answer, name(i))
        assert float(answer.headers["X-Load-Seconds"]) > 0.1
    time.sleep(2 * RESIDENCE)  # for so long the last one would not be sent away
    assert "X-Load-Seconds" not in embed(three, name(0)).headers
    assert is_right(embed(three, name(3)), name(3))
    assert states(three) == dict.fromkeys((name(0), name(2), name(3)), "loaded")
    listed = models(three)
    assert (listed[name(1)]["loads"], listed[name(1)]["evictions"], listed[name(3)]["loads"]) == (1, 1, 1)
    assert all(listed[one]["bytes_are"] == "measured" for one in states(three))
    assert three.get("embed", "/health").json() == {"status": "ready", "models": [name(0), name(2), name(3)]}
    # What Triton itself has is what the gateway says that it has.
    index = three.manage("index").json()
    ready = {model["name"] for model in index if model.get("state") == "READY"}
    assert {one for one in ready if one in listed} == {name(0), name(2), name(3)}
    assert len(ready) == 9


def test_what_a_family_takes_is_what_its_processes_take(three: Stack) -> None:
    steps = [three.step(f"{name(0)}-{step}") for step in ("tokenizer", "encoder")]
    for _ in range(2):  # a process looks at itself once a second, and the gateway every other
        embed(three, name(0), 20)
        time.sleep(2.5)
    took = sum(process.memory_full_info().pss for process in steps)
    assert models(three)[name(0)]["bytes"] == pytest.approx(took, rel=0.1)


def test_a_burst_of_calls_loads_once(three: Stack) -> None:
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: embed(three, name(5), 2), range(24)))
    assert all(is_right(answer, name(5)) for answer in answers)
    assert models(three)[name(5)]["loads"] == 1


def test_a_call_that_cannot_wait_is_told_when_to_come_again(three: Stack) -> None:
    answer = embed(three, name(4), X_Request_Timeout="0.3")
    assert (answer.status, answer.json()["type"]) == (503, "not_ready")
    assert "is not loaded yet: try again" in answer.json()["error"]
    assert int(answer.headers["Retry-After"]) >= 1
    until(lambda: states(three).get(name(4)) == "loaded")  # it is being loaded all the same
    assert "X-Load-Seconds" not in embed(three, name(4)).headers


def test_one_that_can_never_fit(tmp_path: Path, repository: Path, sizes: Sizes) -> None:
    stack = served(tmp_path / "stack", repository, 1.6 * sizes.first, "--pin", name(0)).start()
    try:
        answer = embed(stack, name(1))
        assert (answer.status, answer.json()["type"]) == (507, "too_big")
        assert "are not pinned: unpin another, or give models more by --memory" in answer.json()["error"]
        assert stack.post("embed", f"/models/{name(0)}/unpin", b"").json()["pinned"] is False
        assert is_right(embed(stack, name(1)), name(1))
        assert states(stack) == {name(1): "loaded"}
        refused = stack.post("embed", f"/models/{name(1)}/pin", b"")
        assert (refused.status, refused.json()["pinned"]) == (200, True)
    finally:
        assert stack.stop() == 0


def test_one_that_can_never_fit_is_not_waited_for(tmp_path: Path, repository: Path, family: int) -> None:
    """Though it is to be there from the start: others are loaded, and stay."""
    own = Path(shutil.copytree(repository, tmp_path / "repository"))
    took(own, name(1), 100 * family)
    stack = served(tmp_path / "stack", own, 3 * family, "--preload", name(0), name(1)).start()
    try:
        assert is_right(embed(stack, name(2)), name(2))
        assert states(stack) == {name(0): "loaded", name(2): "loaded"}
        assert "give models more by --memory" in models(stack)[name(1)]["cause"]
        assert embed(stack, name(1)).status == 507
        health = stack.get("embed", "/health")
        assert health.status == 503
        assert name(1) in health.json()["error"]
        build_tiny([EMBEDDERS[1]], "--name", name(1), "--repository", str(own), "--max-tokens", "40")
        assert is_right(embed(stack, name(1)), name(1))  # another build, of which nothing is known
        assert stack.get("embed", "/health").status == 200
    finally:
        assert stack.stop() == 0


def took(repository: Path, model: str, size: int) -> None:
    """Writes that a family took so many bytes when it was last served."""
    (family,) = families(repository, [model])
    keep_hint(repository, family, fingerprint(repository, family), size)


def test_what_another_build_took_is_not_asked(tmp_path: Path, repository: Path) -> None:
    own = Path(shutil.copytree(repository, tmp_path / "repository"))
    (family,) = families(own, [name(1)])
    keep_hint(own, family, "another", 7)
    assert hint(own, family) is None
    took(own, name(1), 7)
    assert hint(own, family) == 7


def test_what_is_pinned_or_preloaded_is_served(tmp_path: Path, repository: Path) -> None:
    """Though --models does not name it."""
    words = ["--repository", str(repository), "--models", name(0), "--pin", name(1), "--preload", name(2)]
    stack = Stack(tmp_path / "stack", words, {"ENCODER_PRECISION": "fp32"}).start()
    try:
        rows = models(stack)
        assert {key: row["pinned"] for key, row in rows.items()} == {name(0): False, name(1): True, name(2): False}
        assert set(states(stack)) == {name(1), name(2)}
    finally:
        assert stack.stop() == 0


def test_models_of_the_start_go_when_nobody_calls_them(tmp_path: Path, repository: Path, family: int) -> None:
    options = ["--preload", name(0), name(1), "--keep-alive", "2"]
    stack = served(tmp_path / "stack", repository, 3 * family, *options).start()
    try:
        until(lambda: not states(stack), 20)
        assert stack.get("embed", "/health").status == 200
        assert is_right(embed(stack, name(1)), name(1))
    finally:
        assert stack.stop() == 0


def test_a_page_of_a_name_that_leads_here_steers_nothing(three: Stack) -> None:
    """Whoever owns a name may have it lead to this machine, and its pages then call as of their own origin."""
    (port, path) = three.ports["embed"], f"/models/{name(0)}/unload"
    for host, status in (("rebound.example", 403), ("localhost", 200), ("127.0.0.1", 200), ("[::1]", 200)):
        own = {"Host": f"{host}:{port}", "Origin": f"http://{host}:{port}"}
        assert three.post("embed", path, b"", own).status == status, host


def test_an_operator_loads_unloads_and_pins(three: Stack) -> None:
    done = three.post("embed", f"/models/{name(6)}/pin", b"").json()
    assert (done["name"], done["state"], done["pinned"]) == (name(6), "loaded", True)
    for i in (1, 2, 3):
        embed(three, name(i))
    assert states(three)[name(6)] == "loaded"
    assert three.post("embed", f"/models/{name(6)}/unload", b"").json()["state"] == "absent"
    assert three.post("embed", f"/models/{name(6)}/load", b"").json()["state"] == "loaded"
    assert three.post("embed", "/models/none/load", b"").status == 404
    page = three.post("embed", f"/models/{name(6)}/unload", b"", {"Origin": "http://elsewhere.example"})
    assert (page.status, page.json()["type"]) == (403, "forbidden")
    assert states(three)[name(6)] == "loaded"


def test_what_was_unloaded_is_missed(tmp_path: Path, repository: Path, family: int) -> None:
    """Where it is to be there from the start: until it is loaded again, and no matter who asks for that."""
    own = Path(shutil.copytree(repository, tmp_path / "repository"))
    stack = served(tmp_path / "stack", own, 3 * family, "--preload", name(0)).start()

    def post(action: str) -> Answer:
        return stack.post("embed", f"/models/{name(0)}/{action}", b"")

    try:
        assert stack.get("embed", "/health").json()["models"] == [name(0)]
        for again in (lambda: post("load"), lambda: embed(stack, name(0))):
            assert post("unload").status == 200
            health = stack.get("embed", "/health")
            assert health.status == stack.get("embed", "/health?partial=1").status == 503
            assert f"POST /models/{name(0)}/load loads it" in health.json()["failing"][name(0)]
            assert f'gateway_model_ready{{model="{name(0)}"}} 0.0' in stack.get("embed", "/metrics").body.decode()
            assert again().status == 200
            assert stack.get("embed", "/health").status == 200
        graph = own / f"{name(0)}-encoder" / "1" / "model.onnx"
        whole = graph.read_bytes()
        graph.write_bytes(whole[:1000])
        assert post("unload").status == 200
        assert "cannot be run, build the family again" in post("load").json()["error"]
        assert "cannot be run, build the family again" in stack.get("embed", "/health").json()["failing"][name(0)]
        graph.write_bytes(whole)
        until(lambda: post("load").status == 200, 20)
        assert stack.get("embed", "/health").status == 200
    finally:
        assert stack.stop() == 0


def test_an_idle_one_goes_when_its_time_is_over(three: Stack) -> None:
    assert is_right(embed(three, name(1), X_Keep_Alive="0"), name(1))
    until(lambda: name(1) not in states(three), 10)
    assert is_right(embed(three, name(2), X_Keep_Alive="1.5"), name(2))
    assert name(2) in states(three)
    until(lambda: name(2) not in states(three), 10)
    assert embed(three, name(2), X_Keep_Alive="soon").status == 400
    # In Ollama's words.
    call = {"model": name(3), "input": "a", "keep_alive": "-1m"}
    assert three.post("embed", "/api/embed", call).json()["load_duration"] > 1e8
    assert [model["name"] for model in three.get("embed", "/api/ps").json()["models"]] == [
        f"{model}:latest" for model in states(three)
    ]
    assert three.post("embed", "/api/embed", call | {"keep_alive": "1s500ms"}).status == 200
    until(lambda: name(3) not in states(three), 10)
    assert three.post("embed", "/api/embed", call | {"keep_alive": "a while"}).status == 400
    assert states(three) == {name(0): "loaded"}


def test_others_load_and_unload(three: Stack) -> None:
    """Through Triton's own API: what they load is served and counted, what they unload is loaded again."""
    steps = [f"{name(7)}-{step}" for step in ("tokenizer", "encoder")]
    assert three.manage(f"models/{name(7)}/load").status == 200
    until(lambda: states(three).get(name(7)) == "loaded", 10)
    assert "X-Load-Seconds" not in embed(three, name(7)).headers
    for model in (name(7), *steps):
        assert three.manage(f"models/{model}/unload").status == 200
    answer = embed(three, name(7), 3)  # at once, before anybody has noticed
    assert is_right(answer, name(7))


def test_unloaded_under_load(three: Stack) -> None:
    """By an operator, again and again: no call fails and every vector is right."""
    stop, answers = threading.Event(), list[Answer]()

    def client() -> None:
        while not stop.is_set():
            answers.append(embed(three, name(0), 5))

    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        assert three.post("embed", f"/models/{name(0)}/unload", b"").status == 200
        time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert Counter(answer.status for answer in answers) == {200: len(answers)}
    assert all(is_right(answer, name(0)) for answer in answers)
    assert models(three)[name(0)]["loads"] >= 4


def test_a_process_that_dies_while_its_model_is_loaded(three: Stack) -> None:
    """Its calls are told so, others are unharmed, and the next load is tried soon."""
    answer = kill_while_loading(three, 4 * WATCH_SECONDS)
    assert (answer.status, answer.json()["type"]) == (503, "not_ready")
    assert f"process '{name(8)}-encoder_0_0' is not healthy" in answer.json()["error"]
    until(lambda: embed(three, name(8)).status == 200, 60)


def test_a_process_that_dies_when_it_has_just_been_started(three: Stack) -> None:
    """Triton waits for it for ever: its calls are told so, and others are unharmed, even while they are loaded."""
    answer = kill_while_loading(three, 0)
    for said in (answer, embed(three, name(8))):
        assert (said.status, said.json()["type"]) == (503, "not_ready")
        assert "a process of this model died while it loaded" in said.json()["error"]
        assert "restart it" in said.json()["error"]


def test_triton_dies_while_calls_wait_for_room(three: Stack) -> None:
    """All that is loaded has calls: one for another model waits until they end, and is told when it is in vain."""
    loaded = [name(i) for i in range(3)]
    for model in loaded:
        assert embed(three, model).status == 200
        three.step(f"{model}-encoder").suspend()
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(embed, three, model, X_Request_Timeout="100") for model in (*loaded, name(8))]
        until(lambda: models(three)[name(8)]["waiting"] == 1)
        three.triton().kill()
        answers = [call.result() for call in calls]
    assert {(answer.status, answer.json()["type"]) for answer in answers} == {(503, "not_ready")}
    assert "Triton cannot answer now" in answers[-1].json()["error"]
    assert three.process.wait(60) == 1
    three.start()  # for what is looked at behind each test


def kill_while_loading(three: Stack, seconds: float) -> Answer:
    """The answer to a call whose model loses its encoder's process so long after that was started."""
    source = Path(three.options[1]) / f"{name(8)}-encoder" / "1" / "model.py"
    slow = re.sub(r"(def initialize\(.*\n)", r"\1        import time; time.sleep(4)\n", source.read_text())
    source.write_text(slow)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(embed, three, name(8))
        triton = three.triton().pid
        while (process := stub_of(triton, f"{name(8)}-encoder")) is None:
            pass  # at once is within milliseconds
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
        answer = call.result()
    assert three.process.poll() is None
    assert is_right(embed(three, name(0)), name(0))
    assert is_right(embed(three, name(1)), name(1))
    return answer


def stub_of(triton: int, model: str) -> int | None:
    """The process of a model, if there is one."""
    for process in stubs.children(triton):
        with suppress(OSError):
            if stubs.instance_of(process).startswith(f"{model}_"):
                return process
    return None


def test_a_broken_family_harms_no_other(three: Stack) -> None:
    repository = Path(three.options[1])
    graph = repository / f"{name(9)}-encoder" / "1" / "model.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:100])
    answer = embed(three, name(9))
    assert (answer.status, answer.json()["type"]) == (503, "not_ready")
    assert "model.onnx cannot be run, build the family again" in answer.json()["error"]
    assert "Traceback" not in answer.json()["error"]
    assert "model.onnx cannot be run" in models(three)[name(9)]["cause"]
    assert is_right(embed(three, name(0)), name(0))
    assert three.get("embed", "/health").status == 200
    (log,) = three.work_folder.glob("triton-*.log")
    log.unlink()  # which says why; it goes on without
    until(lambda: "failed to load" in embed(three, name(9)).json()["error"], 30)
    graph.write_bytes(whole)
    until(lambda: embed(three, name(9)).status == 200, 30)
    assert models(three)[name(9)]["cause"] is None


def test_a_family_that_is_built_anew_while_it_is_loaded(three: Stack) -> None:
    """Until it is loaded again it stays what it was; then it is the new one."""
    assert embed(three, name(1)).status == 200
    other = EMBEDDERS[(1 + 1) % len(EMBEDDERS)]
    build_tiny([other], "--name", name(1), "--repository", three.options[1])
    assert is_right(embed(three, name(1)), name(1))
    assert three.post("embed", f"/models/{name(1)}/unload", b"").status == 200
    vectors = np.array(embed(three, name(1), 8).json()["embeddings"], np.float32)
    assert cosines(vectors, expected(other)["embeddings"][:8]).min() > 0.99999


def test_two_gateways_on_one_triton(three: Stack) -> None:
    """Each thinks that it decides alone: what one unloads the other loads again, and no call fails."""
    other = Stack(three.work_folder.with_name("other"), [])
    secret = secret_file(three.work_folder, three.ports["http"])
    other.process = other.run(
        *("-m", "tools.shim", "--triton", f"127.0.0.1:{three.ports['grpc']}"),
        *("--repository", three.options[1], "--memory", three.options[3], "--secret-file", str(secret)),
        *("--metrics", f"127.0.0.1:{three.ports['metrics']}", "--models", *map(name, range(12))),
        *("--preload", name(0), *other.port_options("embed", "rerank")),
    )
    try:
        until(lambda: "gateway on" in other.greeting())
        draw = random.Random(1)
        for _ in range(25):
            stack, model = draw.choice([three, other]), name(draw.randrange(6))
            answer = embed(stack, model, 3)
            assert answer.status == 200, answer.body
            assert is_right(answer, model)
    finally:
        assert other.stop() == 0


def test_a_triton_that_comes_goes_and_comes_back(tmp_path: Path, repository: Path, family: int) -> None:
    """It runs elsewhere: calls are told at once that it is away, and find all that they need when it is there."""
    stack = Stack(tmp_path / "stack", [], {"ENCODER_PRECISION": "fp32"})
    (tmp_path / "stack").mkdir()
    secret = secret_file(stack.work_folder, stack.ports["http"])

    def command(name_of_it: str, *words: str) -> subprocess.Popen[bytes]:
        return stack.run("-m", name_of_it, "--repository", str(repository), *words, prefix=name_of_it)

    def triton() -> subprocess.Popen[bytes]:
        ports = stack.port_options("http", "grpc", "metrics")
        return command("tools.triton", "--models", name(0), *stack.work_options(), *ports)

    stack.process = command(
        *("tools.shim", "--triton", f"127.0.0.1:{stack.ports['grpc']}", "--secret-file", str(secret)),
        *(
            "--metrics",
            f"127.0.0.1:{stack.ports['metrics']}",
            "--memory",
            f"{3 * family / MB:.0f}MB",
            "--preload",
            name(0),
        ),
        *stack.port_options("embed", "rerank"),
    )
    server = None
    try:
        until(lambda: listens(stack.ports["embed"]))
        answer = embed(stack, name(1))
        assert (answer.status, answer.json()["type"]) == (503, "not_ready")
        assert "Triton cannot answer now" in answer.json()["error"]
        for _ in range(2):
            server = triton()
            for model in (name(0), name(1), name(2)):
                until(lambda model=model: embed(stack, model).status == 200)
                assert is_right(embed(stack, model), model)
            server.terminate()
            assert server.wait(60) == 0
            until(lambda: "cannot answer now" in embed(stack, name(0)).json().get("error", ""), 30)
    finally:
        if server is not None:
            server.terminate()
            server.wait(60)
        assert stack.stop() == 0


def test_many_models_in_the_memory_of_three(tmp_path: Path, repository: Path, family: int) -> None:
    """Sixteen clients draw from twelve families, some far more often than others."""
    stack = served(tmp_path / "stack", repository, 3 * family, "--preload", name(0)).start()
    processes: list[psutil.Process] = []
    statuses: Counter[int] = Counter()
    hits, misses, wrong, peak = list[float](), list[float](), list[str](), [0]
    stop = threading.Event()

    def client(seed: int) -> None:
        draw = random.Random(seed)
        while not stop.is_set():
            model = name(min(11, int(draw.paretovariate(1)) - 1))
            started = time.monotonic()
            answer = embed(stack, model, draw.randrange(1, 6))
            statuses[answer.status] += 1
            if answer.status != 200:
                wrong.append(f"{answer.status} {answer.body!r}")
            elif not is_right(answer, model):
                wrong.append(f"{model} is not what it should be")
            else:
                times = misses if "X-Load-Seconds" in answer.headers else hits
                times.append(time.monotonic() - started)

    def watch() -> None:
        while not stop.is_set():
            there = [model["bytes"] for model in models(stack).values() if model["state"] != "absent"]
            peak[0] = max(peak[0], sum(there))
            stop.wait(0.5)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(16)]
    threads.append(threading.Thread(target=watch))
    try:
        for thread in threads:
            thread.start()
        stop.wait(SECONDS)
        stop.set()
        for thread in threads:
            thread.join()
        listed = models(stack).values()
        processes = stack.tree()
    finally:
        stop.set()
        assert stack.stop() == 0
    loads, evictions = (sum(model[key] for model in listed) for key in ("loads", "evictions"))
    report = {
        "calls": sum(statuses.values()),
        "hit_rate": len(hits) / max(1, len(hits) + len(misses)),
        "loads": loads,
        "evictions": evictions,
        "hit": quantiles(hits),
        "miss": quantiles(misses),
        "peak_bytes": peak[0],
        "budget_bytes": 3 * family,
    }
    print(json.dumps(report))
    assert not wrong, wrong[:5]
    assert loads > 3
    assert evictions >= loads - 3
    assert peak[0] <= 3 * family + max(model["bytes"] for model in listed)
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    assert not stack.segments()


def anonymous(process: psutil.Process) -> int:
    """Bytes that a process has of no file: pages of files are its own or shared as others come and go."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) * 1024


def quantiles(times: list[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(times, p)), 3) for p in (50, 99)} if times else {}


def test_loading_and_unloading_leaves_nothing(tmp_path: Path, repository: Path, family: int) -> None:
    """Triton and the gateway hold after many rounds what they held after a few."""
    stack = served(tmp_path / "stack", repository, 3 * family, "--preload", name(0)).start()
    own, triton = psutil.Process(stack.process.pid), stack.triton()

    def held() -> dict[str, float]:
        return {
            "files": own.num_fds() + triton.num_fds(),
            "threads": own.num_threads() + triton.num_threads(),
            "segments": len(stack.segments()),
            "memory": sum(map(anonymous, (own, triton))) / MB,
        }

    try:
        counts: list[dict[str, float]] = []
        for i in range(ROUNDS):
            assert stack.post("embed", f"/models/{name(1)}/load", b"").status == 200
            assert stack.post("embed", f"/models/{name(1)}/unload", b"").status == 200
            if i >= 4:
                counts.append(held())
        first, last = counts[0], counts[-1]
        print(first, last)
        assert last["files"] <= first["files"] + 2
        assert last["threads"] <= first["threads"] + 2
        assert last["segments"] <= first["segments"]
        assert last["memory"] <= first["memory"] + 16 + 0.25 * ROUNDS
    finally:
        assert stack.stop() == 0


ROUNDS = int(os.environ.get("RESIDENCY_ROUNDS", "15"))


def test_loads_cost_other_models_little(three: Stack) -> None:
    """Processor seconds of gateway, Triton and model that a call takes, in turns with and without a load."""
    processes = [psutil.Process(three.process.pid), three.triton()]
    processes += [three.step(f"{name(0)}-{step}") for step in ("tokenizer", "encoder")]

    def spent() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    def calls(seconds: float) -> float:
        """Processor seconds a call."""
        before, count, end = spent(), 0, time.monotonic() + seconds
        while time.monotonic() < end:
            assert is_right(embed(three, name(0), 3), name(0))
            count += 1
        return (spent() - before) / count

    quiet, loading = 0.0, 0.0
    for _ in range(3):
        quiet += calls(3)
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(three.post, "embed", f"/models/{name(1)}/load", b"")
            loading += calls(3)
            assert load.result().status == 200
        assert three.post("embed", f"/models/{name(1)}/unload", b"").status == 200
    assert loading <= 2 * quiet, (loading, quiet)


def test_what_a_family_took_is_known_at_the_next_start(tmp_path: Path, repository: Path, family: int) -> None:
    own = Path(shutil.copytree(repository, tmp_path / "repository", ignore=shutil.ignore_patterns(HINT)))
    stack = served(tmp_path / "stack", own, 3 * family, "--preload", name(0)).start()
    assert embed(stack, name(1), 5).status == 200
    assert stack.post("embed", f"/models/{name(1)}/unload", b"").status == 200
    took = models(stack)[name(1)]["bytes"]
    assert stack.stop() == 0
    stack = served(tmp_path / "stack", own, 3 * family, "--preload", name(0)).start()
    try:
        row = models(stack)[name(1)]
        assert (row["state"], row["bytes"], row["bytes_are"]) == ("absent", took, "measured")
        assert models(stack)[name(2)]["bytes_are"] == "estimated"
    finally:
        assert stack.stop() == 0


def test_all_ensembles_of_a_repository_are_served(tmp_path: Path) -> None:
    """Without --models: what was built, the default first, and nothing that is there without its graphs."""
    repository = tmp_path / "repository"
    for built in (ROOT / "model_repository").glob("minilm*"):
        shutil.copytree(built, repository / built.name)
    assert make.main([str(TINY / "bert-cls"), "--repository", str(repository)]) == 0
    shutil.copytree(repository / "minilm", repository / "unbuilt")
    (repository / "unbuilt" / "config.pbtxt").write_text(
        (repository / "minilm" / "config.pbtxt").read_text().replace("minilm", "unbuilt")
    )
    stack = Stack(tmp_path / "stack", ["--repository", str(repository), "--preload", "minilm"]).start()
    try:
        assert list(models(stack)) == ["minilm", "minilm-rerank", "bert-cls"]
        assert states(stack) == {"minilm": "loaded", "minilm-rerank": "loaded"}
        assert stack.post("embed", "/embed", {"texts": ["a"]}).json()["model"] == "minilm"
        assert "at their first call  bert-cls" in stack.greeting()
    finally:
        assert stack.stop() == 0
