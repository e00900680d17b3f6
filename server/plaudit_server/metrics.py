"""Every instrument, named once. One registry for one server; label values are few and ours, never a client's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from .observer import BatchReport

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)
_SIZES = tuple(2**power for power in range(13))
_TOKENS = tuple(2**power for power in range(4, 18))
_SCORES = (-100, -50, -20, -10, -5, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 5, 10, 20, 50, 100)


class Metrics:
    """The instruments and their registry."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._answered: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        one = ["model"]
        self._requests = Counter(
            "plaudit_requests",
            "Requests by route and status; 499 is a client that went away",
            ["route", "status"],
            registry=registry,
        )
        self._request_seconds = Histogram(
            "plaudit_request_seconds",
            "Time from the request's head to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._open = 0
        Gauge("plaudit_requests_open", "Requests being answered", registry=registry).set_function(lambda: self._open)
        self._items = Counter("plaudit_items", "Items answered, with a score or an error", one, registry=registry)
        self._item_errors = Counter(
            "plaudit_item_errors", "Items answered with an error", ["model", "code"], registry=registry
        )
        self._tokens = Counter(
            "plaudit_tokens",
            "Tokens of scored items: computed went through the model, shared is prompts computed once, cached and "
            "duplicate needed nothing, wasted was computed for nobody",
            ["model", "kind"],
            registry=registry,
        )
        self._queue_tokens = Gauge("plaudit_queue_tokens", "Tokens that wait for a worker", one, registry=registry)
        self._queue_items = Gauge("plaudit_queue_items", "Items without an answer", one, registry=registry)
        self._token_budget = Gauge(
            "plaudit_token_budget", "Tokens of a batch: as asked for, or as fits into memory", one, registry=registry
        )
        self._asleep = Gauge("plaudit_asleep", "1 while the workers' memory is lent out", one, registry=registry)
        self._workers = Gauge("plaudit_workers_ready", "Workers that take batches", one, registry=registry)
        self._batch_items = Histogram(
            "plaudit_batch_items", "Sequences of a batch", one, buckets=_SIZES, registry=registry
        )
        self._batch_tokens = Histogram(
            "plaudit_batch_tokens", "Tokens computed in a batch", one, buckets=_TOKENS, registry=registry
        )
        self._batch_seconds = Histogram(
            "plaudit_batch_seconds", "Compute time of a batch", one, buckets=_SECONDS, registry=registry
        )
        self._tokenize_seconds = Histogram(
            "plaudit_tokenize_seconds", "Time to tokenise a request's items", one, buckets=_SECONDS, registry=registry
        )
        self._scores = Histogram("plaudit_score", "Scores, untransformed", one, buckets=_SCORES, registry=registry)
        self._restarts = Counter("plaudit_worker_restarts", "Workers that replaced a lost one", one, registry=registry)
        self._late_jit = Counter("plaudit_late_jit", "Kernels compiled after warm-up", one, registry=registry)
        self._engine_errors = Counter(
            "plaudit_engine_errors",
            "Items that the engine answered with an error",
            ["model", "code"],
            registry=registry,
        )

    def of_model(self, id: str) -> ModelMetrics:
        """The instruments of one model: what its engine reports to."""
        return ModelMetrics(self, id)

    def request_begun(self) -> None:
        self._open += 1

    def request_done(self, route: str, status: int, seconds: float) -> None:
        self._open -= 1
        if (route, status) not in self._answered:  # a label is looked up slowly, and there are few
            self._answered[route, status] = (
                self._requests.labels(route, str(status)),
                self._request_seconds.labels(route),
            )
        counter, histogram = self._answered[route, status]
        counter.inc()
        histogram.observe(seconds)

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class ModelMetrics:
    """The instruments of one model. An `EngineObserver`."""

    def __init__(self, metrics: Metrics, id: str) -> None:
        self._id = id
        self._item_errors = metrics._item_errors
        self._engine_errors = metrics._engine_errors
        self._items = metrics._items.labels(id)
        self._tokens = {
            kind: metrics._tokens.labels(id, kind) for kind in ("computed", "shared", "cached", "duplicate", "wasted")
        }
        self._queue_tokens = metrics._queue_tokens.labels(id)
        self._queue_items = metrics._queue_items.labels(id)
        self._token_budget = metrics._token_budget.labels(id)
        self._asleep = metrics._asleep.labels(id)
        self._workers = metrics._workers.labels(id)
        self._batch_items = metrics._batch_items.labels(id)
        self._batch_tokens = metrics._batch_tokens.labels(id)
        self._batch_seconds = metrics._batch_seconds.labels(id)
        self._tokenize_seconds = metrics._tokenize_seconds.labels(id)
        self._scores = metrics._scores.labels(id)
        self._restarts = metrics._restarts.labels(id)
        self._late_jit = metrics._late_jit.labels(id)

    def batch_done(self, report: BatchReport) -> None:
        self._batch_items.observe(report.sequences)
        self._batch_tokens.observe(report.computed_tokens)
        self._batch_seconds.observe(report.seconds)
        self._tokens["computed"].inc(report.computed_tokens)
        self._tokens["shared"].inc(report.shared_tokens)
        self._late_jit.inc(report.late_jit)

    def follow(
        self,
        tokens: Callable[[], int],
        items: Callable[[], int],
        budget: Callable[[], int],
        asleep: Callable[[], bool],
        workers: Callable[[], int],
    ) -> None:
        """What is asked for when somebody looks: tokens that wait for a worker, items without an answer, tokens of a
        batch, whether there is no worker on purpose, how many there are."""
        self._queue_tokens.set_function(tokens)
        self._queue_items.set_function(items)
        self._token_budget.set_function(budget)
        self._asleep.set_function(asleep)
        self._workers.set_function(workers)

    def item_reused(self, source: Literal["cache", "duplicate"], tokens: int) -> None:
        self._tokens["cached" if source == "cache" else source].inc(tokens)

    def tokens_wasted(self, tokens: int) -> None:
        self._tokens["wasted"].inc(tokens)

    def item_failed(self, code: str) -> None:
        self._engine_errors.labels(self._id, code).inc()

    def worker_restarted(self) -> None:
        self._restarts.inc()

    def tokenized(self, seconds: float) -> None:
        self._tokenize_seconds.observe(seconds)

    def answered(self, scores: Sequence[float], codes: Iterable[str]) -> None:
        """The items of one request: their scores, and the codes of those that have none."""
        failed = list(codes)
        self._items.inc(len(scores) + len(failed))
        for score in scores:
            self._scores.observe(score)
        for code in failed:
            self._item_errors.labels(self._id, code).inc()
