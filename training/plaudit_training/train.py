"""The training loop, to be read from top to bottom.

`Trainer.run` is the run: evaluate if it is time, save if it is time, stop if it is done, else take a step. Its
whole state is `Progress` beside weights, optimiser and random number generators; a checkpoint holds all four,
so a killed and resumed run computes, bit for bit, what it would have computed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plaudit_model import checkpoint
from plaudit_model.checkpoint import Saver, Tensors
from plaudit_model.errors import CheckpointError
from plaudit_model.interrupt import Interrupted, StopRequest
from plaudit_model.json_lines import JsonLines
from plaudit_model.optimiser import set_rate
from plaudit_model.packing import PackedBatch
from plaudit_model.progress import Trackers
from plaudit_model.reward_model import RewardModel
from plaudit_model.run_folder import Diverged

from . import optim
from .batches import Example, MicroBatch, micro_batches, step_members, steps_per_epoch, total_weight
from .config import RunConfig
from .evaluate import Evaluation, evaluate
from .loss import preference_loss
from .report import Display
from .state import Progress, RunState, generators, module_tensors

LOG = logging.getLogger("plaudit.training")


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be trained on what: `config` is resolved, `data` is the fingerprint of the examples, `base` is
    `Prepared.frozen`."""

    model: RewardModel
    train: Sequence[Example]
    held_out: Sequence[Example]
    config: RunConfig
    data: str
    base: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def steps_per_epoch(self) -> int:
        assert self.config.optim.batch_pairs is not None, "resolve the configuration first"
        return steps_per_epoch(self.train, self.config.optim.batch_pairs)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.config.optim.num_train_epochs


@dataclass(frozen=True, eq=False)
class Outlets:
    """Where the numbers of a run go, and from where it can be told to stop."""

    log: JsonLines
    trackers: Trackers
    display: Display
    stop: StopRequest


@dataclass
class Sums:
    """What is added up over the micro-batches of a step. `loss` is the step's mean loss when they are done."""

    tokens: int
    loss: float = 0.0
    right: int = 0
    decided: int = 0
    margin: float = 0.0
    packed_tokens: int = 0

    def add(self, loss: Tensor, scores_N: Tensor, micro: MicroBatch) -> None:
        scores_N = scores_N.detach().cpu()
        decided_C = micro.pairs.share != 0.5
        delta_C = (scores_N[micro.pairs.chosen] - scores_N[micro.pairs.rejected])[decided_C]
        self.loss += float(loss.detach())
        self.right += int((delta_C > 0).sum())
        self.decided += len(delta_C)
        self.margin += float(delta_C.double().sum())
        self.packed_tokens += micro.batch.tokens


class Trainer:
    """One run. Owns the optimiser and the progress; the caller owns everything else."""

    def __init__(self, task: Task, out: Path) -> None:
        self._task, self._config = task, task.config
        self._model, self._total = task.model, task.steps
        self._optimizer = optim.build(task.model.module, task.config.optim)
        self._state = RunState(task.model.module, self._optimizer, task.config, task.data, task.base)
        self._root = out / "checkpoints"
        self._saver = Saver(self._root, every=task.config.checkpoint.every, keep=task.config.checkpoint.keep)
        self._unsaved_best: Tensors | None = None
        self.progress = Progress()
        torch.manual_seed(task.config.seed)

    def resume(self) -> bool:
        """Take up the newest checkpoint that is whole; False if there is none.

        Raises CheckpointError if all are damaged, or made with another configuration or other data.
        """
        snapshot = checkpoint.newest(self._root)
        if snapshot is None:
            return False
        self.progress = self._state.put_back(snapshot)
        self._saver.saved_at = snapshot.step
        return True

    def run(self, outlets: Outlets) -> None:
        """Train to the end, or until evaluations stop getting better; the model then has the weights to keep.

        Raises Interrupted when told to stop, with a checkpoint written; Diverged; OSError when checkpoints can
        no longer be written.
        """
        while True:
            drawn = generators()
            try:
                if self._evaluation_due():
                    self._evaluate(outlets)
                if self._saver.due(self.progress.step) or self._found_best():
                    self._save(outlets, drawn)
                if self._finished():
                    break
                self._step(outlets)
            except Interrupted as signal:
                self._give_way(outlets, drawn, signal)
        if self.progress.skipped == self.progress.step:
            raise Diverged(f"all {self._total} steps had a loss or gradient that is not finite: nothing was learned")
        if self._saver.saved_at != self.progress.step:
            self._save(outlets, drawn)
        self._take_best()

    def _finished(self) -> bool:
        patience = self._config.evaluation.patience
        return self.progress.step >= self._total or 0 < patience <= self.progress.waited

    # -- a step ----------------------------------------------------------------------------------------------

    def _step(self, outlets: Outlets) -> None:
        """Gradients of all the step's comparisons, clipped, applied."""
        step, settings = self.progress.step, self._config.optim
        order = step_members(len(self._task.train), self._task.steps_per_epoch, self._config.seed, step)
        members = [self._task.train[i] for i in order]
        scale = optim.lr_scale(step, self._total, settings.warmup_ratio, settings.min_lr_ratio)
        set_rate(self._optimizer, scale)
        sums = self._accumulate(members, outlets.stop)
        norm = optim.clip(self._model.module, settings.max_grad_norm)
        finite = math.isfinite(sums.loss) and math.isfinite(norm)
        if finite:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._record(outlets, members, sums, norm, finite)

    def _accumulate(self, members: Sequence[Example], stop: StopRequest) -> Sums:
        """Gradients of the mean loss over the step's comparisons, micro-batch by micro-batch."""
        settings, sums = self._config.loss, Sums(tokens=sum(example.tokens for example in members))
        weight = total_weight(members, settings)
        budget, share = self._config.optim.token_budget, self._model.shares_prompt
        self._model.train_mode(gradient_checkpointing=self._config.optim.gradient_checkpointing)
        for micro in micro_batches(members, settings, token_budget=budget, share=share):
            stop.check()
            scores_N = forward(self._model, micro.batch, self._config.model.dtype)
            loss = preference_loss(
                scores_N, micro.pairs.to(scores_N.device), label_smoothing=settings.label_smoothing,
                center_rewards_coefficient=settings.center_rewards_coefficient,
            ) / weight  # fmt: skip
            torch.autograd.backward(loss)
            sums.add(loss, scores_N, micro)
        return sums

    def _record(self, outlets: Outlets, members: Sequence[Example], sums: Sums, norm: float, finite: bool) -> None:
        """Count the step and tell everyone."""
        progress, group = self.progress, self._optimizer.param_groups[0]
        progress.step += 1
        progress.tokens += sums.tokens
        progress.skipped += not finite
        event = {
            "event": "step",
            "step": progress.step,
            "epoch": progress.step / self._task.steps_per_epoch,
            "loss": _finite(sums.loss),
            "accuracy": sums.right / sums.decided if sums.decided else None,
            "margin": _finite(sums.margin / sums.decided) if sums.decided else None,
            "grad_norm": _finite(norm),
            "learning_rate": group["lr"],
            "comparisons": sum(example.pairs for example in members),
            "tokens": sums.tokens,
            "packed_tokens": sums.packed_tokens,
            "skipped": not finite,
        }
        outlets.log.write(event)
        outlets.display.step(progress.step, event)
        speed = {"train/tokens_per_second": outlets.display.tokens_per_second}
        outlets.trackers.log(progress.step, _numbers("train", event) | speed)
        if not finite:
            self._skipped()

    def _skipped(self) -> None:
        step, count = self.progress.step, self.progress.skipped
        LOG.warning("step %d skipped: its loss or gradient is not finite (%d so far)", step, count)
        if count > self._config.optim.max_skipped_steps:
            raise Diverged(f"{count} steps had a loss or gradient that is not finite, the last was {step}: lower --lr")

    # -- evaluation ------------------------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        every, step = self._config.evaluation.every, self.progress.step
        return bool(every and self._task.held_out and step and step % every == 0) and self.progress.evaluated_at < step

    def _evaluate(self, outlets: Outlets) -> None:
        result = evaluate(
            self._model,
            self._task.held_out,
            token_budget=self._config.optim.token_budget,
            cluster=self._config.evaluation.cluster,
            bootstrap=self._config.evaluation.bootstrap,
            seed=self._config.seed,
            tick=lambda _: outlets.stop.check(),
        )
        step = self.progress.evaluated_at = self.progress.step
        event = result.event(step)
        outlets.log.write(event)
        outlets.trackers.log(step, _numbers("eval", event))
        outlets.display.evaluation(step, event)
        self._compare(result)

    def _compare(self, result: Evaluation) -> None:
        """Keep track of the best. An evaluation that is not computable is not better."""
        progress, metric = self.progress, self._config.evaluation.metric
        value, sign = result.metrics[metric].value, 1 if metric == "accuracy" else -1
        if value is not None and (progress.best_value is None or sign * value > sign * progress.best_value):
            progress.best_value, progress.best_step, progress.waited = value, progress.step, 0
        else:
            progress.waited += 1

    def _found_best(self) -> bool:
        """Whether the weights as they are may be the ones to keep, and are not yet on disk."""
        is_best = self._config.evaluation.patience > 0 and self.progress.best_step == self.progress.step
        return is_best and self._saver.saved_at != self.progress.step

    def _take_best(self) -> None:
        """With early stopping, the weights of the best evaluation; else the last, and also where the best are lost."""
        best = self.progress.best_step
        if not self._config.evaluation.patience or best is None or best == self.progress.step:
            return
        try:
            tensors = self._unsaved_best or checkpoint.load(checkpoint.place(self._root, best)).tensors["model"]
        except CheckpointError as error:
            LOG.error("%s; keeping the weights of the last step, not of step %d, the best evaluation", error, best)
            return
        LOG.info("keeping the weights of step %d, the best evaluation", best)
        checkpoint.load_tensors(module_tensors(self._model.module), tensors)

    # -- checkpoints -----------------------------------------------------------------------------------------

    def _save(self, outlets: Outlets, generators: Tensors) -> None:
        self.progress.metrics_bytes = outlets.log.position()
        self._saver.save(self._state.take(self.progress, generators), self.progress.best_step)
        if self._found_best():  # still not on disk: the save failed
            self._unsaved_best = {
                name: tensor.to("cpu", copy=True) for name, tensor in module_tensors(self._model.module).items()
            }
        elif self.progress.best_step == self.progress.step:
            self._unsaved_best = None

    def _give_way(self, outlets: Outlets, generators: Tensors, signal: Interrupted) -> None:
        """Drop the step that was begun, save the state before it, and leave."""
        self._optimizer.zero_grad(set_to_none=True)
        if self._saver.saved_at != self.progress.step:
            self._save(outlets, generators)
        step, saved = self.progress.step, self._saver.saved_at
        last = f"the last saved step is {saved}" if saved >= 0 else "no step is saved"
        lost = "" if saved == step else f", which could not be saved ({last})"
        raise Interrupted(f"{signal} after step {step} of {self._total}{lost}; go on with --resume") from signal


def forward(model: RewardModel, batch: PackedBatch, dtype: str) -> Tensor:
    """Scores (N,) fp32 in the caller's order, with gradients.

    bfloat16 is autocast: the weights stay fp32, the trunk's matrix products run in bf16, the head in fp32.
    """
    device = torch.device(model.device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        scores_NA = model.forward(batch)
    order = torch.from_numpy(np.argsort(batch.indices)).to(device)
    return scores_NA[:, 0].index_select(0, order)


def _finite(value: float) -> float | None:
    """JSON has no NaN; what is not a number is null."""
    return value if math.isfinite(value) else None


def _numbers(prefix: str, event: dict[str, Any]) -> dict[str, float]:
    return {
        f"{prefix}/{name}": float(value)
        for name, value in event.items()
        if isinstance(value, (int, float)) and name != "step"
    }
