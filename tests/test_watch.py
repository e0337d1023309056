"""Dashboard, rules and alerts: in a real Prometheus that watches the real stack."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import containers
import pytest
import yaml
from conftest import ROOT, Stack, free_ports

FOLDER = ROOT / "tools" / "deploy" / "watch"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
RULES = [rule for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule["expr"] for rule in RULES if "alert" in rule}
RULES_TEST = ROOT / "tests" / "rules.yml"


@pytest.fixture(scope="module")
def programs() -> None:
    """Prometheus itself; without it the tests are skipped, or fail where REQUIRE_PROMETHEUS=1."""
    if shutil.which("prometheus") and shutil.which("promtool"):
        return
    if os.environ.get("REQUIRE_PROMETHEUS") == "1":
        pytest.fail("prometheus is not installed")
    pytest.skip("prometheus is not installed (Debian: apt install prometheus)")


@dataclass
class Prometheus:
    """A running server."""

    port: int

    def ready(self) -> bool:
        """Whether it answers queries, which it does later than it listens."""
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=30).close()
        except OSError:
            return False
        return True

    def get(self, path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def values(self, query: str) -> list[float]:
        """What a query gives now, as a panel would ask it."""
        query = query.replace("$__rate_interval", "30s")
        return [float(series["value"][1]) for series in self.get("query", query=query)["result"]]

    def has_data(self, query: str) -> bool:
        values = self.values(query)
        return bool(values) and all(map(math.isfinite, values))


needs_programs = pytest.mark.usefixtures("programs")


@pytest.fixture(scope="module")
def prometheus(
    programs: None,  # noqa: ARG001
    stack: Stack,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Prometheus]:
    """Prometheus as it is configured, but in a hurry and with this machine's ports, after a short load."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "1s")
    ports = {"gateway": stack.ports["embed"], "triton": stack.ports["metrics"]}
    for job in config["scrape_configs"]:
        del job["dns_sd_configs"]
        targets = [f"127.0.0.1:{port}" for name, port in ports.items() if name == job["job_name"]]
        job["static_configs"] = [{"targets": targets}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(FOLDER / "rules.yml", folder)
    (port,) = free_ports(1)
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stderr=log) as server:
        try:
            running = Prometheus(port)
            containers.until(running.ready, 30)
            # The test says which ones have none.
            with calls(stack), suppress(AssertionError):
                containers.until(lambda: not without_data(running), 60)
            yield running
        finally:
            server.terminate()


@contextmanager
def calls(stack: Stack) -> Iterator[None]:
    """Two callers for as long as the context lasts."""
    done = threading.Event()

    def embed() -> None:
        for i in itertools.count():
            if done.is_set():
                return
            stack.embed([f"text number {i}"])

    def rerank() -> None:
        while not done.is_set():
            stack.rerank("a query", ["one document", "and another"])

    with ThreadPoolExecutor(2) as callers:
        running = [callers.submit(call) for call in (embed, rerank)]
        try:
            yield
        finally:
            done.set()
    for call in running:
        call.result()


def watched(alert: str) -> str:
    """The vector that an alert's expression compares: the expression itself has no data where all is well."""
    absent = re.fullmatch(r"absent\((.+)\)", alert)
    return absent[1] if absent else re.sub(r" (>|==) [\d.]+$", "", alert)


def without_data(prometheus: Prometheus) -> list[str]:
    """Queries of dashboard and rules that have none; of GPUs there is none here."""
    queries = [*QUERIES, *(rule["record"] for rule in RULES if "record" in rule), *map(watched, ALERTS.values())]
    return [query for query in queries if "DCGM_" not in query and not prometheus.has_data(query)]


def test_every_query_has_data(prometheus: Prometheus) -> None:
    assert without_data(prometheus) == []
    assert len(QUERIES) > 25
    assert prometheus.values("nonsense") == []


def test_no_alert_fires_on_a_healthy_stack(prometheus: Prometheus) -> None:
    groups = prometheus.get("rules")["groups"]
    loaded = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
    assert set(ALERTS) < set(loaded)
    assert set(loaded.values()) == {"ok"}
    assert prometheus.get("alerts")["alerts"] == []


def test_queries_of_gpus_are_valid(prometheus: Prometheus) -> None:
    """They read what dcgm-exporter is told to export."""
    exported = set(re.findall(r"^(DCGM_\w+),", (FOLDER / "gpu.csv").read_text(), re.MULTILINE))
    of_gpus = [query for query in QUERIES if "DCGM_" in query]
    assert {name for query in of_gpus for name in re.findall(r"DCGM_\w+", query)} <= exported
    assert [prometheus.values(query) for query in of_gpus] == [[]] * 4


@needs_programs
def test_metrics_are_well_formed(stack: Stack) -> None:
    """And named as promtool wants them."""
    command = ["promtool", "check", "metrics"]
    done = subprocess.run(command, input=stack.get("embed", "/metrics").body, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@needs_programs
def test_alerts_fire_when_they_should() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", RULES_TEST.name], cwd=RULES_TEST.parent, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [case for test in yaml.safe_load(RULES_TEST.read_text())["tests"] for case in test["alert_rule_test"]]
    for kind in (True, False):
        assert {case["alertname"] for case in cases if bool(case["exp_alerts"]) == kind} == set(ALERTS)


def test_every_alert_is_explained() -> None:
    page = (ROOT / "docs" / "production.md").read_text()
    assert re.findall(r"^\| `([A-Z]\w+)` \|", page, re.MULTILINE) == [*ALERTS]


@needs_programs
def test_configuration_is_valid() -> None:
    for check in (["config", "prometheus.yml"], ["rules", "rules.yml"]):
        subprocess.run(["promtool", "check", *check], cwd=FOLDER, check=True, capture_output=True)


def kept(content: Any, read: Any) -> bool:
    """Whether all of `content` is in `read`, which may have more."""
    if isinstance(content, dict):
        return all(key in read and kept(value, read[key]) for key, value in content.items())
    if isinstance(content, list):
        return all(itertools.starmap(kept, zip(content, read, strict=True)))
    return bool(content == read)


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    """Read and written by Grafana's own types, which drop what they do not know."""
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins")  # from Python 3.11 on
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    def known(dashboard: Any) -> bool:
        return kept(dashboard, json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard))))

    plugins.register_default_plugins()
    assert known(DASHBOARD)
    assert not known(DASHBOARD | {"colour": "red"})
    assert not known({"panels": [PANELS[0] | {"colour": "red"}]})


def test_panels_do_not_overlap() -> None:
    cells: list[tuple[int, int]] = []
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells += itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))
    assert len(cells) == len(set(cells))
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_the_dashboard_reads_the_one_source_that_is_provisioned() -> None:
    (source,) = yaml.safe_load((FOLDER / "datasource.yml").read_text())["datasources"]
    (variable,) = DASHBOARD["templating"]["list"]
    assert source["type"] == variable["query"] == "prometheus"
    assert {json.dumps(panel["datasource"]) for panel in PANELS} == {
        json.dumps({"type": "prometheus", "uid": f"${{{variable['name']}}}"})
    }
