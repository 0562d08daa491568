"""Owns the figures that Prometheus collects."""

from __future__ import annotations

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from halfbyte.serve.engine import Engine

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Requests as they end, and the engine's totals as they stand."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_EngineCollector(engine))
        self._requests = Counter(
            "halfbyte_requests",
            "Requests by route and status.",
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

    def told(self, route: str, status: int, seconds: float) -> None:
        """A request has ended; status 0: its client had gone."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self):  # type: ignore[no-untyped-def]
        """The engine's figures."""
        engine, counts = self._engine, self._engine.counts
        totals = {
            "prompt_tokens": (counts.prompt_tokens, "Tokens of prompts."),
            "shared_tokens": (counts.shared_tokens, "Those that had been computed before."),
            "generated_tokens": (counts.generated_tokens, "Tokens generated."),
            "passes": (counts.passes, "Passes of the model."),
            "lanes": (counts.lanes, "Requests in all passes: lanes by passes is the batch."),
            "engine_errors": (counts.errors, "Passes that failed."),
        }
        for name, (value, what) in totals.items():
            yield CounterMetricFamily(f"halfbyte_{name}", what, value=value)
        yield GaugeMetricFamily("halfbyte_running", "Answers being made.", engine.num_running)
        yield GaugeMetricFamily("halfbyte_waiting", "Answers that wait.", engine.num_waiting)
