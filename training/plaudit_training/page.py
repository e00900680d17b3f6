"""`report.html`: how a run went and what its model is worth, as one page that needs nothing but itself.

The curves are those of metrics.jsonl, which is whole also where a run was resumed.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from plaudit._trees import flatten
from plaudit_model.charts import Series, chart, page, table
from plaudit_model.json_lines import write_whole

from .batches import Example
from .evaluate import Evaluation, judge, judge_scores
from .finish import versions
from .metrics import Judged, reliability, wilson
from .prepare import Prepared
from .quality import Quality
from .report import caption, estimate_rows, plain, smooth

PAGE = "report.html"
_BINS, _STRETCHES, _MOST_SOURCES = 30, 8, 20
_SIDES = ("train", "held_out")
_TOLD = (
    "not finished", "stopped", "model", "device", "threads", "tokens_per_second", "finished_at", "step", "skipped",
    "tokens",
)  # fmt: skip


def draw(out: Path, *drawn: Any) -> str:
    """`write_run`, and what to say of it. How a run ended, and its model, are worth more than that it can be drawn."""
    try:
        write_run(out, *drawn)
        return f"how it went: {out / PAGE}"
    except (ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
        return f"warning: {out / PAGE} is not drawn: {type(error).__name__}: {error}"


def write_run(out: Path, prepared: Prepared, evaluation: Evaluation | None, facts: Mapping[str, Any]) -> None:
    """Write `<out>/report.html` of a run that has come to an end, be it a good one: then with its evaluation, if
    anything is held out. `facts` are of its report, of which some are told."""
    config, settings, held_out = prepared.config, prepared.config.evaluation, prepared.held_out.examples
    sizes = {f"{side} comparisons": sum(e.pairs for e in getattr(prepared, side).examples) for side in _SIDES}
    parts = [_facts({name: value for name, value in facts.items() if name in _TOLD} | sizes)]
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if evaluation:
        again = partial(judge_scores, cluster=settings.cluster, bootstrap=settings.bootstrap, seed=config.seed)
        parts += _evaluation(held_out, evaluation, again)
        if not settings.patience and not any(event["event"] == "evaluation" for event in events[-1:]):
            events.append(again(held_out, evaluation.scores, temperature=1.0).event(facts["step"]))  # as the others are
    parts += ["<h2>training</h2>", _abreast(_curves(events)), "<h2>data</h2>"]
    for side, report in prepared.reports.items():
        parts += _sentences(f"{side}: {report.conservation()}", *report.sentences())
    findings = (*prepared.preflight.problems, *prepared.preflight.notes)
    parts.append(_closed("preflight", table((), ((found.code, found.message) for found in findings))))
    parts.append(_closed("configuration and versions", _facts(flatten(config) | versions())))
    write_whole(out / PAGE, page(f"plaudit train {' '.join(config.data.train)}", *parts))


def of_quality(quality: Quality, *, bootstrap: int, seed: int) -> str:
    """What `plaudit eval` found, as a page."""
    facts = {"model": quality.model, "revision": quality.revision, "numerics": quality.numerics}
    said = quality.report.conservation(), *quality.report.sentences(), quality.encoding.complaint()
    again = partial(judge_scores, cluster=quality.evaluation.cluster, bootstrap=bootstrap, seed=seed)
    parts = _facts(facts), *_evaluation(quality.encoding.examples, quality.evaluation, again)
    return page(f"plaudit eval {quality.model}", *parts, "<h2>data</h2>", *_sentences(*said))


def _curves(events: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What changed from step to step. A skipped step is a gap."""
    steps, tests = ([event for event in events if event["event"] == kind] for kind in ("step", "evaluation"))
    at, tested = ([event["step"] for event in some] for some in (steps, tests))

    def each(name: str) -> list[Series]:
        values = [event[name] for event in steps]
        raw = Series("each step", at, values, style="faint", colour=0)
        return [raw, Series("smoothed", at, list(_smoothed(values)), colour=0)]

    def held_out(name: str) -> Series:
        value, low, high = ([event.get(f"{name}{end}") for event in tests] for end in ("", "_low", "_high"))
        return Series("held out, 95% interval", tested, value, low, high, colour=1)

    yield chart(each("loss"), "Training loss", "step", "nats")
    yield chart([held_out("nll")], "Held-out loss, at temperature 1", "step", "nats")
    accuracy = Series("training, smoothed", at, list(_smoothed([event["accuracy"] for event in steps])), colour=0)
    yield chart([accuracy, held_out("accuracy")], "Accuracy", "step", "chosen above rejected")
    yield chart([Series("", at, [event["learning_rate"] for event in steps])], "Learning rate", "step")
    yield chart(each("grad_norm"), "Gradient norm before clipping", "step")


def _smoothed(values: Sequence[float | None]) -> Iterator[float]:
    """Over a fiftieth of the run, or ten steps."""
    keep, mean = 1 - 1 / max(10, len(values) / 50), float("nan")
    for value in values:
        mean = smooth(mean, value, keep)
        yield mean


def _evaluation(examples: Sequence[Example], found: Evaluation, again: Callable[..., Evaluation]) -> Iterator[str]:
    """`again` judges scores as they were judged for `found`."""
    judged = judge(examples, found.scores, found.cluster)
    confidence_B, frequency_B, counts_B = reliability(judged, found.temperature)
    yield "<h2>held-out evaluation</h2>"
    yield table(("metric", "value", "95% interval", "comparisons"), estimate_rows(found.metrics))
    yield f"<p>{html.escape(caption(found))}. Bars in the charts are Wilson's 95% intervals of comparisons alone.</p>"
    yield _abreast((_reliability(confidence_B, frequency_B, counts_B), _margins(judged), _lengths(judged)))
    bins = zip(confidence_B, frequency_B, counts_B, strict=True)
    shown = ((f"{confidence:.4f}", f"{frequency:.4f}", f"{count:,}") for confidence, frequency, count in bins)
    yield _closed("the bins of ece", table(("predicted", "observed", "comparisons"), shown))
    yield "<h2>by source</h2>"
    yield table(("source", "accuracy", "95% interval", "comparisons"), _sources(examples, found, again))


def _reliability(confidence_B: Any, frequency_B: Any, counts_B: Any) -> str:
    """Naeini et al. 2015; the bins are those of the ece."""
    calibrated = Series("calibrated", [0.5, 1], [0.5, 1], style="dashed", colour=1)
    observed = _rates("observed", confidence_B, frequency_B, counts_B)
    labels = "predicted probability that the higher score wins", "how often it did"
    return chart([calibrated, observed], "Reliability", *labels)


def _margins(judged: Judged) -> str:
    margins = judged.delta[judged.decided]
    edges = np.linspace(margins.min(initial=0), margins.max(initial=0), _BINS + 1)
    counts, _ = np.histogram(margins, edges)
    outline, ends = np.repeat(counts, 2).tolist(), np.repeat(edges, 2)[1:-1].tolist()
    zero = Series("", [0, 0], [0, int(counts.max())], style="dashed", colour=1)
    area = Series("", ends, outline, [0] * len(ends), outline, colour=0)
    return chart([area, zero], "Margins", "score of chosen - rejected", "comparisons")


def _lengths(judged: Judged) -> str:
    """Accuracy where the chosen response is the longer or the shorter by so much: flat without a bias."""
    longer = (judged.chosen_tokens - judged.rejected_tokens)[judged.decided]
    right, order = judged.delta[judged.decided] > 0, np.argsort(longer, kind="stable")
    bins = [some for some in np.array_split(order, _STRETCHES) if len(some)]
    means, rates = ([float(values[some].mean()) for some in bins] for values in (longer, right))
    accuracy = _rates("accuracy", means, rates, [len(some) for some in bins])
    ends = [*means[:1], *means[1:][-1:]]
    chance = Series("chance", ends, [0.5] * len(ends), style="dashed", colour=1)
    return chart([chance, accuracy], "Accuracy by length", "tokens by which the chosen response is longer")


def _rates(name: str, x: Sequence[float], rates: Sequence[float], counts: Sequence[int]) -> Series:
    ends = [wilson(rate * n, n) for rate, n in zip(rates, counts, strict=True)]
    low, high = ([end[side] for end in ends] for side in (0, 1))
    return Series(name, x, rates, low, high, style="points", colour=0)


def _sources(
    examples: Sequence[Example], found: Evaluation, again: Callable[..., Evaluation]
) -> Iterator[Sequence[str]]:
    """Accuracy by file, those with the most records first."""
    files: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        files.setdefault(example.record.origin.file, []).append(place)
    for file, places in sorted(files.items(), key=lambda item: -len(item[1]))[:_MOST_SOURCES]:
        some = [examples[place] for place in places], [found.scores[place] for place in places]
        own = again(*some, temperature=found.temperature)
        yield file, *next(row[1:] for row in estimate_rows(own.metrics) if row[0] == "accuracy")
    if len(files) > _MOST_SOURCES:
        yield f"and {len(files) - _MOST_SOURCES:,} more", "", "", ""


def _facts(facts: Mapping[str, Any]) -> str:
    shown = ((name, f"{value:.5g}" if isinstance(value, float) else plain(value)) for name, value in facts.items())
    return table((), shown)


def _sentences(*sentences: str) -> list[str]:
    return [f"<p>{html.escape(sentence)}</p>" for sentence in sentences if sentence]


def _abreast(charts: Iterable[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>'


def _closed(title: str, inside: str) -> str:
    return f"<details><summary>{title}</summary>{inside}</details>"
