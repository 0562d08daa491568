"""Owns the metrics that Prometheus collects."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    Metric,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from halfbyte.serve.engine import Engine

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
COUNTERS: dict[str, tuple[str, Callable[[Engine], int]]] = {
    "prompt_tokens": ("Prompt tokens.", lambda engine: engine.counts.prompt_tokens),
    "shared_tokens": (
        "Prompt tokens taken from the KV cache.",
        lambda engine: engine.counts.shared_tokens,
    ),
    "generated_tokens": ("Generated tokens.", lambda engine: engine.counts.generated_tokens),
    "passes": ("Forward passes.", lambda engine: engine.counts.passes),
    "lanes": (
        "Requests, summed over all passes; divided by passes: the batch size.",
        lambda engine: engine.counts.slot_inputs,
    ),
    "failed_passes": ("Failed forward passes.", lambda engine: engine.counts.failed_passes),
    "failed_answers": (
        "Answers that failed without affecting any other.",
        lambda engine: engine.counts.failed_answers,
    ),
}
GAUGES: dict[str, tuple[str, Callable[[Engine], int]]] = {
    "running": ("Answers in progress.", lambda engine: engine.num_running),
    "waiting": ("Answers waiting for a slot.", lambda engine: engine.num_waiting),
}


class Metrics:
    """Metrics of finished requests, and the engines' current totals."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engines: list[Engine]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_EngineCollector(engines))
        self._requests = Counter(
            "halfbyte_requests",
            "Requests by route and status; status 0: the client disconnected.",
            ["route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "halfbyte_request_seconds",
            "Seconds from the request to the end of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._first_token_seconds = Histogram(
            "halfbyte_first_token_seconds",
            "Seconds from the request to its first token, including the wait for a slot.",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )

    def first_token_observer(self, model: str) -> Callable[[float], None]:
        """Return a function that records the seconds until a first token of a model."""
        observe: Callable[[float], None] = self._first_token_seconds.labels(model).observe
        return observe

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Record a finished request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, engines: list[Engine]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        """Yield the sums over all engines."""
        for name, (description, read) in COUNTERS.items():
            value = sum(map(read, self._engines))
            yield CounterMetricFamily(f"halfbyte_{name}", description, value=value)
        for name, (description, read) in GAUGES.items():
            value = sum(map(read, self._engines))
            yield GaugeMetricFamily(f"halfbyte_{name}", description, value)
