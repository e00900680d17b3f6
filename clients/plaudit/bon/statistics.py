"""What choosing the best of n is worth: unbiased curves, an upper bound of their KL, and the fit of over-optimisation.

Pure, float64, standard library. `N` is the number of samples of a prompt, n <= N how many of them one chooses from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from operator import itemgetter, mul
from random import Random
from statistics import fmean, pvariance, stdev


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Fit:
    """R(d) = d (alpha - beta d), d = sqrt(KL bound), R the gain over n = 1 (Gao et al., 2210.10760).

    The peak, at d = alpha / (2 beta), is there only if beta > 0. `r2`: 1 - the mean squared residual over the variance.
    """

    alpha: Estimate
    beta: Estimate
    r2: float | None
    peak_kl_upper_bound: float | None
    peak_gain: float | None


@lru_cache(maxsize=64)
def order_weights(n: int, size: int) -> tuple[float, ...]:
    """Weights of the `size` values, highest first, in the mean of the maximum of n of them drawn without replacement:
    C(i-1, n-1) / C(size, n) for the i-th smallest, the unbiased estimate of the expected best of n.

    By the recursion w(i-1) = w(i) (i-n) / (i-1) from w(size) = n / size, all factors below 1: at size 12,600 it is
    nearer to the exact binomials than log-gamma, whose terms cancel. Zeros at the end are left out.
    """
    return tuple(accumulate(((i - n) / (i - 1) for i in range(size, n, -1)), mul, initial=n / size))


def in_order(proxy: Sequence[float], gold: Sequence[float] = ()) -> tuple[list[float], list[float]]:
    """The scores of one prompt, highest proxy first, and the gold scores in that order. Of equal proxies any may be
    the one that is chosen: each gets the mean of their gold scores."""
    if not gold:
        return sorted(proxy, reverse=True), []
    pairs = sorted(zip(proxy, gold, strict=True), key=itemgetter(0), reverse=True)
    ties = [[value for _, value in tied] for _, tied in groupby(pairs, key=itemgetter(0))]
    return [score for score, _ in pairs], [fmean(own) for own in ties for _ in own]


def expected_best(values: Sequence[float], n: int) -> float:
    """The expected value of the sample that is chosen from n; `values` in the order of `in_order`."""
    return math.fsum(map(mul, order_weights(n, len(values)), values))


def kl_upper_bound(n: int) -> float:
    """log n - (n-1)/n nats: an upper bound of KL(best-of-n || policy), reached only without equal scores (Beirami
    et al., 2401.01879)."""
    return math.log(n) - (n - 1) / n


def curve(prompts: Sequence[Sequence[float]], n_max: int) -> list[tuple[float, float | None]]:
    """The expected best of n for every n up to `n_max`: its mean over the prompts, all of which have so many samples,
    and the standard error of that (None for one prompt)."""
    points = ([expected_best(values, n) for values in prompts] for n in range(1, n_max + 1))
    return [(fmean(own), stdev(own) / math.sqrt(len(own)) if len(own) > 1 else None) for own in points]


def common_size(sizes: Sequence[int], share: float = 0.9) -> int:
    """The largest n for which this share of the prompts has so many samples."""
    return sorted(sizes, reverse=True)[max(0, math.ceil(share * len(sizes)) - 1)] if sizes else 0


def fit(prompts: Sequence[Sequence[float]], n_max: int, *, resamples: int, seed: int) -> Fit | None:
    """The fit to the mean curve of the prompts, each given as values in the proxy's order, at the powers of two up
    to `n_max`, and there; percentile intervals by bootstrap over prompts. None for fewer than two such n above 1."""
    grid = sorted({min(2**k, n_max) for k in range(n_max.bit_length() + 1)})
    if len(grid) < 3:
        return None
    gains = [[expected_best(values, n) - fmean(values) for values in prompts] for n in grid]
    distances = [math.sqrt(kl_upper_bound(n)) for n in grid]
    random, means = Random(seed), [fmean(own) for own in gains]
    draws = []
    for _ in range(resamples):
        drawn = random.choices(range(len(prompts)), k=len(prompts))
        draws.append(_least_squares(distances, [fmean(own[place] for place in drawn) for own in gains]))
    alpha, beta = _least_squares(distances, means)
    fitted = [d * (alpha - beta * d) for d in distances]
    rest, total = pvariance([m - f for m, f in zip(means, fitted, strict=True)], 0.0), pvariance(means)
    return Fit(
        alpha=_estimate(alpha, [draw[0] for draw in draws]),
        beta=_estimate(beta, [draw[1] for draw in draws]),
        r2=1 - rest / total if total else None,
        peak_kl_upper_bound=(alpha / (2 * beta)) ** 2 if min(alpha, beta) > 0 else None,
        peak_gain=alpha**2 / (4 * beta) if min(alpha, beta) > 0 else None,
    )


def _least_squares(distances: Sequence[float], gains: Sequence[float]) -> tuple[float, float]:
    """alpha and beta by the normal equations of gain = alpha d - beta d^2."""
    a, b, c = (math.fsum(d**power for d in distances) for power in (2, 3, 4))
    x, y = (math.fsum(d**power * gain for d, gain in zip(distances, gains, strict=True)) for power in (1, 2))
    determinant = a * c - b * b
    return (c * x - b * y) / determinant, (b * x - a * y) / determinant


def _estimate(value: float, draws: Sequence[float]) -> Estimate:
    ordered = sorted(draws)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.025, 0.975))
    return Estimate(value, low, high)
