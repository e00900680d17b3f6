"""Metrics against other people's implementations and closed forms; intervals by what they must contain."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from plaudit_training import metrics
from plaudit_training.metrics import BINS, Floats, Judged


def judged(
    delta: Floats, share: Floats | None = None, decided: object = None, clusters: object = None, lengths: object = None
) -> Judged:
    n = len(delta)
    longer = np.zeros(n, dtype=np.int64) if lengths is None else np.asarray(lengths)
    names = np.arange(n)[:, None] if clusters is None else np.asarray(clusters)
    return Judged(
        np.asarray(delta, dtype=np.float64), np.zeros(n), np.ones(n) if share is None else share,
        np.ones(n, dtype=np.bool_) if decided is None else np.asarray(decided, dtype=np.bool_), longer,
        np.zeros(n, dtype=np.int64), names,
    )  # fmt: skip


def values(data: Judged, temperature: float = 1.0) -> dict[str, float | None]:
    return {k: e.value for k, e in metrics.evaluate(data, temperature=temperature, bootstrap=0).items()}


def normal(n: int, mean: float = 0.5, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(mean, 1.0, n)


def test_equal_scores_are_wrong_and_counted() -> None:
    found = values(judged(np.array([1.0, 2.0, 0.0, -1.0])))
    assert (found["accuracy"], found["tie_rate"], found["margin"]) == (0.5, 0.25, 0.5)


def test_a_comparison_without_winner_counts_for_nll_and_not_for_accuracy() -> None:
    share, decided = np.array([1.0, 0.5]), [True, False]
    estimates = metrics.evaluate(judged(np.array([3.0, -5.0]), share, decided), bootstrap=0)
    assert estimates["accuracy"].value == 1.0 and estimates["accuracy"].n == 1
    assert estimates["nll"].n == 2 and estimates["brier"].n == 2 and estimates["ece"].n == 1
    assert estimates["nll"].value == pytest.approx((np.log1p(np.exp(-3)) + 0.5 * (np.log1p(np.exp(-5)) * 2 + 5)) / 2)


def test_nll_and_brier_are_those_of_scikit_learn() -> None:
    delta = normal(500)
    mirrored = np.where(np.arange(500) % 2, delta, -delta)
    wins = np.arange(500) % 2
    found = values(judged(delta), temperature=0.7)
    probability = 1 / (1 + np.exp(-mirrored / 0.7))
    assert found["nll"] == pytest.approx(log_loss(wins, probability), rel=1e-9)
    assert found["brier"] == pytest.approx(brier_score_loss(wins, probability), rel=1e-9)


def test_accuracy_splits_by_which_response_is_longer() -> None:
    found = metrics.evaluate(judged(np.array([1.0, -1.0, 1.0, 1.0]), lengths=[5, 5, -5, 0]), bootstrap=0)
    assert found["accuracy_chosen_longer"].value == 0.5 and found["accuracy_chosen_longer"].n == 2
    assert found["accuracy_rejected_longer"].value == 1.0 and found["accuracy_rejected_longer"].n == 1


def test_what_has_no_comparisons_is_not_computable() -> None:
    found = metrics.evaluate(judged(np.array([1.0]), np.array([0.5]), [False]), bootstrap=10)
    for name in ("accuracy", "ece", "accuracy_chosen_longer", "margin", "tie_rate"):
        assert (found[name].value, found[name].low, found[name].n) == (None, None, 0), name


def ece_by_hand(delta: Floats, temperature: float) -> float:
    """The definition: sort by confidence, cut into 15 parts, compare each part's mean with its accuracy."""
    confidence = 1 / (1 + np.exp(-np.abs(delta) / temperature))
    order = np.argsort(confidence, kind="stable")
    bins = [order[[i * BINS // len(order) == b for i in range(len(order))]] for b in range(BINS)]
    gaps = [abs(confidence[b].mean() - (delta[b] > 0).mean()) * len(b) for b in bins if len(b)]
    return float(sum(gaps) / len(order))


@pytest.mark.parametrize("n", [4, 15, 47, 1000])
def test_ece_is_the_mean_gap_of_equal_mass_bins(n: int) -> None:
    delta = normal(n)
    assert values(judged(delta), 0.8)["ece"] == pytest.approx(ece_by_hand(delta, 0.8), rel=1e-9)


def calibrated(n: int, temperature: float, seed: int = 1) -> Floats:
    """Score differences that are right as often as sigmoid(delta / temperature) says."""
    draw = np.random.default_rng(seed)
    size = np.abs(draw.normal(0, 3, n))
    return np.where(draw.random(n) < 1 / (1 + np.exp(-size / temperature)), size, -size)


def test_a_calibrated_model_has_no_calibration_error_at_its_temperature() -> None:
    delta = calibrated(40_000, 2.5)
    right, wrong = values(judged(delta), 2.5)["ece"], values(judged(delta), 1.0)["ece"]
    assert right is not None and wrong is not None and right < 0.015 and wrong > 0.05


def held(n: int, temperature: float, truth: float) -> tuple[int, int]:
    """In how many of 100 samples the interval of ece holds its own value, and what ece is of all there could be."""
    value = true = 0
    for seed in range(100):
        found = metrics.evaluate(judged(calibrated(n, 1.0, seed)), temperature=temperature, bootstrap=200)["ece"]
        assert found.value is not None and found.low is not None and found.high is not None
        value += found.low <= found.value <= found.high
        true += found.low <= truth <= found.high
    return value, true


@pytest.mark.parametrize(("n", "least"), [(200, 80), (1000, 88)])
def test_the_interval_of_a_calibrated_model_holds_its_ece_and_zero(n: int, least: int) -> None:
    value, true = held(n, 1.0, truth=0.0)
    assert value == 100 and least <= true < 100, "as often as it says, and not always"


@pytest.mark.parametrize("temperature", [0.5, pytest.param(2.0, marks=pytest.mark.soak)])
def test_the_interval_holds_the_ece_of_a_model_that_is_not_calibrated(temperature: float) -> None:
    truth = values(judged(calibrated(400_000, 1.0)), temperature)["ece"]
    assert truth is not None and truth > 0.04
    value, true = held(1000, temperature, truth)
    assert value == 100 and true >= 90


def test_the_interval_of_ece_narrows_where_the_gaps_are_clear() -> None:
    estimate = metrics.evaluate(judged(calibrated(20_000, 1.0)), temperature=0.2, bootstrap=300)["ece"]
    assert estimate.value is not None and estimate.low is not None and estimate.high is not None
    accuracy = metrics.evaluate(judged(calibrated(20_000, 1.0)), bootstrap=300)["accuracy"]
    assert accuracy.low is not None and accuracy.high is not None
    assert estimate.high - estimate.low < 1.5 * (accuracy.high - accuracy.low)


def test_copies_in_one_cluster_do_not_narrow_the_interval_of_ece() -> None:
    alone = metrics.evaluate(judged(calibrated(600, 1.0)), bootstrap=300)["ece"]
    copies = judged(np.repeat(calibrated(600, 1.0), 5), clusters=np.repeat(np.arange(600), 5)[:, None])
    copied = metrics.evaluate(copies, bootstrap=300)["ece"]
    assert alone.low is not None and copied.low is not None and alone.high is not None and copied.high is not None
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.15)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_is_found(temperature: float) -> None:
    delta = calibrated(40_000, temperature)
    assert metrics.fit_temperature(delta, np.ones(len(delta))) == pytest.approx(temperature, rel=0.05)


def test_the_temperature_is_where_the_cross_entropy_is_least() -> None:
    delta, share = normal(300), np.random.default_rng(3).uniform(0.4, 1, 300)
    best = metrics.fit_temperature(delta, share)
    assert best is not None
    losses = [metrics.cross_entropy(delta / t, share).mean() for t in (best * 0.99, best, best * 1.01)]
    assert losses[1] == min(losses)


@pytest.mark.parametrize("delta", [[1.0, 2.0], [-1.0, -2.0], [0.0, 0.0]])
def test_no_temperature_where_there_is_no_minimum(delta: list[float]) -> None:
    assert metrics.fit_temperature(np.array(delta), np.ones(len(delta))) is None


def test_intervals_are_the_same_for_a_seed_and_contain_the_value() -> None:
    data = judged(normal(200))
    one, two, other = (metrics.evaluate(data, bootstrap=200, seed=seed) for seed in (5, 5, 6))
    assert one == two and one != other
    for name in ("accuracy", "nll", "brier", "margin", "ece"):
        estimate = one[name]
        assert estimate.low is not None and estimate.high is not None and estimate.value is not None
        assert estimate.low < estimate.value < estimate.high


def test_the_interval_of_independent_rows_is_that_of_the_binomial() -> None:
    estimate = metrics.evaluate(judged(normal(2000)), bootstrap=1000)["accuracy"]
    assert estimate.value is not None and estimate.low is not None and estimate.high is not None
    half = 1.96 * (estimate.value * (1 - estimate.value) / 2000) ** 0.5
    assert estimate.high - estimate.low == pytest.approx(2 * half, rel=0.1)


def test_copies_in_one_cluster_do_not_narrow_the_interval() -> None:
    delta = normal(100)
    alone = metrics.evaluate(judged(delta), bootstrap=400)["accuracy"]
    copies = judged(np.repeat(delta, 20), clusters=np.repeat(np.arange(100), 20)[:, None])
    copied = metrics.evaluate(copies, bootstrap=400)["accuracy"]
    assert alone.low is not None and copied.low is not None and alone.high is not None and copied.high is not None
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.15)


def test_a_pair_of_clusters_widens_the_interval() -> None:
    pairs = np.array([(i, j) for i in range(30) for j in range(i)])
    worth = normal(30, seed=4)
    delta = np.abs(worth[pairs[:, 0]] - worth[pairs[:, 1]]) - 0.5 * np.abs(worth[pairs[:, 0]])
    rows, arguments = (metrics.evaluate(judged(delta, clusters=c), bootstrap=300)["accuracy"] for c in (None, pairs))
    assert rows.low is not None and arguments.low is not None and rows.high is not None and arguments.high is not None
    assert arguments.high - arguments.low > 1.5 * (rows.high - rows.low)


def test_a_perfect_score_still_has_an_interval() -> None:
    estimate = metrics.evaluate(judged(np.ones(20)), bootstrap=100)["accuracy"]
    assert estimate.value == estimate.high == 1.0
    assert estimate.low == pytest.approx(0.8389, abs=1e-4), "Wilson's, 20 of 20"


def test_one_cluster_has_no_interval() -> None:
    estimate = metrics.evaluate(judged(normal(9), clusters=np.zeros((9, 1), dtype=np.int64)), bootstrap=50)["accuracy"]
    assert estimate.low is None and estimate.high is None and estimate.value is not None


def test_the_interval_of_a_rate_of_0_or_1_holds_it() -> None:
    for n in range(1, 400):
        assert metrics.wilson(0, n)[0] == 0.0 and metrics.wilson(n, n)[1] == 1.0
