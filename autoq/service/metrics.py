"""What the server tells Prometheus: its own requests, and what is in the database at the moment of asking."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autoq.service.heavy import Scheduler
from autoq.store import Store

_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """The metrics of one application."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, store: Store, scheduler: Scheduler | None = None) -> None:
        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "autoq_request_seconds",
            "Time to the end of an answer, by route, method and status",
            ("route", "method", "status"),
            registry=self.registry,
            buckets=_BUCKETS,
        )
        self.streams = Gauge("autoq_event_streams", "Clients that follow events", registry=self.registry)
        self.database_errors = Counter(
            "autoq_database_errors", "Requests that the database failed", registry=self.registry
        )
        self.registry.register(_Stored(store, scheduler))

    def text(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class _Stored(Collector):
    """Counts that are asked for when they are read."""

    def __init__(self, store: Store, scheduler: Scheduler | None) -> None:
        self.store, self.scheduler = store, scheduler

    def describe(self) -> Iterator[Metric]:
        """Nothing is asked of the database before it is needed."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Studies, trials and workers by state, and how many studies wait."""
        studies, trials, workers = self.store.feed.counts()
        for name, what, counts in (
            ("autoq_studies", "Studies by state", studies),
            ("autoq_trials", "Trials by state", trials),
            ("autoq_workers", "Workers by state", workers),
        ):
            family = GaugeMetricFamily(name, what, labels=("state",))
            for state, count in counts.items():
                family.add_metric((state,), count)
            yield family
        yield GaugeMetricFamily("autoq_queue_length", "Studies that wait", studies.get("queued", 0))
        for name, count in ({} if self.scheduler is None else self.scheduler.counts()).items():
            yield GaugeMetricFamily(f"autoq_scheduler_{name}", f"Of the scheduler: {name.replace('_', ' ')}", count)


class Measured:
    """Middleware: time every request, under its route's template and not under its address."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, begun, streams = 0, time.perf_counter(), False

        async def watched(message: Message) -> None:
            nonlocal status, streams
            if message["type"] == "http.response.start":
                status = message["status"]
                streams = (b"content-type", b"text/event-stream") in [(k, v[:17]) for k, v in message["headers"]]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            if not streams:  # how long somebody follows says nothing of the server
                route = getattr(scope.get("route"), "path", "(none)")
                method = scope["method"] if scope["method"] in _METHODS else "(other)"
                self.metrics.requests.labels(route, method, str(status)).observe(time.perf_counter() - begun)


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
