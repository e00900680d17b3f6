"""Best-of-n statistics against enumeration, exact fractions and simulation."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from itertools import combinations
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plaudit.bon.statistics import common_size, curve, expected_best, fit, in_order, kl_upper_bound, order_weights

NUMBERS = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=7)


def enumerated(proxy: list[float], gold: list[float], n: int) -> float:
    """The mean over all subsets of n of the gold score of the best by proxy, ties broken by a fair draw."""
    chosen = []
    for subset in combinations(range(len(proxy)), n):
        highest = max(proxy[i] for i in subset)
        chosen.append(fmean(gold[i] for i in subset if proxy[i] == highest))
    return fmean(chosen)


@given(NUMBERS, st.randoms(use_true_random=False))
def test_the_expected_best_is_the_mean_over_all_subsets(proxy: list[float], chance: random.Random) -> None:
    gold = [float(chance.randint(-9, 9)) for _ in proxy]
    by_proxy, by_gold = in_order(proxy, gold)
    for n in range(1, len(proxy) + 1):
        assert expected_best(by_proxy, n) == pytest.approx(enumerated(proxy, proxy, n), abs=1e-12)
        assert expected_best(by_gold, n) == pytest.approx(enumerated(proxy, gold, n), abs=1e-12)


def test_the_estimate_is_unbiased_where_the_naive_one_is_not() -> None:
    chance, n, size = random.Random(0), 4, 6
    truth = n / (n + 1)  # the expected maximum of n uniform numbers
    drawn = [in_order([chance.random() for _ in range(size)])[0] for _ in range(20_000)]
    error = 4 * 0.13 / math.sqrt(len(drawn))  # four standard errors
    assert abs(fmean(expected_best(values, n) for values in drawn) - truth) < error
    assert abs(fmean(values[0] for values in drawn) - truth) > 4 * error  # the best of all six is not that of four


@pytest.mark.parametrize(("size", "n"), [(1, 1), (5, 1), (5, 5), (16, 4), (12_600, 1000), (12_600, 12_500)])
def test_weights_are_the_exact_binomials(size: int, n: int) -> None:
    weights = order_weights(n, size)
    assert len(weights) == size - n + 1 and math.fsum(weights) == pytest.approx(1, abs=1e-12)
    whole = math.comb(size, n)
    for place in {0, 1, len(weights) // 2} & set(range(len(weights))):
        exact = Fraction(math.comb(size - place - 1, n - 1), whole)
        if exact > Fraction(1, 10**290):
            assert abs(Fraction(weights[place]) / exact - 1) < Fraction(1, 10**11)


def test_the_recursion_is_nearer_to_the_truth_than_log_gamma() -> None:
    size, n, place = 12_600, 100, 60
    exact = Fraction(math.comb(size - place - 1, n - 1), math.comb(size, n))

    def log_choose(a: int, b: int) -> float:
        return math.lgamma(a + 1) - math.lgamma(b + 1) - math.lgamma(a - b + 1)

    gamma = math.exp(log_choose(size - place - 1, n - 1) - log_choose(size, n))
    errors = [abs(float(Fraction(found) / exact - 1)) for found in (order_weights(n, size)[place], gamma)]
    assert errors[0] < 1e-13 < errors[1]


def test_the_kl_is_an_upper_bound() -> None:
    assert [round(kl_upper_bound(n), 3) for n in (1, 2, 4, 16, 64)] == [0.0, 0.193, 0.636, 1.835, 3.175]
    policy = [0.5, 0.3, 0.2]  # three responses, from best to worst: the best of n has the first with 1 - (1-.5)^n
    for n in (2, 4, 8):
        tails = [1.0, 0.5, 0.2, 0.0]
        best = [tails[i] ** n - tails[i + 1] ** n for i in range(3)]
        kl = math.fsum(q * math.log(q / p) for q, p in zip(best, policy, strict=True))
        assert kl < kl_upper_bound(n)


def test_a_curve_is_monotone_and_has_errors() -> None:
    chance = random.Random(1)
    prompts = [in_order([chance.gauss(0, 1) for _ in range(8)])[0] for _ in range(50)]
    points = curve(prompts, 8)
    means = [mean for mean, _ in points]
    assert means == sorted(means) and means[0] == pytest.approx(fmean(map(fmean, prompts)))
    assert means[-1] == pytest.approx(fmean(values[0] for values in prompts))
    assert all(error is not None and 0.01 < error < 0.5 for _, error in points)
    assert curve(prompts[:1], 2)[0][1] is None


def test_the_fit_finds_the_law_that_made_the_curve() -> None:
    alpha, beta, size, chance = 1.0, 0.25, 16, random.Random(3)
    # Values whose expected best of n is exactly the law: solve for them from the top of the curve downwards.
    values = law_values(alpha, beta, size)
    prompts = [[value + chance.gauss(0, 0.05) for value in values] for _ in range(40)]
    found = fit(prompts, size, resamples=200, seed=0)
    assert found is not None
    assert found.alpha.low < alpha < found.alpha.high and found.beta.low < beta < found.beta.high
    assert found.alpha.high - found.alpha.low < 0.3 and found.r2 is not None and found.r2 > 0.98
    assert found.peak_kl_upper_bound == pytest.approx((alpha / 2 / beta) ** 2, rel=0.2)
    assert found == fit(prompts, size, resamples=200, seed=0)
    assert fit([[-value for value in own] for own in prompts], size, resamples=20, seed=0).peak_gain is None  # type: ignore[union-attr]
    assert fit(prompts, 2, resamples=20, seed=0) is None


def law_values(alpha: float, beta: float, size: int) -> list[float]:
    """Values, best proxy first, with expected_best(values, n) = d (alpha - beta d): for n = size it is the first
    value, and each smaller n brings in one more."""
    values: list[float] = []
    for n in range(size, 0, -1):
        d = math.sqrt(kl_upper_bound(n))
        weights = order_weights(n, size)
        known = math.fsum(w * v for w, v in zip(weights, values, strict=False))
        values.append((d * (alpha - beta * d) - known) / weights[len(values)])
    return values


def test_the_common_size_is_what_nearly_all_have() -> None:
    assert common_size([16] * 95 + [15] * 5) == 16
    assert common_size([16] * 80 + [4] * 20) == 4
    assert common_size([16] * 9 + [1]) == 16 and common_size([3]) == 3 and common_size([]) == 0
