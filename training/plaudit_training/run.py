"""A training run from its configuration to a reward model directory.

    <out>/run.toml  metrics.jsonl  quarantine.jsonl  checkpoints/  tensorboard/  model/  report.json  report.html

`run.toml` is the resolved configuration: `plaudit train --config run.toml` is the same run again. `report.json`
is written last: where it is, the run is finished. `report.html` shows how it went, also where it was interrupted.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from plaudit._trees import flatten, toml
from plaudit_model import contract, run_folder
from plaudit_model.interrupt import Interrupted, StopRequest
from plaudit_model.json_lines import JsonLines, write_whole
from plaudit_model.memory import keep_freed_memory
from plaudit_model.run_folder import Diverged, RunExists, held

from . import trackers
from .config import RunConfig
from .finish import REPORT, Finished, finish, lineage
from .page import PAGE, draw
from .prepare import Prepared, check_inputs, prepare
from .report import Display, evaluation_table, print_prepared
from .state import Progress
from .train import Outlets, Task, Trainer

ENTRIES = frozenset({
    "run.toml", "metrics.jsonl", "quarantine.jsonl", "quarantine-eval.jsonl", "checkpoints", "tensorboard", "model",
    REPORT, PAGE, "base", ".lock", ".run.toml.writing", f".{REPORT}.writing", f".{PAGE}.writing",
})  # fmt: skip
OUTPUTS = ("metrics.jsonl", "checkpoints", "tensorboard", "model", REPORT, PAGE)
"""What a run begins anew or replaces: never what was there before its `run.toml`."""


def check_target(model: Path) -> None:
    """Raise RunExists if the directory that a reward model is to replace holds anything else."""
    if (
        model.exists()
        and not (model / contract.FILE_NAME).is_file()
        and not (model.is_dir() and not any(model.iterdir()))
    ):
        raise RunExists(f"{model} is there, is no reward model, and would be replaced: name another --out")


def discard(out: Path) -> None:
    """Delete a run but for its lock, which the caller holds. Raises RunExists if the directory holds anything that
    no run writes."""
    entries = sorted(out.iterdir())
    foreign = [entry.name for entry in entries if entry.name not in ENTRIES]
    if foreign:
        raise RunExists(f"{out} holds {foreign[0]}, which is not of a run: move it, or name another --out")
    for entry in entries:
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()


def train_run(
    config: RunConfig,
    out: Path,
    console: Console,
    *,
    model: Path | None = None,
    dry_run: bool = False,
    fresh: bool = False,
) -> Finished | None:
    """Run to the end, from the newest checkpoint if there is one; `fresh` deletes an earlier run first. The reward
    model goes to `model`, by default `<out>/model`. None if there was nothing to do, or only to look (`dry_run`)."""
    if not fresh and (out / REPORT).exists():
        console.print(f"the run in {out} is finished: {_model_of(out)}", soft_wrap=True)
        return None
    check_target(model or out / "model")
    check_inputs(config)
    keep_freed_memory()
    with StopRequest() as stop:
        stop.patient = False
        if dry_run:
            _look(config, out, console)
            return None
        with held(out):
            if fresh:
                discard(out)
            prepared = prepare(config, out, scratch=out / "base")
            print_prepared(console, prepared)
            return _train(prepared, out, model or out / "model", console, stop)


def _look(config: RunConfig, out: Path, console: Console) -> None:
    """Read, check and show. Takes no lock: nothing in `out` is touched but a list of bad rows, if there are any."""
    with TemporaryDirectory() as scratch:
        print_prepared(console, prepare(config, out, scratch=Path(scratch)))


def _train(prepared: Prepared, out: Path, model: Path, console: Console, stop: StopRequest) -> Finished:
    config, begun = prepared.config, time.monotonic()
    write_whole(out / run_folder.FILE_NAME, toml(config))
    examples = prepared.train.examples, prepared.held_out.examples
    task = Task(prepared.model, *examples, config, prepared.fingerprint, prepared.frozen)
    trainer = Trainer(task, out)
    if trainer.resume():
        console.print(f"resumed at step {trainer.progress.step} of {task.steps}")
    try:
        speed = _loop(trainer, task, out, console, stop)
    except (Interrupted, Diverged) as end:
        console.print(draw(out, prepared, None, {"not finished": end}), soft_wrap=True, markup=False)
        raise
    stopped = _stopped(task, trainer.progress)
    console.print(stopped, soft_wrap=True)
    finished = finish(task, trainer.progress, lineage(task, prepared.base, prepared.data), model)
    if finished.evaluation:
        console.print(evaluation_table(finished.evaluation, "held-out evaluation"))
    report = {
        "model": str(model),
        "stopped": stopped,
        "evaluation": finished.evaluation.to_json() if finished.evaluation else None,
        "progress": asdict(trainer.progress),
        "seconds": time.monotonic() - begun,
        "tokens_per_second": speed,
        "device": str(task.model.device),
        "threads": torch.get_num_threads(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    drawn = draw(out, prepared, finished.evaluation, report | asdict(trainer.progress))
    write_whole(out / REPORT, json.dumps(report, indent=2) + "\n")  # last: where it is, the run is finished
    console.print(f"{drawn}\nreward model: {model}\nserve it: plaudit serve {model}", soft_wrap=True, markup=False)
    return finished


def _stopped(task: Task, progress: Progress) -> str:
    """Why no further step was taken, and whose weights are kept."""
    if progress.step == task.steps:
        return f"all {task.steps:,} steps taken"
    metric = task.config.evaluation.metric
    return (
        f"stopped after step {progress.step} of {task.steps}: {progress.waited} evaluations without a better {metric} "
        f"than at step {progress.best_step}"
    )


def _loop(trainer: Trainer, task: Task, out: Path, console: Console, stop: StopRequest) -> float:
    """The training loop with its outlets open. Returns tokens a second."""
    progress = trainer.progress
    log = JsonLines(out / "metrics.jsonl", progress.metrics_bytes)
    told = trackers.make(task.config.report_to, out, flatten(task.config), progress.step)
    stop.patient = True
    try:
        with Display(console, task.steps, progress.step) as display:
            trainer.run(Outlets(log, told, display, stop))
            return display.tokens_per_second
    finally:
        stop.patient = False
        told.close()
        log.close()


def _model_of(out: Path) -> str:
    return str(json.loads((out / REPORT).read_text(encoding="utf-8"))["model"])
