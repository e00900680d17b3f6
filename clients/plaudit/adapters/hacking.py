"""Signs that a policy exploits its reward model: values in, a verdict out.

The proxy's score goes on rising while the true quality falls (Gao et al., 2210.10760). What can be seen of that
without the truth: the distance from the reference policy (KL), what the members of an ensemble dispute (Coste et al.,
2310.02743), and responses that only grow longer.
"""

from __future__ import annotations

import logging
import math
import statistics
from dataclasses import dataclass
from typing import TypeGuard

from ..errors import ConfigurationError

log = logging.getLogger("plaudit")


@dataclass(frozen=True, slots=True)
class HackingLimits:
    """When a sign counts; None leaves it out.

    kl        nats, in the trainer's own unit (per token or per sequence): more than this
    std       times the ensemble's baseline, while the reward is above its own
    length    times the baseline of the mean response length, while the reward is above its own
    baseline  observations whose median is the baseline: until then nothing but KL counts
    patience  observations in a row after which the verdict is to stop
    """

    kl: float | None = None
    std: float | None = 2.0
    length: float | None = 2.0
    baseline: int = 10
    patience: int = 3

    def __post_init__(self) -> None:
        if min(self.baseline, self.patience) < 1:
            raise ConfigurationError("baseline and patience must be at least 1")
        for name in ("kl", "std", "length"):
            if (limit := getattr(self, name)) is not None and not limit > 0:
                raise ConfigurationError(f"{name} must be positive, or None; got {limit}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """`signs`: what is out of bounds now, in words. `stop`: one of them has been for `patience` observations."""

    stop: bool = False
    signs: tuple[str, ...] = ()


class RewardHackingMonitor:
    """Watches one run. What is None or NaN was not measured: it neither adds to a streak nor ends one. Without
    `reward` only KL counts, for nothing else tells a policy that learns from one that cheats."""

    def __init__(self, limits: HackingLimits | None = None) -> None:
        self.limits = limits or HackingLimits()
        self._first: dict[str, list[float]] = {"reward": [], "std": [], "length": []}
        self._streaks = {"kl": 0, "std": 0, "length": 0}

    def observe(
        self,
        *,
        reward: float | None = None,
        std: float | None = None,
        length: float | None = None,
        kl: float | None = None,
    ) -> Verdict:
        """The verdict after one more step: means over its responses, `length` in tokens."""
        rising = self._over("reward", reward)
        signs = [self._sign("kl", kl, self.limits.kl, "")]
        for name, value, factor in (("std", std, self.limits.std), ("length", length, self.limits.length)):
            base = self._baseline(name, value)
            if factor is not None and base and rising is not None:
                limit = factor * base if rising else math.inf
                signs.append(self._sign(name, value, limit, f" (at first {base:.4g})"))
        found = tuple(sign for sign in signs if sign)
        stop = max(self._streaks.values()) >= self.limits.patience
        if stop:
            log.warning("reward hacking is likely: %s, for %d steps", "; ".join(found), max(self._streaks.values()))
        return Verdict(stop, found)

    def _over(self, name: str, value: float | None) -> bool | None:
        """Whether a value is above its baseline; None if either is not known."""
        base = self._baseline(name, value)
        return value > base if base is not None and _known(value) else None

    def _baseline(self, name: str, value: float | None) -> float | None:
        """The median of the first observations; None until all of them are there."""
        first = self._first[name]
        if len(first) >= self.limits.baseline:
            return statistics.median(first)
        if _known(value):
            first.append(value)
        return None

    def _sign(self, name: str, value: float | None, limit: float | None, base: str) -> str:
        if limit is None or not _known(value):
            return ""
        self._streaks[name] = self._streaks[name] + 1 if value > limit else 0
        return f"{name} {value:.4g} is above {limit:.4g}{base}" if value > limit else ""


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
