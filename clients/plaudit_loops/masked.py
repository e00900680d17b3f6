"""Statistics over the part of a padded tensor that counts. Masks are bool, of the tensor's shape."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` where `mask`; whatever stands elsewhere, NaN included, adds nothing."""
    kept = torch.where(mask, x, 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` where `mask`; 0 where the mask is empty."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance of `x` where `mask`."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """`(x - mean) / sqrt(var + eps)` over the mask, 0 outside it. Without `shift_mean` only the scale changes: the
    mean is put back, as for rewards, where 0 means something (openai/lm-human-preferences)."""
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask) + eps)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """`1 - Var(returns - values) / Var(returns)`: 1 for a perfect value function, 0 for a constant, NaN if all
    returns are equal."""
    variance = masked_var(returns, mask)
    return torch.where(variance > 0, 1 - masked_var(returns - values, mask) / variance, float("nan"))
