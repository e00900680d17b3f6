"""Losses: small pure functions over scores. C comparisons, N scored responses; everything is fp32 or wider.

Each comparison of the chosen and the rejected response contributes one number; the trainer sums them and
divides by the total weight of the optimiser step, so that the loss does not depend on how a step is cut into
micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plaudit_kernels import bradley_terry


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """C comparisons among N scores. For a tie `chosen` and `rejected` are the two in the order they came.

    chosen, rejected (C,) int64: rows of the scores. share (C,): share of the votes for the chosen one, 1 for
    a hard label, 0.5 for a tie. margin (C,): by how much it should win. weight (C,): what it counts.
    """

    chosen: Tensor
    rejected: Tensor
    share: Tensor
    margin: Tensor
    weight: Tensor

    def to(self, device: torch.device) -> Pairs:
        """The same on another device."""
        parts = (self.chosen, self.rejected, self.share, self.margin, self.weight)
        return Pairs(*(part.to(device) for part in parts))


def smooth(share_C: Tensor, label_smoothing: float) -> Tensor:
    """(1 - e) share + e (1 - share), (C,): a label is wrong with probability e (Szegedy, 1512.00567)."""
    return (1 - label_smoothing) * share_C + label_smoothing * (1 - share_C)


def preference_loss(
    scores_N: Tensor, pairs: Pairs, *, center_rewards_coefficient: float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """The sum of `plaudit_kernels.bradley_terry` over the comparisons, a scalar. `center_rewards_coefficient` is
    TRL's name for its centring."""
    share_C = smooth(pairs.share, label_smoothing)
    losses_C = bradley_terry(
        scores_N, pairs.chosen, pairs.rejected, share_C, pairs.margin, pairs.weight, centring=center_rewards_coefficient
    )
    return losses_C.sum()
