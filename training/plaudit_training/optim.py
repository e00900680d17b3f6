"""The optimiser: AdamW in fp32, linear warm-up, cosine to a floor, clipping. All of it deterministic."""

from __future__ import annotations

import math

import torch
from torch import nn

from plaudit_model.optimiser import adamw, trained

from .config import OptimConfig


def lr_scale(step: int, total: int, warmup_ratio: float, min_lr_ratio: float) -> float:
    """The factor on the learning rate in optimiser step `step` of 0..total-1.

    Linear from 1/w to 1 over the first w = ceil(warmup_ratio total) steps, then half a cosine down to
    `min_lr_ratio`, which the last step has (Loshchilov and Hutter 1608.03983, without restarts).
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup + 1) / (total - warmup)
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def build(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that want gradients: the trunk's, and the head's with its own rate.
    `config.learning_rate` must be resolved."""
    assert config.learning_rate is not None, "resolve the configuration first"
    head_lr = config.learning_rate if config.head_learning_rate is None else config.head_learning_rate
    heads = head_parameters(module)
    trunk = [(name, parameter) for name, parameter in trained(module) if name not in heads]
    head = [(name, parameter) for name, parameter in trained(module) if name in heads]
    return adamw([(config.learning_rate, trunk), (head_lr, head)], config)


def head_parameters(module: nn.Module) -> frozenset[str]:
    """Names of the classification head's parameters: everything outside the module's backbone."""
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    return frozenset(name for name, _ in module.named_parameters() if not name.startswith(prefix))


def clip(module: nn.Module, max_norm: float) -> float:
    """Scale the gradients to a total norm of at most `max_norm` (0: leave them). Returns the norm before it,
    which is not finite if any gradient is not."""
    parameters = [p for _, p in trained(module)]
    limit = max_norm if max_norm > 0 else math.inf
    return float(nn.utils.clip_grad_norm_(parameters, limit))
