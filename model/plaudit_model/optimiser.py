"""AdamW of a run: its groups, its rate, and its moments as the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .adam import AdamConfig

FREE_OF_DECAY = ("norm", "bias", "ln_")
"""Weight decay pulls towards 0; a norm's gain belongs at 1 and a bias has no scale to shrink."""

Named = Iterable[tuple[str, nn.Parameter]]


def trained(module: nn.Module) -> Named:
    """The named parameters that want gradients, in the module's order."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def adamw(parts: Iterable[tuple[float, Named]], settings: AdamConfig) -> torch.optim.AdamW:
    """AdamW in fp32 over parts with a peak learning rate each: matrices decay; norms, biases and other vectors do
    not."""
    groups = []
    for peak, named in parts:
        chosen: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, parameter in named:
            chosen[parameter.ndim >= 2 and not any(part in name.lower() for part in FREE_OF_DECAY)].append(parameter)
        about = {"lr": peak, "peak": peak}
        groups += [{"params": own, "weight_decay": settings.weight_decay * d, **about} for d, own in chosen.items()]
    betas = settings.adam_beta1, settings.adam_beta2
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=betas, eps=settings.adam_epsilon)


def set_rate(optimizer: torch.optim.Optimizer, scale: float) -> float:
    """Set each learning rate to `scale` times its peak; returns that of the first part."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale
    return float(optimizer.param_groups[0]["lr"])


def moments(parameters: Named, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as flat named tensors: `<parameter>/<moment>`."""
    return {
        f"{name}/{key}": torch.as_tensor(value).detach()
        for name, parameter in parameters
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_moments(parameters: Named, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `moments` took out. A parameter without an entry starts without moments."""
    mine = dict(parameters)
    optimizer.state.clear()
    for key, value in tensors.items():
        name, moment = key.rsplit("/", 1)
        place = "cpu" if moment == "step" else mine[name].device
        optimizer.state[mine[name]][moment] = value.to(place).clone()
