"""Metrics for Prometheus: requests are counted as they end, the rest is read when it asks."""

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from keepwarm.core.events import Completed, Failed
from keepwarm.engine.snapshot import EngineSnapshot

TIME_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """Owns the counters of requests. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._http = Counter(
            "keepwarm_http_requests", "HTTP requests", ["route", "status"], registry=self._registry
        )
        self._http_s = self._histogram("keepwarm_http_request_seconds", "Until the last byte")
        self._connections = Gauge(
            "keepwarm_connections", "HTTP connections that are open", registry=self._registry
        )
        self._tasks = Gauge("keepwarm_tasks", "Tasks of the event loop", registry=self._registry)
        self._ended = Counter(
            "keepwarm_requests", "Requests that ended, and how", ["end"], registry=self._registry
        )
        self._ttft_s = self._histogram("keepwarm_ttft_seconds", "Arrival to first token")
        self._tpot_s = self._histogram("keepwarm_tpot_seconds", "Time per token after the first")
        self._queue_s = self._histogram("keepwarm_queue_seconds", "Arrival to row")
        self._restore_s = self._histogram("keepwarm_restore_seconds", "Copying KV into the slab")
        self._tokens = Counter(
            "keepwarm_tokens", "Tokens of ended requests", ["kind"], registry=self._registry
        )
        self._reasons = Counter(
            "keepwarm_divergences",
            "Why prompts left what was known",
            ["reason"],
            registry=self._registry,
        )

    def observe_http(self, route: str, status: int, seconds: float) -> None:
        """Count an HTTP request that has been answered, or whose client has gone (499)."""
        self._http.labels(route, str(status)).inc()
        self._http_s.observe(seconds)

    def observe_end(self, event: Completed | Failed) -> None:
        """Count a request that has ended in the engine."""
        if isinstance(event, Failed):
            self._ended.labels(type(event.error).__name__).inc()
            return
        self._ended.labels(event.finish_reason.value).inc()
        usage, timing = event.usage, event.timing
        self._tokens.labels("prompt").inc(usage.prompt_tokens)
        self._tokens.labels("cached").inc(usage.cached_tokens)
        self._tokens.labels("completion").inc(usage.completion_tokens)
        self._reasons.labels(event.cache.reason).inc()
        self._queue_s.observe(timing.queued_s)
        self._restore_s.observe(event.cache.restored_s)
        if timing.first_token_s is not None:
            self._ttft_s.observe(timing.first_token_s)
            if usage.completion_tokens > 1:
                rest_s = timing.total_s - timing.first_token_s
                self._tpot_s.observe(rest_s / (usage.completion_tokens - 1))

    def text(self, snapshot: EngineSnapshot | None, num_connections: int) -> bytes:
        """Write all metrics in Prometheus's text format; without a snapshot, HTTP's only."""
        self._connections.set(num_connections)
        self._tasks.set(len(asyncio.all_tasks()))
        text = generate_latest(self._registry)
        if snapshot is not None:
            registry = CollectorRegistry()
            registry.register(_OfSnapshot(snapshot))
            text += generate_latest(registry)
        return text

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=TIME_BUCKETS, registry=self._registry)


class _OfSnapshot(Collector):
    """Makes metrics of the engine's snapshot."""

    def __init__(self, snapshot: EngineSnapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        yield from self._gauges()
        yield from self._counters()

    def _gauges(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        pool, store = snapshot.pool, snapshot.store
        for name, text, value in (
            ("waiting_requests", "Requests that wait for a row", snapshot.num_waiting),
            ("running_requests", "Rows in the batch", snapshot.num_running),
            ("memory_budget_bytes", "What KV may take in memory", pool.budget_bytes),
            ("memory_used_bytes", "What it takes", pool.used_bytes),
            ("disk_budget_bytes", "What the store may take", store.budget_bytes),
            ("disk_used_bytes", "What it takes", store.disk_bytes),
            ("disk_records", "Records of KV on disk", store.num_records),
            ("disk_queued_bytes", "KV that waits to be written", store.queued_bytes),
            ("store_fault", "1 while the disk refuses", int(store.fault is not None)),
        ):
            yield GaugeMetricFamily(f"keepwarm_{name}", text, value=value)
        kinds = GaugeMetricFamily(
            "keepwarm_memory_bytes", "What KV takes in memory, by kind", labels=["kind"]
        )
        for kind, nbytes in pool.bytes_by_kind.items():
            kinds.add_metric([kind], nbytes)
        yield kinds

    def _counters(self) -> Iterator[Metric]:
        batch, tiers, store = self._snapshot.batch, self._snapshot.tiers, self._snapshot.store
        mended = self._snapshot.num_mended_spans
        for name, text, value in (
            ("steps", "Steps of the batch", batch.steps),
            ("decoded_tokens", "Tokens decoded", batch.decoded_tokens),
            ("prefilled_tokens", "Tokens prefilled", batch.prefilled_tokens),
            ("preemptions", "Rows that gave way to others", batch.preemptions),
            ("generator_failures", "Steps that raised", batch.generator_failures),
            ("mended_spans", "Parts of prompts that stored ids did not say", mended),
            ("damaged_records", "Records that failed their check", store.num_damaged),
            ("store_faults", "Times that the disk refused", store.num_faults),
            ("written_bytes", "KV written to disk", store.written_bytes),
            ("evicted_bytes", "KV evicted from disk", store.evicted_bytes),
        ):
            yield CounterMetricFamily(f"keepwarm_{name}", text, value=value)
        events = CounterMetricFamily(
            "keepwarm_tier_events", "What happened to blocks and slabs", labels=["event"]
        )
        for event, count in asdict(tiers).items():
            events.add_metric([event], count)
        yield events
