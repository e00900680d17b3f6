"""Kullback-Leibler divergence of a policy from its reference: estimators and a controller.

Estimators take the log-probabilities of *sampled* tokens (Schulman, "Approximating KL divergence", 2020), with
d = log pi - log ref and samples from pi:

    k1 = d              unbiased, signed, high variance
    k2 = d^2 / 2        biased, never negative; its gradient, differentiated through, is that of the KL
    k3 = e^-d - 1 + d   unbiased, never negative; differentiated through it is only a first-order version
                        (arXiv 2510.01555), though the form of GRPO's paper

In the reward, where nothing is differentiated, k1 is right.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
LARGEST_LOG_RATIO = 20.0


def kl_estimate(logprobs: Tensor, reference: Tensor, kind: Estimator) -> Tensor:
    """The estimate per token, of the shape of the inputs. k3's exponent is kept within +-20."""
    d = logprobs - reference
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d**2
    bounded = d.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return torch.expm1(-bounded) + bounded


def next_kl_coefficient(coefficient: float, kl: float, *, target: float, samples: int, horizon: int) -> float:
    """The coefficient after a step of `samples` episodes whose mean sequence KL was `kl` nats:
    `coefficient * (1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon)` (Ziegler et al. 1909.08593, 2.2). More
    samples than the horizon count as so many: beyond five times as many it would come out negative, a reward for KL."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * min(1.0, samples / horizon))
