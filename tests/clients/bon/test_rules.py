"""Each rule on candidates small enough to work out by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import permutations
from random import Random

import pytest

from plaudit import ConfigurationError, InvalidInput
from plaudit.bon.rules import RULES, Candidate, RuleOptions, raft_bar, uncertainty

VALUES = [1.0, 3.0, 2.0, 3.0, -1.0]


def candidates(values: list[float | None], answers: str | None = None) -> list[Candidate]:
    return [Candidate(i, f"r{i}", value, answers[i] if answers else None) for i, value in enumerate(values)]


def picked(rule: str, values: list[float | None], options: RuleOptions | None = None, **more: str) -> list[int]:
    return [c.index for c in RULES[rule](candidates(values, **more), options or RuleOptions(), Random(0))]


def test_the_best_of_equal_ones_is_the_first() -> None:
    assert picked("best", VALUES) == picked("uncertainty", VALUES) == [1]
    assert picked("best", []) == picked("topk", []) == picked("rso", []) == picked("majority", []) == []


@pytest.mark.parametrize(("k", "expected"), [(1, [1]), (3, [1, 3, 2]), (9, [1, 3, 2, 0, 4])])
def test_topk(k: int, expected: list[int]) -> None:
    assert picked("topk", VALUES, RuleOptions(k=k)) == expected


@pytest.mark.parametrize(("bar", "expected"), [(2.0, [1, 3, 2]), (3.5, []), (-5.0, [1, 3, 2, 0, 4])])
def test_threshold(bar: float, expected: list[int]) -> None:
    assert picked("threshold", VALUES, RuleOptions(threshold=bar)) == expected


def test_raft_takes_the_best_fraction_of_everything() -> None:
    assert raft_bar([5.0, 1.0, 4.0, 2.0, 3.0, 0.0, -1.0, -2.0, -3.0, -4.0], 0.3) == 3.0
    assert raft_bar([5.0, 1.0], 0.2) == 5.0 and raft_bar([7.0, 7.0, 7.0], 0.4) == 7.0
    assert raft_bar([float(n) for n in range(10)], 0.7) == 3.0  # 0.7 * 10 is 7.000000000000001
    assert raft_bar([], 0.5) == math.inf
    assert picked("raft", VALUES, RuleOptions(bar=2.5)) == [1, 3]


def test_rso_accepts_with_the_papers_probabilities() -> None:
    """Two candidates, k = 1, exp(-1/beta) = 1/4: whichever comes first in a round decides. The better one first
    (half of the rounds): it is taken. The other first: taken with 1/4, else the better one. P(other) = 1/8."""
    options = RuleOptions(k=1, beta=1 / math.log(4))
    draws = Counter(RULES["rso"](candidates([1.0, 0.0]), options, Random(n))[0].index for n in range(8000))
    assert draws[1] / 8000 == pytest.approx(1 / 8, abs=4 * math.sqrt(7 / 64 / 8000))


def test_rso_lies_between_the_best_and_any() -> None:
    assert picked("rso", VALUES, RuleOptions(k=3, beta=1e-9))[:2] in ([1, 3], [3, 1])
    assert sorted(picked("rso", VALUES, RuleOptions(k=9, beta=0.1))) == [0, 1, 2, 3, 4]  # exhausted, not stuck
    anything = RuleOptions(k=3, beta=1e12)
    orders = Counter(
        tuple(c.index for c in RULES["rso"](candidates([9.0, 0.0, -9.0]), anything, Random(n))) for n in range(3000)
    )
    assert set(orders) == set(permutations(range(3)))
    assert all(abs(count / 3000 - 1 / 6) < 4 * math.sqrt(5 / 36 / 3000) for count in orders.values())
    assert picked("rso", VALUES, anything) == picked("rso", VALUES, anything)


def test_uncertainty_is_a_lower_bound() -> None:
    assert uncertainty([1.0, 3.0], 0.5) == 1.5 and uncertainty([1.0, 3.0], 2.0) == 0.0  # mean 2, deviation 1
    assert uncertainty([0.1], 7.0) == 0.1 and uncertainty([2.0, 2.0, 2.0], 9.0) == 2.0


@pytest.mark.parametrize(
    ("answers", "values", "expected"),
    [
        ("abab", [1.0, 5.0, 2.0, 4.0], 2),  # a tie: the answer that came first, and its best response
        ("abb", [9.0, 1.0, 2.0], 2),
        ("cab", [1.0, 2.0, 3.0], 0),
        ("abb", [None, None, None], 1),  # nobody has scored: the first of the winners
    ],
)
def test_majority(answers: str, values: list[float | None], expected: int) -> None:
    assert picked("majority", values, answers=answers) == [expected]


def test_weighted_votes_are_sums() -> None:
    score, sigmoid = RuleOptions(vote_weight="score"), RuleOptions(vote_weight="sigmoid")
    assert picked("weighted", [0.9, 0.5, 0.5], score, answers="abb") == [1]  # 0.9 against 1.0
    assert picked("weighted", [0.9, 0.4, 0.4], score, answers="abb") == [0]
    assert picked("weighted", [2.0, -1.0, -1.0], sigmoid, answers="abb") == [0]  # 0.88 against 0.54
    assert picked("weighted", [0.0, -0.5, -0.5], sigmoid, answers="abb") == [1]  # 0.5 against 0.76
    with pytest.raises(InvalidInput, match="--vote-weight sigmoid"):
        picked("weighted", [0.5, -0.1], score, answers="ab")


@pytest.mark.parametrize("rule", ["best", "topk", "threshold", "raft", "uncertainty", "majority", "weighted"])
def test_the_order_of_the_candidates_does_not_matter(rule: str) -> None:
    choose: Callable[..., list[Candidate]] = RULES[rule]
    given, options = candidates(list(VALUES), "ababb"), RuleOptions(k=2, threshold=2.0, bar=2.0)
    found = [[c.index for c in choose(order, options, Random(0))] for order in permutations(given)]
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"beta": 0.0}, {"fraction": 0.0}, {"fraction": 1.1}, {"beta": math.nan}])
def test_numbers_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="beta above 0"):
        RuleOptions(**wrong)  # type: ignore[arg-type]
