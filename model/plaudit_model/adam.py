"""The options of AdamW that training and the loops share, by TRL's names. Without torch, which help does not need."""

from __future__ import annotations

from dataclasses import dataclass

from plaudit._trees import option


@dataclass(frozen=True)
class AdamConfig:
    """AdamW and the rate that it is given. A kind of run adds what it has of its own, and other defaults."""

    learning_rate: float | None = option(None, "peak learning rate", low=0, high=1)
    warmup_ratio: float = option(0.03, "share of the steps over which the learning rate rises", low=0, high=1)
    adam_beta1: float = option(0.9, "AdamW", low=0, high=1)
    adam_beta2: float = option(0.95, "AdamW; 0.95 forgets an outlier sooner than 0.999", low=0, high=1)
    adam_epsilon: float = option(1e-8, "AdamW", low=0, high=1)
    weight_decay: float = option(0.0, "on matrices, never on norms and biases", low=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: they are not", low=0)
