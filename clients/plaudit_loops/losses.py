"""Losses: pure functions over log-probabilities. S: samples, T: response tokens; masks as in `advantages`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .kl import LARGEST_LOG_RATIO
from .masked import masked_sum

Aggregation = Literal["token", "sequence", "constant"]


def log_ratio(logprobs: Tensor, old: Tensor) -> Tensor:
    """`log pi - log pi_old`, kept within +-20: beyond that its exponential says nothing more."""
    return (logprobs - old).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def clipped_policy_loss(
    log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """`max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))` per token, rho = e^log_ratio (Schulman et al. 1707.06347
    (7)). `dual_clip` c bounds it by -A c where A < 0 (Ye et al. 1912.09729): a huge ratio on a bad token."""
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


def clip_fraction(log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """1 per token where the clipped branch is the larger loss, so that its gradient is zero; else 0."""
    ratio = log_ratio.exp()
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high) > -advantages * ratio
    return clipped.to(log_ratio.dtype)


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """`max((v - R)^2, (clip(v, v_old +- clip) - R)^2) / 2` per token (PPO as in openai/baselines)."""
    near = torch.minimum(torch.maximum(values, old - clip), old + clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def aggregate(loss_ST: Tensor, mask_ST: Tensor, how: Aggregation, *, total: float, length: int) -> Tensor:
    """One number of the losses per token; sums over parts of a batch, so that the parts add up to the whole.

    token      the mean over all tokens; `total` is the number of tokens in the batch (DAPO, 2503.14476)
    sequence   the mean of the sequences' means; `total` is the number of sequences (GRPO's paper)
    constant   the sum over tokens by sequences x `length`, the longest possible (Dr. GRPO, 2503.20783: no bias
               towards long wrong and short right answers); `total` is the number of sequences
    """
    if how == "token":
        return masked_sum(loss_ST, mask_ST) / total
    if how == "constant":
        return masked_sum(loss_ST, mask_ST) / (total * length)
    return (masked_sum(loss_ST, mask_ST, 1) / mask_ST.sum(1).clamp(min=1)).sum() / total


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """Direct preference optimisation, per pair, from log-probabilities of whole responses (Rafailov et al. 2305.18290,
    eq. 7): `-log sigmoid(beta h)`, h = (chosen - ref_chosen) - (rejected - ref_rejected). With label smoothing e the
    label is wrong with probability e: `-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)` (conservative DPO)."""
    h = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
