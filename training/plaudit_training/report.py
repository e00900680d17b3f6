"""What a run says to people: tables and a progress line."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from plaudit._trees import flatten
from plaudit_model.progress import ProgressLine

from .batches import steps_per_epoch
from .config import HELP, RunConfig
from .evaluate import Evaluation
from .metrics import Estimate
from .preflight import render

if TYPE_CHECKING:
    from .prepare import Prepared

LOG = logging.getLogger("plaudit.training")

_SMOOTHING = 0.9
FEW = 100
"""Comparisons: the interval of an accuracy over fewer is wider than 19 points at 0.5, and than 14 at 0.85."""


class Display(ProgressLine):
    """Loss, accuracy and tokens a second, step by step."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        super().__init__(console, total, done)
        self._loss = self._accuracy = float("nan")
        self._tokens = 0

    @property
    def tokens_per_second(self) -> float:
        """Since this process began to train; every response counts with its prompt, as if nothing were shared."""
        return self._tokens / max(time.monotonic() - self._started, 1e-9)

    def step(self, step: int, event: Mapping[str, Any]) -> None:
        """Show the numbers of a step that is done."""
        self._tokens += event["tokens"]
        self._loss = smooth(self._loss, event["loss"])
        self._accuracy = smooth(self._accuracy, event["accuracy"])
        speed = f"{self.tokens_per_second:,.0f} tok/s"
        self.show(step, f"loss {self._loss:.3f}  acc {self._accuracy:.3f}  {speed}")

    def evaluation(self, step: int, event: Mapping[str, Any]) -> None:
        """A line above the bar with the numbers of an evaluation."""
        shown = {name: event[name] for name in ("accuracy", "nll", "margin") if event[name] is not None}
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        self._progress.console.print(f"step {step}/{self._total}  evaluation: {numbers}")


def print_prepared(console: Console, prepared: Prepared) -> None:
    """All that is decided before the first step: configuration, data, preflight, plan."""
    console.print(config_table(prepared.config, prepared.reasons))
    for side, report in prepared.reports.items():
        console.print(f"\n{side}: {report.conservation()}")
        for sentence in report.sentences():
            console.print(f"  {sentence}")
    console.print("\npreflight")
    console.print(Padding(render(prepared.preflight), (0, 2)))
    for line in _plan(prepared):
        console.print(line)


def config_table(config: RunConfig, reasons: Mapping[str, str]) -> Table:
    """The resolved configuration where it is not the default: each value with the reason it was chosen for, or what it
    does."""
    defaults = flatten(RunConfig())
    told = {path: value for path, value in flatten(config).items() if path in reasons or value != defaults[path]}
    rows = ((path, plain(value), reasons.get(path) or HELP[path]) for path, value in told.items())
    others = f"{len(defaults) - len(told)} others have their defaults; all are in the run's run.toml"
    return _table("configuration", ("option", "value", "why"), rows, others)


def evaluation_table(evaluation: Evaluation, title: str) -> Table:
    """Metrics with their intervals, and over how many comparisons each was computed."""
    columns = ("metric", "value", "95% interval", "comparisons")
    return _table(title, columns, estimate_rows(evaluation.metrics), caption(evaluation), numbers=True)


def _table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str, *, numbers: bool = False
) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, caption=caption, caption_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and place else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def estimate_rows(metrics: Mapping[str, Estimate]) -> list[tuple[str, str, str, str]]:
    """Name, value, 95% interval and comparisons of each metric, as people read them."""
    return [(name, _number(found.value), _interval(found), f"{found.n:,}") for name, found in metrics.items()]


def caption(evaluation: Evaluation) -> str:
    """What the metrics were computed over, and how."""
    return (
        f"{evaluation.comparisons:,} comparisons, {evaluation.decided:,} with a winner; intervals resample by "
        f"{evaluation.cluster}; nll, brier and ece at temperature {evaluation.temperature:.3g}"
    )


def _plan(prepared: Prepared) -> list[str]:
    config, examples = prepared.config, prepared.train.examples
    assert config.optim.batch_pairs is not None, "resolve the configuration first"
    steps = steps_per_epoch(examples, config.optim.batch_pairs) * config.optim.num_train_epochs
    pairs = sum(example.pairs for example in examples)
    tokens = sum(example.tokens for example in examples)
    unusable = prepared.train.complaint()
    total, trained = prepared.model.parameters, prepared.model.trained_parameters
    share = "" if trained == total else f" ({trained:,} of them trained: {trained / total:.2%})"
    held = sum(example.pairs for example in prepared.held_out.examples)
    more = "name more --eval files" if config.data.eval else f"raise --eval-share, {config.data.eval_share:g} now"
    return [
        f"\nbase: {config.model.base}, {total:,} parameters{share}, on {prepared.model.device}; "
        f"{prepared.model.path_reason}",
        f"plan: {steps:,} steps of about {config.optim.batch_pairs} comparisons; {len(examples):,} records, {pairs:,} "
        f"comparisons and {tokens:,} tokens an epoch; {len(prepared.held_out.examples):,} records held out",
        *([f"left out: {unusable}"] if unusable else []),
        *([] if held else ["nothing is held out: no evaluation, statistics or calibration"]),
        *([f"warning: {held} comparisons held out say little about quality; {more}"] if 0 < held < FEW else []),
    ]


def plain(value: Any) -> str:
    """A value of the configuration or a report, for people."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _number(value: float | None) -> str:
    return "not computable" if value is None else f"{value:.4f}"


def _interval(estimate: Estimate) -> str:
    return "" if estimate.low is None else f"{estimate.low:.4f} .. {estimate.high:.4f}"


def smooth(mean: float, value: float | None, keep: float = _SMOOTHING) -> float:
    """Exponential moving average that begins with its first value."""
    if value is None:
        return mean
    return value if mean != mean else keep * mean + (1 - keep) * value
