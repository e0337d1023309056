"""What the gateway counts, and `GET /metrics`, which shows it to Prometheus.

A scrape also asks every model for an answer, unless one has just given one: a model whose process is dead is seen
without a caller. Triton's own metrics are on its own port.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from operator import add
from pathlib import Path
from typing import Literal, TypeVar, get_args

from aiohttp import web
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.aiohttp import make_aiohttp_handler
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from tools.shim.gateway import Result
from tools.shim.generation import Generation
from tools.shim.residency.loader import Residency
from tools.shim.residency.rules import Reason
from tools.shim.upstream import Upstream

SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)
"""Upper bounds of the histograms' buckets."""

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable by which prometheus_client counts into files that several processes have in common."""

LIVING: Literal["livesum"] = "livesum"
"""How what is under way is told of several processes: without those that died."""

WATCHED_ERRORS = ("overloaded", "not_ready", "timeout", "upstream", "internal", "unauthorized", "too_big")
"""Types of errors that an alert reads; they are shown as 0 before there is one."""

Key = TypeVar("Key")
Child = TypeVar("Child")


class Children(dict[Key, Child]):
    """Label values -> what counts under them, made when they first come and from then on only looked up."""

    def __init__(self, make: Callable[[Key], Child]) -> None:
        self._make = make

    def __missing__(self, key: Key) -> Child:
        child = self[key] = self._make(key)
        return child


class Memory(Collector):
    """What is loaded, by family under the name of its first model."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency

    def collect(self) -> Iterator[Metric]:
        """As it is when Prometheus asks."""
        by_model = ["model"]
        size = GaugeMetricFamily("gateway_model_resident_bytes", "Memory of a loaded model", labels=by_model)
        loads = CounterMetricFamily("gateway_model_loads", "Loads of a model", labels=by_model)
        evictions = CounterMetricFamily(
            "gateway_model_evictions", "Unloads of a model, and what for", labels=["model", "reason"]
        )
        seconds = SummaryMetricFamily("gateway_model_load_seconds", "What loads took", labels=by_model)
        waiting = GaugeMetricFamily("gateway_model_waiting_calls", "Calls that wait for a load", labels=by_model)
        for one in self._residency.families:
            name = [one.family.name]
            size.add_metric(name, one.size if one.state != "absent" else 0)
            loads.add_metric(name, one.loads)
            for reason in get_args(Reason):
                evictions.add_metric([*name, reason], one.evictions[reason])
            seconds.add_metric(name, one.timed, one.loading)
            waiting.add_metric(name, one.waiting)
        budget = GaugeMetricFamily("gateway_model_budget_bytes", "Memory that there is for models")
        budget.add_metric([], self._residency.budget)
        yield from (size, loads, evictions, seconds, waiting, budget)


class Ready(Collector):
    """Which models answer, by what was last seen of them."""

    def __init__(self) -> None:
        self.problems: Mapping[str, str | None] = {}

    def collect(self) -> Iterator[Metric]:
        """As it is when Prometheus asks."""
        ready = GaugeMetricFamily("gateway_model_ready", "Whether the model answers now", labels=["model"])
        for name, problem in self.problems.items():
            ready.add_metric([name], problem is None)
        yield ready


class Processes(Collector):
    """What all workers that count into a folder take together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        """The sum of what each says of itself; the start is the first one's."""
        found: dict[str, Metric] = {}
        for file in self._folder.glob(f"gauge_{LIVING}_*.db"):
            pid = file.stem.rpartition("_")[2]
            for metric in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                merge = min if metric.name == "process_start_time_seconds" else add
                (sample,) = metric.samples
                if known := found.get(metric.name):
                    value = merge(known.samples[0].value, sample.value)
                    known.samples = [sample._replace(value=value)]
                else:
                    found[metric.name] = metric
        yield from found.values()


class Metrics:
    """The counters of one gateway."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        # They are a second series beside each one, for readers that Prometheus is not.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        # Several processes count into files of one folder, and any of them shows what those of all say.
        folder = os.environ.get(FOLDER)
        registry = CollectorRegistry()
        shown = CollectorRegistry() if folder else registry
        if folder:
            MultiProcessCollector(shown, folder)  # type: ignore[no-untyped-call]
            shown.register(Processes(Path(folder)))
        else:
            ProcessCollector(registry=registry)

        about = "Requests of any method, 499 for callers that went away"
        requests = Counter("gateway_requests", about, ["route", "status"], registry=registry)
        self._requests = Children[tuple[str, int], Counter](lambda key: requests.labels(*key))

        about = "Seconds from a call's arrival until its answer can be sent, errors included"
        seconds = Histogram("gateway_call_seconds", about, ["route"], registry=registry, buckets=SECONDS)
        self._seconds = Children[str, Histogram](seconds.labels)

        errors = Counter("gateway_errors", "Calls refused or failed", ["type"], registry=registry)
        self._errors = Children[str, Counter](errors.labels)
        for kind in WATCHED_ERRORS:
            self._errors[kind].inc(0)

        about = "Seconds of each stage of calls that were answered with vectors or scores"
        stages = Histogram("gateway_stage_seconds", about, ["stage"], registry=registry, buckets=SECONDS)
        self._stages = Children[str, Histogram](stages.labels)

        texts = Counter("gateway_texts", "Texts of answered calls", ["model"], registry=registry)
        tokens = Counter("gateway_tokens", "Tokens of the texts of answered calls", ["model"], registry=registry)
        cut = Counter(
            "gateway_truncated_texts", "Texts that were cut to the model's window", ["model"], registry=registry
        )
        self._amounts = Children[str, list[Counter]](lambda model: [c.labels(model) for c in (texts, tokens, cut)])

        prompts = Counter(
            "gateway_prompt_tokens", "Tokens of prompts that were answered", ["model"], registry=registry
        )
        written = Counter("gateway_generated_tokens", "Tokens of answers", ["model"], registry=registry)
        about = "Seconds until the first piece of an answer that a model writes"
        first = Histogram("gateway_first_token_seconds", about, ["model"], registry=registry, buckets=SECONDS)
        self._written = Children[str, tuple[Counter, Counter, Histogram]](
            lambda model: (prompts.labels(model), written.labels(model), first.labels(model))
        )

        about = "Calls under way"
        self.in_flight = Gauge("gateway_calls_in_flight", about, registry=registry, multiprocess_mode=LIVING)
        self._ready = Ready()
        shown.register(self._ready)
        if upstream.residency is not None:
            registry.register(Memory(upstream.residency))
        self._expose = make_aiohttp_handler(shown)

    def count_request(self, route: str, status: int) -> None:
        """Counts any request, however it ended."""
        self._requests[route, status].inc()

    def count_call(self, route: str, seconds: float, error: str | None) -> None:
        """Counts a POST, and the error that it ended with by its stable word."""
        self._seconds[route].observe(seconds)
        if error:
            self._errors[error].inc()

    def count_result(self, result: Result, stages: Mapping[str, float]) -> None:
        """Counts what a call was answered with, and the seconds that each of its stages took."""
        for stage, seconds in stages.items():
            self._stages[stage].observe(seconds)
        texts, tokens, cut = self._amounts[result.model.name]
        texts.inc(len(result.tensors["token_count"]))
        tokens.inc(result.tokens)
        cut.inc(result.truncated)

    def count_generation(self, generation: Generation) -> None:
        """Counts an answer that was written, whole or not."""
        prompts, written, first = self._written[generation.model.name]
        prompts.inc(generation.prompt_tokens)
        written.inc(generation.tokens)
        if not math.isnan(generation.first):
            first.observe(generation.first)

    async def expose(self, request: web.Request) -> web.StreamResponse:
        """Answers `GET /metrics`."""
        self._ready.problems = await self._upstream.problems()
        return await self._expose(request)
