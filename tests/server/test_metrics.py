"""Metrics are what the engine and the edge report, with few labels, all of them ours."""

from prometheus_client.parser import text_string_to_metric_families

from plaudit_server.engine import EngineObserver
from plaudit_server.metrics import Metrics, ModelMetrics
from plaudit_server.observer import BatchReport


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset(labels.items())]


def test_a_models_instruments_are_an_engine_observer():
    observer: EngineObserver = Metrics().of_model("m")  # mypy holds the protocol; this holds that it is used
    assert isinstance(observer, ModelMetrics)


def test_what_the_engine_reports_is_counted():
    metrics = Metrics()
    model = metrics.of_model("m")
    model.batch_done(BatchReport(sequences=3, computed_tokens=40, shared_tokens=20, seconds=0.02, late_jit=2))
    numbers = {"queue_tokens": 500, "queue_items": 7, "token_budget": 2048, "asleep": True, "workers_ready": 2}
    model.follow(**{name: lambda number=number: number for name, number in numbers.items()})
    model.item_reused("cache", 11)
    model.item_reused("duplicate", 12)
    model.tokens_wasted(13)
    model.item_failed("deadline_exceeded")
    model.worker_restarted()
    kinds = ("computed", "shared", "cached", "duplicate", "wasted")
    tokens = {kind: value(metrics, "plaudit_tokens_total", model="m", kind=kind) for kind in kinds}
    assert tokens == {"computed": 40, "shared": 20, "cached": 11, "duplicate": 12, "wasted": 13}
    assert value(metrics, "plaudit_queue_tokens", model="m") == 500
    assert value(metrics, "plaudit_queue_items", model="m") == 7
    assert value(metrics, "plaudit_token_budget", model="m") == 2048
    assert value(metrics, "plaudit_asleep", model="m") == 1
    assert value(metrics, "plaudit_workers_ready", model="m") == 2
    assert value(metrics, "plaudit_batch_items_sum", model="m") == 3
    assert value(metrics, "plaudit_engine_errors_total", model="m", code="deadline_exceeded") == 1
    assert value(metrics, "plaudit_worker_restarts_total", model="m") == 1
    assert value(metrics, "plaudit_late_jit_total", model="m") == 2


def test_what_the_edge_answers_is_counted():
    metrics = Metrics()
    model = metrics.of_model("m")
    model.answered([-3.5, 0.25, 400.0], ["too_long", "too_long"])
    model.tokenized(0.004)
    metrics.request_begun()
    metrics.request_begun()
    metrics.request_done("/score", 200, 0.01)
    assert value(metrics, "plaudit_items_total", model="m") == 5
    assert value(metrics, "plaudit_item_errors_total", model="m", code="too_long") == 2
    assert value(metrics, "plaudit_score_count", model="m") == 3
    assert value(metrics, "plaudit_score_bucket", model="m", le="-3.0") == 1
    assert value(metrics, "plaudit_score_bucket", model="m", le="100.0") == 2
    assert value(metrics, "plaudit_tokenize_seconds_count", model="m") == 1
    assert value(metrics, "plaudit_requests_open") == 1
    assert value(metrics, "plaudit_requests_total", route="/score", status="200") == 1


def test_two_servers_in_one_process_count_apart():
    one, other = Metrics(), Metrics()
    one.request_begun()
    assert value(one, "plaudit_requests_open") == 1 and value(other, "plaudit_requests_open") == 0


def test_every_instrument_is_named_once_documented_and_ours():
    families = [family for family in Metrics().registry.collect() if not family.name.endswith("_created")]
    names = [family.name for family in families]
    assert len(names) == len(set(names)) >= 14
    assert all(name.startswith("plaudit_") for name in names)
    assert all(family.documentation for family in families)
