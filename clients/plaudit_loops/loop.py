"""The loop that all three verbs share, and the directory it leaves.

    <out>/run.toml  metrics.jsonl  samples.jsonl  checkpoints/  tensorboard/  report.html  policy/  report.json

A `Stage` takes steps and knows its state; the loop saves it, puts it back, reports, and stops when asked. A checkpoint
holds the state between two steps, with what is done of the step after them if that was interrupted, and since all
randomness is a function of (seed, step, sample), a killed and resumed run computes the same bits.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from plaudit import PlauditError
from plaudit import _trees as trees
from plaudit_model import checkpoint
from plaudit_model.checkpoint import Saver, Snapshot, Tensors
from plaudit_model.errors import CheckpointError
from plaudit_model.interrupt import Interrupted, StopRequest
from plaudit_model.json_lines import JsonLines, write_whole
from plaudit_model.memory import keep_freed_memory
from plaudit_model.optimiser import load_moments, moments, set_rate
from plaudit_model.progress import Trackers
from plaudit_model.run_folder import FILE_NAME, Diverged, check_own, held

from . import page
from .config import Config
from .errors import LoopError
from .optim import Trainable, lr_scale
from .policy import Policy
from .report import Display, check_trackers, trackers
from .world import World

LOG = logging.getLogger("plaudit.loops")
REPORT = "report.json"
OUTPUTS = ("metrics.jsonl", "samples.jsonl", "checkpoints", "tensorboard", "policy", REPORT, page.PAGE)
"""What a run begins anew, goes on with or replaces: never what was there before its `run.toml`."""


@dataclass(frozen=True)
class Done:
    """What a step has to say: numbers by name, and rows for samples.jsonl."""

    values: Mapping[str, float]
    samples: tuple[Mapping[str, Any], ...] = ()


class Stage(Protocol):
    """What is trained, one step at a time. `identity` is what must be the same for a checkpoint to be its own."""

    policy: Policy
    trainable: Trainable
    total: int
    identity: Mapping[str, Any]
    stopped: str
    """Why no further step is to be taken, if so."""

    def take(self, step: int, stop: StopRequest) -> Done:
        """Take step 0..total-1. Where it raises Interrupted, PlauditError or LoopError, `state` has what is done of it:
        taken again, also after `put_back`, it goes on there."""

    def state(self) -> tuple[Mapping[str, Any], Mapping[str, Tensors]]:
        """What else a checkpoint must hold: a JSON object, and tensors by file."""

    def put_back(self, state: Mapping[str, Any], tensors: Mapping[str, Tensors]) -> None:
        """Make it as it was."""


@dataclass(frozen=True)
class Place:
    """Where a run is, and how it is shown."""

    out: Path
    console: Console
    world: World


@contextmanager
def opened(out: Path, console: Console, device: str) -> Iterator[Place]:
    """The directory of a run, held. Raises RunExists if another process or something else is in it, NotWritten if it
    cannot be written."""
    keep_freed_memory()
    world = World(device)
    try:
        with held(out, lock=world.is_main):
            if world.is_main:
                check_own(out, OUTPUTS)
            yield Place(out, console if world.is_main else Console(quiet=True), world)
    finally:
        world.close()


def finished(out: Path) -> bool:
    """Whether there is a run in `out` that has come to its end."""
    return (out / FILE_NAME).exists() and (out / REPORT).exists()


def run(stage: Stage, config: Config, place: Place) -> None:
    """From the newest checkpoint, if there is one, to the end: the policy is then in `<out>/policy`."""
    check_trackers(config.run.report_to)
    if place.world.is_main:
        write_whole(place.out / FILE_NAME, trees.toml(config))
    loop = _Loop(stage, config, place)
    loop.resume()
    with StopRequest() as stop:
        last = loop.run(stop)
    if place.world.is_main:
        stage.policy.save(place.out / "policy")
        report = {
            "policy": str(place.out / "policy"),
            "steps": loop.step,
            "stopped": stage.stopped or "all steps taken",
            "last": {name: value for name, value in last.items() if math.isfinite(value)},
        }
        write_whole(place.out / REPORT, json.dumps(report, indent=1) + "\n")
    stopped = f"stopped after step {loop.step} of {stage.total}: {stage.stopped}\n" if stage.stopped else ""
    place.console.print(f"{stopped}policy: {place.out / 'policy'}\nreport: {place.out / page.PAGE}", soft_wrap=True)


class _Loop:
    """One run. Owns the step, the files and the checkpoints."""

    def __init__(self, stage: Stage, config: Config, place: Place) -> None:
        self._stage, self._config, self._place = stage, config, place
        self._root = place.out / "checkpoints"
        self._saver = Saver(self._root, every=config.run.checkpoint_every, keep=config.run.keep)
        self._positions = [0, 0]
        self._last: Mapping[str, float] = {}
        self._kept: Mapping[str, Any] = {}
        self.step = 0

    def resume(self) -> None:
        """Take up the newest checkpoint that is whole. Raises CheckpointError if it is of another run."""
        if (snapshot := checkpoint.newest(self._root)) is None:
            return
        state, trainable = snapshot.state, self._stage.trainable
        self._check_identity(snapshot.step, state["identity"])
        if state["threads"] != torch.get_num_threads():
            LOG.warning("the run began with %d threads: the last bits may differ with now", state["threads"])
        checkpoint.load_tensors(dict(trainable.named()), snapshot.tensors["weights"])
        load_moments(trainable.named(), trainable.optimizer, snapshot.tensors["optimizer"])
        trainable.skipped = state["skipped"]
        self._stage.put_back(state["stage"], snapshot.tensors)
        self.step, self._positions, self._last = snapshot.step, state["positions"], state["last"]
        self._stage.stopped, self._saver.saved_at = state["stopped"], snapshot.step
        self._place.console.print(f"resumed at step {self.step} of {self._stage.total}")

    def _check_identity(self, step: int, known: Mapping[str, Any]) -> None:
        for name, mine in self._stage.identity.items():
            before = known.get(name, {})
            if mine and not before:  # a run of an older version
                LOG.warning("step %d does not say with which %s it was computed: it is taken for this one", step, name)
            elif before != mine and name == "policy":
                raise CheckpointError(f"{self._changed(before, mine)}; bring that back, or use another --out")
            elif before != mine:
                raise CheckpointError(f"step {step} was computed with another {name}; use another --out")

    def _changed(self, before: Mapping[str, str | None], now: Mapping[str, str | None]) -> str:
        """What is no longer as it was where the policy lies."""
        name = next(name for name in sorted({*before, *now}) if before.get(name) != now.get(name))
        was, has = (f"sha256 {files[name]}" if files.get(name) else "not there" for files in (before, now))
        return f"{name} in {self._config.model.policy} was {was} when the run began and now is {has}"

    def run(self, stop: StopRequest) -> Mapping[str, float]:
        """Take the steps that are left; the numbers of the last."""
        self._kept = self._stage.state()[0]
        main = self._place.world.is_main
        out = self._place.out if main else Path(os.devnull)
        both = zip(("metrics.jsonl", "samples.jsonl"), self._positions, strict=True)
        files = [JsonLines(out / name, at) for name, at in both] if main else []
        names = self._config.run.report_to if main else ()
        told = trackers(names, out, trees.flatten(self._config), self.step)
        try:
            with Display(self._place.console, self._stage.total, self.step) as display:
                while self.step < self._stage.total and not self._stage.stopped:
                    if self._place.world.any(self._saver.due(self.step)):
                        self._save(files)
                    self._take(stop, files, told, display)
            if self._saver.saved_at != self.step:
                self._save(files)
        finally:
            told.close()
            for file in files:
                file.close()
        return self._last

    def _take(self, stop: StopRequest, files: list[JsonLines], told: Trackers, display: Display) -> None:
        settings = self._config.optim
        scale = lr_scale(self.step, self._stage.total, settings.warmup_ratio, settings.min_lr_ratio)
        rate = set_rate(self._stage.trainable.optimizer, scale)
        try:
            if received := max(self._place.world.gather([stop.received])):  # all stop, or none: a step takes them all
                raise Interrupted(received)
            done = self._stage.take(self.step, stop)
        except Diverged:
            raise  # within a step: the last checkpoint is the state to go back to
        except (Interrupted, LoopError, PlauditError) as error:
            raise self._give_way(error, files) from error
        self.step += 1
        self._last = {**done.values, "learning_rate": rate, "skipped": float(self._stage.trainable.skipped)}
        if files:
            files[0].write({"step": self.step} | {n: v if math.isfinite(v) else None for n, v in self._last.items()})
            for sample in done.samples:
                files[1].write({"step": self.step, **sample})
        told.log(self.step, {name: value for name, value in self._last.items() if value == value})
        display.step(self.step, self._last)

    def _save(self, files: list[JsonLines]) -> None:
        stage, trainable, (self._kept, tensors) = self._stage, self._stage.trainable, self._stage.state()
        if not self._place.world.is_main:
            self._saver.saved_at = self.step
            return
        self._positions = [file.position() for file in files]
        described = {
            "identity": dict(stage.identity), "threads": torch.get_num_threads(), "skipped": trainable.skipped,
            "positions": self._positions, "stopped": stage.stopped, "stage": self._kept,
            "last": {name: value for name, value in self._last.items() if math.isfinite(value)},
        }  # fmt: skip
        state = moments(trainable.named(), trainable.optimizer)
        every = {"weights": trainable.weights(), "optimizer": state, **tensors}
        self._saver.save(Snapshot(self.step, every, described))
        page.write(self._place.out, trees.flatten(self._config), f"{self.step} of {stage.total} {stage.stopped}")

    def _give_way(self, error: Exception, files: list[JsonLines]) -> Exception:
        """Save what has been computed since the last checkpoint, and the same error with where the run stands."""
        if max(self._saver.saved_at, 0) != self.step or self._stage.state()[0] != self._kept:  # also within a step
            self._save(files)
        saved = self._saver.saved_at
        last = "" if saved == self.step else f" (the last saved step is {saved})" if saved >= 0 else " (none is saved)"
        kind = Interrupted if isinstance(error, Interrupted) else LoopError
        told = kind(f"{error} after step {self.step} of {self._stage.total}{last}; go on with --resume")
        told.exit_code = getattr(error, "exit_code", 70)
        return told
