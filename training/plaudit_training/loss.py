"""Losses: small pure functions over scores. C comparisons, N scored responses; everything is fp32 or wider.

Each comparison of the chosen and the rejected response contributes one number; the trainer sums them and
divides by the total weight of the optimiser step, so that the loss does not depend on how a step is cut into
micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus


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


def bradley_terry(chosen_C: Tensor, rejected_C: Tensor, margin_C: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin), (C,).

    Bradley and Terry 1952, as in Ouyang et al. 2203.02155; the margin is that of Llama 2, 2307.09288.
    """
    return softplus(-(_wide(chosen_C) - _wide(rejected_C) - margin_C))


def soft_bradley_terry(chosen_C: Tensor, rejected_C: Tensor, share_C: Tensor, margin_C: Tensor | float = 0.0) -> Tensor:
    """-share log sigmoid(z) - (1 - share) log sigmoid(-z) with z = chosen - rejected - margin, (C,).

    The cross-entropy of sigmoid(z) with the share of votes for the chosen response (soft labels, Wang et al.
    2401.06080 section 2); 1 gives `bradley_terry`, 0.5 is a tie.
    """
    won_C, lost_C = bradley_terry(chosen_C, rejected_C, margin_C), bradley_terry(rejected_C, chosen_C, -margin_C)
    return share_C * won_C + (1 - share_C) * lost_C


def smooth(share_C: Tensor, label_smoothing: float) -> Tensor:
    """(1 - e) share + e (1 - share), (C,): a label is wrong with probability e (Szegedy, 1512.00567)."""
    return (1 - label_smoothing) * share_C + label_smoothing * (1 - share_C)


def centring(chosen_C: Tensor, rejected_C: Tensor) -> Tensor:
    """(chosen + rejected)^2, (C,): keeps scores around 0, which comparisons alone leave free.

    Eisenstein et al. 2312.09244, equation 2; the trainer's `center_rewards_coefficient` times its mean.
    """
    return (_wide(chosen_C) + _wide(rejected_C)).square()


def preference_loss(
    scores_N: Tensor, pairs: Pairs, *, center_rewards_coefficient: float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """sum over comparisons of weight (soft_bradley_terry + center_rewards_coefficient centring), a scalar."""
    chosen_C, rejected_C = scores_N[pairs.chosen], scores_N[pairs.rejected]
    share_C = smooth(pairs.share, label_smoothing)
    loss_C = soft_bradley_terry(chosen_C, rejected_C, share_C, pairs.margin)
    if center_rewards_coefficient:
        loss_C = loss_C + center_rewards_coefficient * centring(chosen_C, rejected_C)
    return (pairs.weight * loss_C).sum()


def _wide(scores: Tensor) -> Tensor:
    """Half-precision scores differ by whole steps where a margin is decided: compute in fp32 at least."""
    return scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
