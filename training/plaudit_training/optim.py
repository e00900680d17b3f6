"""The optimiser: AdamW in fp32, linear warm-up, cosine to a floor, clipping. All of it deterministic."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .config import OptimConfig

FREE_OF_DECAY = ("norm", "bias", "ln_")
"""Weight decay pulls towards 0; a norm's gain belongs at 1 and a bias has no scale to shrink."""


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
    """AdamW over the parameters that want gradients, in at most four groups: trunk or head, with or without
    decay. `base_lr` of a group is what `lr_scale` multiplies. `config.learning_rate` must be resolved."""
    assert config.learning_rate is not None, "resolve the configuration first"
    head_lr = config.learning_rate if config.head_learning_rate is None else config.head_learning_rate
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    heads = head_parameters(module)
    for name, parameter in trained(module):
        key = (name in heads, decays(name, parameter))
        groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "base_lr": head_lr if is_head else config.learning_rate,
                "weight_decay": config.weight_decay if decay else 0.0,
            }
            for (is_head, decay), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )


def trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The named parameters that want gradients, in the module's order."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def head_parameters(module: nn.Module) -> frozenset[str]:
    """Names of the classification head's parameters: everything outside the module's backbone."""
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    return frozenset(name for name, _ in module.named_parameters() if not name.startswith(prefix))


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases or other vectors."""
    return parameter.ndim >= 2 and not any(part in name.lower() for part in FREE_OF_DECAY)


def set_lr(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Set each group's learning rate to `scale` times its own base."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * scale


def clip(module: nn.Module, max_norm: float) -> float:
    """Scale the gradients to a total norm of at most `max_norm` (0: leave them). Returns the norm before it,
    which is not finite if any gradient is not."""
    parameters = [p for _, p in trained(module)]
    limit = max_norm if max_norm > 0 else math.inf
    return float(nn.utils.clip_grad_norm_(parameters, limit))
