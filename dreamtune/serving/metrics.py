"""What a server counts and measures, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
# done: got its picture; failed: its drawing did; invalid: was told what is wrong with it; denied:
# lacks the key; full: of the queue; late: timed out; cancelled: its client has gone.
OUTCOMES = ("done", "failed", "invalid", "denied", "full", "late", "cancelled")


class Metrics:
    """Of one server: two in a process do not add up."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "dreamtune_requests", "Requests by what became of them", ["outcome"], registry=registry
        )
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        self.queue = Gauge("dreamtune_queue_length", "Requests that wait", registry=registry)
        self.adapters = Gauge("dreamtune_adapters", "Adapters served", registry=registry)
        self.left_out = Gauge(
            "dreamtune_adapters_left_out", "Adapters that cannot be served", registry=registry
        )
        self.rows = Histogram(
            "dreamtune_batch_rows", "Pictures of a batch", buckets=ROWS, registry=registry
        )
        self.waited = Histogram(
            "dreamtune_wait_seconds", "From request to batch", buckets=SECONDS, registry=registry
        )
        self.drawn = Histogram(
            "dreamtune_draw_seconds", "Drawing of a batch", buckets=SECONDS, registry=registry
        )
        self.latency = Histogram(
            "dreamtune_request_seconds", "From request to answer", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.replicas = Gauge("dreamtune_replicas", "Processes that draw", registry=registry)
        self.resends = Counter(
            "dreamtune_resends", "Batches sent again, whose replica was lost", registry=registry
        )
        self.memory = Gauge(
            "dreamtune_gpu_memory_bytes", "GPU memory of what draws; 0 without a GPU", ["kind"],
            registry=registry,
        )  # fmt: skip

    def count(self, outcome: str) -> None:
        assert outcome in OUTCOMES, outcome
        self.requests.labels(outcome).inc()

    def batch(self, rows: int, seconds: float) -> None:
        self.rows.observe(rows)
        self.drawn.observe(seconds)

    def watch_queue(self, length: Callable[[], int]) -> None:
        self.queue.set_function(length)

    def watch_adapters(self, served: Callable[[], int], left_out: Callable[[], int]) -> None:
        self.adapters.set_function(served)
        self.left_out.set_function(left_out)

    def watch_jobs(self, states: Collection[str], count: Callable[[str], int]) -> None:
        """count: how many jobs of training are in a state."""
        jobs = Gauge("dreamtune_jobs", "Training jobs by state", ["state"], registry=self.registry)
        for state in states:
            jobs.labels(state).set_function(partial(count, state))

    def watch_processes(
        self, running: Callable[[], int], memory: Callable[[], dict[str, int]]
    ) -> None:
        self.replicas.set_function(running)
        for kind in memory():
            self.memory.labels(kind).set_function(partial(lambda kind: memory()[kind], kind))

    def text(self) -> bytes:
        return generate_latest(self.registry)


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # of `generate_latest`
