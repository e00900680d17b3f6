"""AdamW, a linear schedule, and one update of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from plaudit_model.optimiser import adamw, trained
from plaudit_model.run_folder import Diverged

from .config import OptimConfig
from .world import World

LOG = logging.getLogger("plaudit.loops")


def lr_scale(step: int, total: int, warmup_ratio: float, min_lr_ratio: float) -> float:
    """The factor on the learning rate in step 0..total-1: linear from 1/w to 1 over the first w = ceil(warmup_ratio
    total) steps, then linear down to `min_lr_ratio` (which the step after the last would have)."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    return 1 - (1 - min_lr_ratio) * (step - warmup) / max(1, total - warmup)


@dataclass(eq=False)
class Trainable:
    """Modules with their optimiser. `rates` is the peak learning rate of each module; `skipped` counts updates that
    were left out because their gradient was not finite, `_in_a_row` the last of them."""

    modules: Mapping[str, nn.Module]
    rates: Mapping[str, float]
    config: OptimConfig
    world: World
    skipped: int = 0
    _in_a_row: int = field(default=0, init=False)
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        parts = [(self.rates[name], trained(module)) for name, module in self.modules.items()]
        self.optimizer = adamw(parts, self.config)

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, by name. Frozen parameters, as those below an adapter, are the base's."""
        return ((f"{name}.{n}", p) for name, module in self.modules.items() for n, p in trained(module))

    def update(self, only: str | None = None) -> float:
        """One optimiser step with the gradients of all processes, clipped; returns their norm. `only` names the single
        module that moves. Raises Diverged after too many gradients in a row that are not finite: a few among many are
        left out, as a long run has them."""
        moved = [p for name, p in self.named() if only is None or name.startswith(f"{only}.")]
        self.world.sum_gradients(moved)
        norm = float(nn.utils.clip_grad_norm_(moved, self.config.max_grad_norm or math.inf))
        if math.isfinite(norm):
            self.optimizer.step()
            self._in_a_row = 0
        self.optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(norm):
            self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
            LOG.warning("an update is left out: its gradient is not finite (%d so far)", self.skipped)
            if self._in_a_row > self.config.max_skipped:
                raise Diverged(f"{self._in_a_row} gradients in a row are not finite: lower --learning-rate")
        return norm

    def weights(self) -> dict[str, Tensor]:
        """A copy of what is trained."""
        return {name: parameter.detach().clone() for name, parameter in self.named()}
