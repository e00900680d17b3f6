"""Advantages: how much better an action was than expected. Pure functions over tensors.

S: samples, T: response tokens (right-padded). `mask_ST` is True on the tokens of the response; `rewards_ST` and all
results are 0 outside it. Groups are G consecutive samples of one prompt. `valid_S` is False for samples without a
score: they get 0 and are in no mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .masked import whiten


def token_rewards(scores_S: Tensor, penalty_ST: Tensor, mask_ST: Tensor) -> Tensor:
    """`-penalty` on every token, and the score on the last one besides: the reward of a sequence comes once, at its
    end (Ziegler et al. 1909.08593). Samples without a token get nothing."""
    rewards_ST = torch.where(mask_ST, -penalty_ST, 0.0)
    last_S = mask_ST.sum(1) - 1
    rows = torch.nonzero(last_S >= 0)[:, 0]
    rewards_ST[rows, last_S[rows]] += scores_S[rows].to(rewards_ST)
    return rewards_ST


def gae(rewards_ST: Tensor, values_ST: Tensor, mask_ST: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (Schulman et al. 1506.02438):

    delta_t = r_t + gamma V_(t+1) - V_t        with V = 0 after the last token
    A_t = delta_t + gamma lam A_(t+1)          returns = A + V
    """
    values_ST = torch.where(mask_ST, values_ST, 0.0)
    advantages_ST = torch.zeros_like(values_ST)
    following_S = torch.zeros_like(values_ST[:, 0]) if values_ST.shape[1] else values_ST.new_zeros(len(values_ST))
    next_value_S = following_S
    for t in reversed(range(values_ST.shape[1])):
        delta_S = rewards_ST[:, t] + gamma * next_value_S - values_ST[:, t]
        following_S = torch.where(mask_ST[:, t], delta_S + gamma * lam * following_S, 0.0)
        advantages_ST[:, t] = following_S
        next_value_S = values_ST[:, t]
    return advantages_ST, torch.where(mask_ST, advantages_ST + values_ST, 0.0)


def grpo(scores_S: Tensor, valid_S: Tensor, group_size: int, *, scale: bool, eps: float = 1e-4) -> Tensor:
    """`(r - mean) / (std + eps)` within each group (Shao et al. 2402.03300, eq. 3; std with G - 1), or `r - mean`
    without `scale` (Dr. GRPO, Liu et al. 2503.20783, which finds the division biased towards easy and hard prompts)."""
    r, valid = scores_S.view(-1, group_size), valid_S.view(-1, group_size)
    count = valid.sum(1, keepdim=True)
    centred = torch.where(valid, r - _group_mean(r, valid), 0.0)
    if scale:
        std = (centred.pow(2).sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std + eps)
    return torch.where(count > 1, centred, 0.0).view(-1)


def rloo(scores_S: Tensor, valid_S: Tensor, group_size: int) -> Tensor:
    """REINFORCE leave-one-out: `r_i - mean of the other r_j` of the group (Ahmadian et al. 2402.14740, eq. 4)."""
    r, valid = scores_S.view(-1, group_size), valid_S.view(-1, group_size)
    count = valid.sum(1, keepdim=True)
    others = (torch.where(valid, r, 0.0).sum(1, keepdim=True) - r) / (count - 1).clamp(min=1)
    return torch.where(valid & (count > 1), r - others, 0.0).view(-1)


def reinforce_plus_plus(rewards_ST: Tensor, mask_ST: Tensor, *, gamma: float) -> Tensor:
    """Discounted sums of the rewards to come, whitened over the whole batch (REINFORCE++, Hu 2501.03262, eq. 8 and 9:
    no critic, no groups)."""
    returns_ST, following_S = torch.zeros_like(rewards_ST), rewards_ST.new_zeros(len(rewards_ST))
    for t in reversed(range(rewards_ST.shape[1])):
        following_S = torch.where(mask_ST[:, t], rewards_ST[:, t] + gamma * following_S, 0.0)
        returns_ST[:, t] = following_S
    return whiten(returns_ST, mask_ST)


def centred_scores(scores_S: Tensor, valid_S: Tensor, group_size: int) -> Tensor:
    """Scores less their group's mean: the baseline variant of REINFORCE++."""
    r, valid = scores_S.view(-1, group_size), valid_S.view(-1, group_size)
    return torch.where(valid, r - _group_mean(r, valid), 0.0).view(-1)


def _group_mean(r: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, r, 0.0).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
