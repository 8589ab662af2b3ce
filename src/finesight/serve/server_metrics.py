"""Prometheus metrics of the inference server. Labels never contain client data."""

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

from finesight.infer.request import TokenUsage

LATENCY_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServerMetrics:
    """Counters and histograms of requests, and gauges of the inference service.

    Args:
        get_gauges: Returns the current values of the service by name. It is called on every scrape.
    """

    def __init__(self, get_gauges: Callable[[], dict[str, float]]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._registry.register(_GaugeCollector(get_gauges))
        self._requests = Counter(
            "finesight_requests",
            "Requests by route and status.",
            ["route", "status"],
            registry=self._registry,
        )
        self._tokens = Counter(
            "finesight_tokens",
            "Tokens by kind: prompt, cached, completion.",
            ["kind"],
            registry=self._registry,
        )
        self._completions = Counter(
            "finesight_completions",
            "Completions by finish reason.",
            ["finish_reason"],
            registry=self._registry,
        )
        self._time_to_first_token = Histogram(
            "finesight_time_to_first_token_seconds",
            "Time to first token.",
            buckets=LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        self._request_seconds = Histogram(
            "finesight_request_seconds",
            "Duration of requests by route.",
            ["route"],
            buckets=LATENCY_BUCKETS_S,
            registry=self._registry,
        )

    def record_request(self, route: str, status: int, seconds: float) -> None:
        """Record a request when its response is complete.

        Args:
            route: Template of the path, such as `/v1/files/{name}`.
            status: HTTP status of the response.
            seconds: Duration of the request.
        """
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def record_first_token(self, seconds: float) -> None:
        """Record the time to first token of a request in seconds."""
        self._time_to_first_token.observe(seconds)

    def record_completion(self, finish_reason: str, usage: TokenUsage) -> None:
        """Record a finished completion, its finish reason and its token usage."""
        self._completions.labels(finish_reason).inc()
        counts = {
            "prompt": usage.prompt_tokens,
            "cached": usage.cached_tokens,
            "completion": usage.completion_tokens,
        }
        for kind, count in counts.items():
            self._tokens.labels(kind).inc(count)

    def render_text(self) -> bytes:
        """Render all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class _GaugeCollector(Collector):
    def __init__(self, get_gauges: Callable[[], dict[str, float]]) -> None:
        self._get_gauges = get_gauges

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield one gauge for each current value of the inference service."""
        for name, value in self._get_gauges().items():
            gauge = GaugeMetricFamily(f"finesight_{name}", f"Current {name.replace('_', ' ')}.")
            gauge.add_metric([], value)
            yield gauge
