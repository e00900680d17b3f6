"""AdamW, a linear schedule, and one update of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

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
        groups = []
        for name, module in self.modules.items():
            for decays in (True, False):
                chosen = [p for n, p in module.named_parameters() if p.requires_grad and _decays(n, p) is decays]
                decay = self.config.weight_decay if decays else 0.0
                groups.append({"params": chosen, "peak": self.rates[name], "weight_decay": decay, "module": name})
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=1.0,
            betas=(self.config.adam_beta1, self.config.adam_beta2), eps=self.config.adam_epsilon,
        )  # fmt: skip

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, by name. Frozen parameters, as those below an adapter, are the base's."""
        for module_name, module in self.modules.items():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield f"{module_name}.{name}", parameter

    def set_rate(self, scale: float) -> float:
        """Scale every learning rate; returns that of the first module."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        return float(self.optimizer.param_groups[0]["lr"])

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


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and not any(part in name.lower() for part in ("norm", "bias", "ln_"))
