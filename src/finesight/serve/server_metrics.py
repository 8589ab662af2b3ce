"""Prometheus metrics of the inference server. Labels never contain client data."""

from __future__ import annotations

from collections.abc import Iterator

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

from finesight.infer.inference_service import InferenceService
from finesight.infer.request import TokenUsage

LATENCY_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServerMetrics:
    """Counters and histograms of requests, and gauges of the inference service."""

    def __init__(self, service: InferenceService) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        registry.register(_GaugeCollector(service))
        self._requests = Counter(
            "finesight_requests",
            "Requests by route and status.",
            ["route", "status"],
            registry=registry,
        )
        self._tokens = Counter(
            "finesight_tokens",
            "Tokens by kind: prompt, cached, completion.",
            ["kind"],
            registry=registry,
        )
        self._completions = Counter(
            "finesight_completions",
            "Completions by finish reason.",
            ["finish_reason"],
            registry=registry,
        )
        self._time_to_first_token = Histogram(
            "finesight_time_to_first_token_seconds",
            "Time to first token.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._request_seconds = Histogram(
            "finesight_request_seconds",
            "Duration of requests by route.",
            ["route"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )

    def record_request(self, route: str, status: int, seconds: float) -> None:
        """Record a complete response for a route template, such as `/v1/files/{name}`."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def record_first_token(self, seconds: float) -> None:
        """Record the time to first token of a request in seconds."""
        self._time_to_first_token.observe(seconds)

    def record_completion(self, finish_reason: str, usage: TokenUsage) -> None:
        """Record a finished completion, its finish reason and its token usage."""
        self._completions.labels(finish_reason).inc()
        self._tokens.labels("prompt").inc(usage.prompt_tokens)
        self._tokens.labels("cached").inc(usage.cached_tokens)
        self._tokens.labels("completion").inc(usage.completion_tokens)

    def render_text(self) -> bytes:
        """Render all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class _GaugeCollector(Collector):
    def __init__(self, service: InferenceService) -> None:
        self._service = service

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield one gauge for each current value of the inference service."""
        stats = self._service.get_stats()
        for name, value in (
            ("requests_running", stats.num_running),
            ("requests_waiting", stats.num_waiting),
            ("kv_cache_blocks_free", stats.num_free_blocks),
            ("kv_cache_blocks", stats.num_blocks),
        ):
            description = f"Current {name.replace('_', ' ')}."
            yield GaugeMetricFamily(f"finesight_{name}", description, value)
