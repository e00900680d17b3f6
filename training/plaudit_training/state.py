"""The whole state of a run: how far it is, weights, optimiser, random number generators; taken and put back."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from plaudit._trees import plain
from plaudit_model.checkpoint import Snapshot, Tensors, load_tensors
from plaudit_model.errors import CheckpointError
from plaudit_model.optimiser import load_moments, moments, trained

from .config import RunConfig

LOG = logging.getLogger("plaudit.training")


@dataclass
class Progress:
    """How far a run is. `step` counts optimiser steps that are done, skipped ones included; `best_*` are of the
    evaluation that was best so far, `waited` counts those since; `metrics_bytes` is the length of metrics.jsonl."""

    step: int = 0
    skipped: int = 0
    tokens: int = 0
    evaluated_at: int = 0
    best_step: int | None = None
    best_value: float | None = None
    waited: int = 0
    metrics_bytes: int = 0


@dataclass(frozen=True, eq=False)
class RunState:
    """What a checkpoint is taken of: the live objects of a run. `data` is the fingerprint of its examples, `base` what
    tells the base from others where it is frozen, so that no checkpoint holds it."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    config: RunConfig
    data: str
    base: Mapping[str, Any]

    def take(self, progress: Progress, generators: Tensors) -> Snapshot:
        """A snapshot with the random number generators as they were in `generators`."""
        state = {
            "config": plain(self.config),
            "data": self.data,
            "base": self.base,
            "threads": torch.get_num_threads(),
            "progress": dataclasses.asdict(progress),
        }
        optimizer = moments(trained(self.module), self.optimizer)
        tensors = {"model": module_tensors(self.module), "optimizer": optimizer, "rng": generators}
        return Snapshot(progress.step, tensors, state)

    def put_back(self, snapshot: Snapshot) -> Progress:
        """Make everything as it was. Raises CheckpointError if the snapshot is of another run."""
        for name, mine in (("config", plain(self.config)), ("data", self.data), ("base", self.base)):
            if snapshot.state[name] != mine:
                raise CheckpointError(f"step {snapshot.step} was computed with another {name}; use another --out")
        if (threads := snapshot.state["threads"]) != (now := torch.get_num_threads()):
            LOG.warning("the run began with %d threads and goes on with %d: the last bits may differ", threads, now)
        load_tensors(module_tensors(self.module), snapshot.tensors["model"])
        load_moments(trained(self.module), self.optimizer, snapshot.tensors["optimizer"])
        restore_generators(snapshot.tensors["rng"])
        return Progress(**snapshot.state["progress"])


def module_tensors(module: nn.Module) -> Tensors:
    """The parameters that are trained and the persistent buffers by name, a shared one once."""
    buffers = {name for name, _ in module.named_buffers()}
    kept = {name: tensor for name, tensor in module.state_dict().items() if name in buffers}
    return {name: parameter.detach() for name, parameter in trained(module)} | kept


def generators() -> Tensors:
    """The state of torch's generators, the only ones that a run draws from without a seed of its own (dropout)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state()} | {f"cuda{i}": state for i, state in enumerate(cuda)}


def restore_generators(states: Tensors) -> None:
    """Put back what `generators` took. A CUDA state without its device is left out: there is nothing to seed."""
    torch.set_rng_state(states["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda{i}"], i)
