"""Every instrument, named once. One registry for one server; label values are few and ours, never a client's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from .observer import BatchReport

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)
_SIZES = tuple(2**power for power in range(13))
_TOKENS = tuple(2**power for power in range(4, 18))
_SCORES = (-100, -50, -20, -10, -5, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 5, 10, 20, 50, 100)


_OF_A_MODEL: tuple[tuple[type[Counter] | type[Gauge] | type[Histogram], str, str, dict[str, Any]], ...] = (
    (Counter, "items", "Items answered, with a score or an error", {}),
    (Gauge, "queue_tokens", "Tokens that wait for a worker", {}),
    (Gauge, "queue_items", "Items without an answer", {}),
    (Gauge, "token_budget", "Tokens of a batch: as asked for, or as fits into memory", {}),
    (Gauge, "asleep", "1 while the workers' memory is lent out", {}),
    (Gauge, "workers_ready", "Workers that take batches", {}),
    (Histogram, "batch_items", "Sequences of a batch", {"buckets": _SIZES}),
    (Histogram, "batch_tokens", "Tokens computed in a batch", {"buckets": _TOKENS}),
    (Histogram, "batch_seconds", "Compute time of a batch", {"buckets": _SECONDS}),
    (Histogram, "tokenize_seconds", "Time to tokenise a request's items", {"buckets": _SECONDS}),
    (Histogram, "score", "Scores, untransformed", {"buckets": _SCORES}),
    (Counter, "worker_restarts", "Workers that replaced a lost one", {}),
    (Counter, "late_jit", "Kernels compiled after warm-up", {}),
)
"""The instruments whose one label is the model."""

_TOKEN_KINDS = (
    "Tokens of scored items: computed went through the model, shared is prompts computed once, cached and duplicate "
    "needed nothing, wasted was computed for nobody"
)


class Metrics:
    """The instruments and their registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._answered: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._open = 0
        made: dict[str, Any] = {"registry": self.registry}
        Gauge("plaudit_requests_open", "Requests being answered", **made).set_function(lambda: self._open)
        what = "Requests by route and status; 499 is a client that went away"
        self._requests = Counter("plaudit_requests", what, ["route", "status"], **made)
        self._request_seconds = Histogram(
            "plaudit_request_seconds", "Time from the request's head to the end of its answer", ["route"],
            buckets=_SECONDS, **made,
        )  # fmt: skip
        self._item_errors = Counter("plaudit_item_errors", "Items answered with an error", ["model", "code"], **made)
        what = "Items that the engine answered with an error"
        self._engine_errors = Counter("plaudit_engine_errors", what, ["model", "code"], **made)
        self._tokens = Counter("plaudit_tokens", _TOKEN_KINDS, ["model", "kind"], **made)
        self._of_a_model = {
            name: kind(f"plaudit_{name}", text, ["model"], **made, **options)
            for kind, name, text, options in _OF_A_MODEL
        }

    def of_model(self, id: str) -> ModelMetrics:
        """The instruments of one model: what its engine reports to."""
        return ModelMetrics(self, id)

    def request_begun(self) -> None:
        self._open += 1

    def request_done(self, route: str, status: int, seconds: float) -> None:
        self._open -= 1
        if (route, status) not in self._answered:  # a label is looked up slowly, and there are few
            both = self._requests.labels(route, str(status)), self._request_seconds.labels(route)
            self._answered[route, status] = both
        counter, histogram = self._answered[route, status]
        counter.inc()
        histogram.observe(seconds)

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class ModelMetrics:
    """The instruments of one model. An `EngineObserver`."""

    def __init__(self, metrics: Metrics, id: str) -> None:
        self._id, self._item_errors, self._engine_errors = id, metrics._item_errors, metrics._engine_errors
        kinds = ("computed", "shared", "cached", "duplicate", "wasted")
        self._tokens = {kind: metrics._tokens.labels(id, kind) for kind in kinds}
        self._own: dict[str, Any] = {name: one.labels(id) for name, one in metrics._of_a_model.items()}

    def batch_done(self, report: BatchReport) -> None:
        self._own["batch_items"].observe(report.sequences)
        self._own["batch_tokens"].observe(report.computed_tokens)
        self._own["batch_seconds"].observe(report.seconds)
        self._tokens["computed"].inc(report.computed_tokens)
        self._tokens["shared"].inc(report.shared_tokens)
        self._own["late_jit"].inc(report.late_jit)

    def follow(self, **asked: Callable[[], float]) -> None:
        """What a gauge, by its name, is to ask for when somebody looks."""
        for name, ask in asked.items():
            self._own[name].set_function(ask)

    def item_reused(self, source: Literal["cache", "duplicate"], tokens: int) -> None:
        self._tokens["cached" if source == "cache" else source].inc(tokens)

    def tokens_wasted(self, tokens: int) -> None:
        self._tokens["wasted"].inc(tokens)

    def item_failed(self, code: str) -> None:
        self._engine_errors.labels(self._id, code).inc()

    def worker_restarted(self) -> None:
        self._own["worker_restarts"].inc()

    def tokenized(self, seconds: float) -> None:
        self._own["tokenize_seconds"].observe(seconds)

    def answered(self, scores: Sequence[float], codes: Iterable[str]) -> None:
        """The items of one request: their scores, and the codes of those that have none."""
        failed = list(codes)
        self._own["items"].inc(len(scores) + len(failed))
        for score in scores:
            self._own["score"].observe(score)
        for code in failed:
            self._item_errors.labels(self._id, code).inc()
