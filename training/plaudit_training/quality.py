"""`plaudit eval`: a saved reward model on preference files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from plaudit_model.reward_model import RewardModel

from . import sources
from .batches import Encoding, encode_records
from .errors import DataError
from .evaluate import Cluster, Evaluation, evaluate
from .report import evaluation_table
from .sources import ReadOptions, ReadReport


@dataclass(frozen=True, eq=False)
class Quality:
    """An evaluation, what it is of, and what became of the rows."""

    model: str
    revision: str
    numerics: str
    evaluation: Evaluation
    encoding: Encoding
    report: ReadReport

    def to_json(self) -> dict[str, Any]:
        """One object: the metrics at the top, what they are of below them."""
        return self.evaluation.to_json() | {
            "model": self.model,
            "revision": self.revision,
            "numerics": self.numerics,
            "truncated": self.encoding.truncated,
            "unusable": self.encoding.reasons(),
            "data": self.report.to_json(),
        }


def measure(
    model: str,
    data: Sequence[str],
    options: ReadOptions,
    console: Console,
    *,
    device: str,
    token_budget: int,
    cluster: Cluster,
    bootstrap: int,
    seed: int,
) -> Quality:
    """Score every response and judge every comparison, at the temperature of the model's contract, 1 without.

    Raises DataError, ModelError, and ItemError for a score that is not finite.
    """
    records, report = sources.load(data, options)
    loaded = RewardModel.load(model, device=device)
    encoding = encode_records(records, loaded.encoder)
    if not encoding.examples:
        raise DataError(f"no record can be evaluated: {encoding.complaint()}")
    calibration = loaded.contract.calibration
    columns = TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("scoring", total=len(encoding.examples))
        evaluation = evaluate(
            loaded,
            encoding.examples,
            token_budget=token_budget,
            cluster=cluster,
            bootstrap=bootstrap,
            seed=seed,
            temperature=calibration.temperature if calibration else 1.0,
            tick=lambda count: progress.advance(task, count),
        )
    return Quality(model, loaded.contract.revision(), loaded.numerics, evaluation, encoding, report)


def print_quality(console: Console, quality: Quality) -> None:
    """The same for people."""
    console.print(quality.report.conservation())
    for line in (*quality.report.sentences(), quality.encoding.complaint()):
        if line:
            console.print(f"  {line}")
    console.print(evaluation_table(quality.evaluation, f"{quality.model} ({quality.revision})"))
