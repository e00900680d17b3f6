"""Evaluate a reward model on preference data: score every response once, then count.

Scores come from the same packed forward that serves; what is counted is in `metrics`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from plaudit_model.contract import Statistics
from plaudit_model.errors import ItemError
from plaudit_model.reward_model import RewardModel

from . import metrics
from .batches import Example, oriented
from .metrics import Estimate, Floats, Judged

Cluster = Literal["conversation", "response"]
Tick = Callable[[int], None]
"""Told how many records were just scored. May raise, to interrupt."""

_RECORDS_AT_ONCE = 64


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """Metrics by name, how many comparisons there were and how many of them had a winner, the temperature that
    the calibration metrics used (`fitted`: on these very comparisons), and the scores of every record."""

    metrics: dict[str, Estimate]
    comparisons: int
    decided: int
    temperature: float
    cluster: Cluster
    scores: tuple[Floats, ...]
    fitted: bool = False

    def event(self, step: int) -> dict[str, Any]:
        """A line of metrics.jsonl: values, and the intervals of those two that people follow."""
        followed = {name: self.metrics[name] for name in ("nll", "accuracy")}
        ends = {f"{name}_{end}": getattr(found, end) for name, found in followed.items() for end in ("low", "high")}
        return {"event": "evaluation", "step": step} | {name: one.value for name, one in self.metrics.items()} | ends

    def to_json(self) -> dict[str, Any]:
        """One object: each metric as {value, low, high, n}, and what they were computed over."""
        over = {
            "comparisons": self.comparisons,
            "decided": self.decided,
            "records": len(self.scores),
            "responses": sum(map(len, self.scores)),
        }
        estimates = {name: dataclasses.asdict(estimate) for name, estimate in self.metrics.items()}
        calibration = {"temperature": self.temperature, "temperature_fitted_here": self.fitted}
        return {**estimates, **over, **calibration, "cluster": self.cluster}


def evaluate(
    model: RewardModel,
    examples: Sequence[Example],
    *,
    token_budget: int,
    cluster: Cluster = "conversation",
    bootstrap: int = 1000,
    seed: int = 0,
    temperature: float = 1.0,
    tick: Tick = lambda _: None,
) -> Evaluation:
    """Score and judge. Raises ItemError if a score is not finite: no error becomes a number."""
    scores = score(model, examples, token_budget=token_budget, tick=tick)
    return judge_scores(examples, scores, cluster=cluster, bootstrap=bootstrap, seed=seed, temperature=temperature)


def judge_scores(
    examples: Sequence[Example],
    scores: Sequence[Floats],
    *,
    cluster: Cluster,
    bootstrap: int,
    seed: int,
    temperature: float,
) -> Evaluation:
    """The evaluation of responses that are already scored."""
    judged = judge(examples, scores, cluster)
    estimates = metrics.evaluate(judged, temperature=temperature, bootstrap=bootstrap, seed=seed)
    decided = int(judged.decided.sum())
    return Evaluation(estimates, len(judged.share), decided, temperature, cluster, tuple(scores))


def score(
    model: RewardModel, examples: Sequence[Example], *, token_budget: int, tick: Tick = lambda _: None
) -> list[Floats]:
    """The score of each response, by record. Deterministic, and in exact mode a function of the item alone."""
    model.eval_mode()
    scores: list[Floats] = []
    for some in _chunks(examples):
        items = [item for example in some for item in example.items]
        values = iter(model.score_encoded(items, token_budget=token_budget)[:, 0].astype(np.float64))
        for example in some:
            scores.append(np.array([next(values) for _ in example.items]))
            _require_finite(example, scores[-1])
        tick(len(some))
    return scores


def judge(examples: Sequence[Example], scores: Sequence[Floats], cluster: Cluster) -> Judged:
    """The comparisons of the examples as arrays. Responses are clusters by their text, conversations by
    `Record.conversation`."""
    rows = [row for example, values in zip(examples, scores, strict=True) for row in _rows(example, values, cluster)]
    names = {name: i for i, name in enumerate(dict.fromkeys(name for row in rows for name in row[-1]))}
    kinds = (np.float64, np.float64, np.float64, np.bool_, np.int64, np.int64)
    columns: list[Any] = [np.array([row[i] for row in rows], dtype=kind) for i, kind in enumerate(kinds)]
    clusters = np.array([[names[name] for name in row[-1]] for row in rows], dtype=np.int64).reshape(len(rows), -1)
    columns.append(clusters)
    return Judged(*columns)


def statistics(scores: Sequence[Floats]) -> Statistics | None:
    """Mean and standard deviation of all scores; None where there is no spread to speak of."""
    everything = np.concatenate(list(scores)) if scores else np.zeros(0)
    if len(everything) < 2 or not everything.std() > 0:
        return None
    return Statistics(float(everything.mean()), float(everything.std()), len(everything))


def _rows(example: Example, values: Floats, cluster: Cluster) -> Iterator[tuple[Any, ...]]:
    record, lengths = example.record, [len(item.ids) - item.prompt_tokens for item in example.items]
    conversation = record.conversation() if cluster == "conversation" else ""
    for comparison in record.comparisons:
        chosen, rejected, share = oriented(comparison)
        names = (conversation,) if conversation else (record.responses[chosen], record.responses[rejected])
        told = share, comparison.outcome != "tie", lengths[chosen], lengths[rejected], names
        yield values[chosen], values[rejected], *told


def _require_finite(example: Example, values: Floats) -> None:
    if not np.isfinite(values).all():
        where = f"{example.record.origin.file}, line {example.record.origin.line}"
        raise ItemError("non_finite_score", f"the model gives a score that is not finite for the record in {where}")


def _chunks(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), _RECORDS_AT_ONCE):
        yield examples[start : start + _RECORDS_AT_ONCE]
