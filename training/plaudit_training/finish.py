"""From trained weights to a reward model directory: evaluate, calibrate, save, load again, compare every bit."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from plaudit._trees import plain
from plaudit_model.contract import Calibration, Serving
from plaudit_model.errors import ModelError
from plaudit_model.reward_model import RewardModel

from . import metrics
from .batches import Example, encode_records
from .evaluate import Evaluation, judge, judge_scores, score, statistics
from .metrics import Floats
from .state import Progress
from .train import Task

REPORT = "report.json"
_PROBE = 64


class ReloadMismatch(ModelError):
    """The saved model does not score as the one that was trained."""

    exit_code = 1


@dataclass(frozen=True, eq=False)
class Finished:
    """What came of a run: the model's directory and, if anything was held out, its evaluation."""

    model: Path
    evaluation: Evaluation | None


def finish(task: Task, progress: Progress, lineage: Mapping[str, Any], directory: Path) -> Finished:
    """Write the reward model and prove that it is the one that was trained.

    Statistics and temperature are those of the held-out responses. Raises ReloadMismatch if the directory,
    loaded anew and fed from the records' text, gives a single other bit.
    """
    task.model.freeze()  # as it will be served
    probe = task.held_out or task.train[:_PROBE]
    scores = score(task.model, probe, token_budget=task.config.optim.token_budget)
    evaluation = _evaluate(task, scores) if task.held_out else None
    contract = replace(
        task.model.contract,
        label=task.config.label,
        serving=Serving(),
        statistics=statistics(scores) if task.held_out else None,
        calibration=Calibration(evaluation.temperature) if evaluation and evaluation.fitted else None,
        evaluation=evaluation.to_json() if evaluation else {},
        lineage={**lineage, "steps": progress.step, "skipped_steps": progress.skipped, "tokens": progress.tokens},
    )
    task.model.save(directory, contract, as_adapter=task.config.lora.save == "adapter")
    _require_same(task, directory, probe, scores)
    return Finished(directory, evaluation)


def lineage(task: Task, base: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Where the model comes from: everything that is needed to make it again. `working_directory_commit` is that of
    the repository the run was started in, the user's own: plaudit itself is under `versions`."""
    return {
        "base": dict(base),
        "data": dict(data),
        "config": plain(task.config),
        "working_directory_commit": _working_directory_commit(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what computes."""
    names = ("plaudit", "torch", "transformers", "tokenizers", "numpy")
    return {name: metadata.version(name) for name in names} | {"python": platform.python_version()}


def _evaluate(task: Task, scores: Sequence[Floats]) -> Evaluation:
    """At the temperature that fits these very comparisons, where there is one."""
    settings = task.config.evaluation
    judged = judge(task.held_out, scores, settings.cluster)
    fitted = metrics.fit_temperature(judged.delta, judged.share)
    evaluation = judge_scores(
        task.held_out,
        scores,
        cluster=settings.cluster,
        bootstrap=settings.bootstrap,
        seed=task.config.seed,
        temperature=fitted or 1.0,
    )
    return replace(evaluation, fitted=fitted is not None)


def _require_same(task: Task, directory: Path, probe: Sequence[Example], scores: Sequence[Floats]) -> None:
    reloaded = RewardModel.load(directory, device=task.model.device)
    again = encode_records([example.record for example in probe], reloaded.encoder)
    theirs = score(reloaded, again.examples, token_budget=task.config.optim.token_budget)
    mine, found = np.concatenate(list(scores)), np.concatenate(theirs)
    if not np.array_equal(mine, found):
        worst = float(np.abs(mine - found).max()) if mine.shape == found.shape else float("nan")
        raise ReloadMismatch(
            f"{directory}, loaded again, scores otherwise than what was trained (by up to {worst:.2g}): do not use it"
        )


def _working_directory_commit() -> str | None:
    """The commit of the repository that the run was started in, if it was."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
