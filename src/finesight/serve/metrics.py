"""Figures of a server as Prometheus reads them; no label holds anything that a client wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from finesight.infer.request import Usage

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What has been asked and answered; `state` is asked whenever the figures are read."""

    def __init__(self, state: Callable[[], dict[str, float]]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._registry.register(_State(state))
        self._requests = Counter(
            "finesight_requests",
            "Requests by route and status.",
            ["route", "status"],
            registry=self._registry,
        )
        self._tokens = Counter(
            "finesight_tokens",
            "Tokens of questions, of those that were known from earlier ones, and of answers.",
            ["kind"],
            registry=self._registry,
        )
        self._finished = Counter(
            "finesight_answers", "Answers by why they ended.", ["finish"], registry=self._registry
        )
        self._first = Histogram(
            "finesight_first_token_seconds",
            "From a request to the first token of its answer.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._seconds = Histogram(
            "finesight_request_seconds",
            "Of a request, by route.",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request has ended."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """An answer has begun."""
        self._first.observe(seconds)

    def answered(self, finish: str, usage: Usage) -> None:
        """An answer has ended."""
        self._finished.labels(finish).inc()
        for kind, count in (
            ("prompt", usage.prompt), ("known", usage.known), ("answer", usage.answer)
        ):  # fmt: skip
            self._tokens.labels(kind).inc(count)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)


class _State(Collector):
    """How the model's service stands now."""

    def __init__(self, state: Callable[[], dict[str, float]]) -> None:
        self._state = state

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One gauge for each figure."""
        for name, value in self._state().items():
            gauge = GaugeMetricFamily(f"finesight_{name}", f"{name.replace('_', ' ')}, now.")
            gauge.add_metric([], value)
            yield gauge
