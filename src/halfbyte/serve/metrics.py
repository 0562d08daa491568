"""Owns the figures that Prometheus collects."""

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
TOTALS: dict[str, tuple[str, Callable[[Engine], int]]] = {
    "prompt_tokens": ("Tokens of prompts.", lambda engine: engine.counts.prompt_tokens),
    "shared_tokens": ("Those computed before.", lambda engine: engine.counts.shared_tokens),
    "generated_tokens": ("Tokens generated.", lambda engine: engine.counts.generated_tokens),
    "passes": ("Passes of the model.", lambda engine: engine.counts.passes),
    "lanes": ("Requests in all passes; by passes: the batch.", lambda engine: engine.counts.lanes),
    "failed_passes": ("Passes that failed.", lambda engine: engine.counts.failed_passes),
    "failed_answers": (
        "Answers that failed and ended no other.",
        lambda engine: engine.counts.failed_answers,
    ),
}
STANDS: dict[str, tuple[str, Callable[[Engine], int]]] = {
    "running": ("Answers being made.", lambda engine: engine.num_running),
    "waiting": ("Answers that wait.", lambda engine: engine.num_waiting),
}


class Metrics:
    """Requests as they end, and the engines' totals as they stand."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engines: list[Engine]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_EngineCollector(engines))
        self._requests = Counter(
            "halfbyte_requests",
            "Requests by route and status; status 0: the client had gone.",
            ["route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "halfbyte_request_seconds",
            "From the request to the end of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )

        self._first = Histogram(
            "halfbyte_first_token_seconds",
            "From the request to its first token, the wait for a slot included.",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )

    def first_token(self, model: str) -> Callable[[float], None]:
        """What takes the seconds to a first token of a model."""
        observe: Callable[[float], None] = self._first.labels(model).observe
        return observe

    def told(self, route: str, status: int, seconds: float) -> None:
        """A request has ended."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, engines: list[Engine]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        """The engines' figures, added up."""
        for name, (what, read) in TOTALS.items():
            value = sum(map(read, self._engines))
            yield CounterMetricFamily(f"halfbyte_{name}", what, value=value)
        for name, (what, read) in STANDS.items():
            value = sum(map(read, self._engines))
            yield GaugeMetricFamily(f"halfbyte_{name}", what, value)
