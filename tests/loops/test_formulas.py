"""Each formula against a second, slow implementation of its paper, in plain float64 Python."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plaudit_loops import advantages, losses, shaping
from plaudit_loops.kl import kl_estimate, next_kl_coefficient
from plaudit_loops.masked import explained_variance, masked_mean, whiten

CLOSE = {"rtol": 0, "atol": 1e-6}
LENGTHS = [3, 5, 1, 4, 2, 5, 0, 4]
ROWS, WIDTH, GROUP = len(LENGTHS), 5, 4


def noise(seed: int) -> Tensor:
    return torch.randn((ROWS, WIDTH), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.arange(WIDTH)[None] < torch.tensor(LENGTHS)[:, None]
SCORES = noise(1)[:, 0] * 3
VALID = torch.tensor([True, True, False, True, True, True, True, True])


def lists(x: Tensor) -> list[list[float]]:
    """The ragged rows of a padded tensor."""
    return [row[:n] for row, n in zip(x.tolist(), LENGTHS, strict=True)]


def flat(rows: list[list[float]]) -> list[float]:
    return [x for row in rows for x in row]


def padded(rows: list[list[float]]) -> Tensor:
    return torch.tensor([row + [0.0] * (WIDTH - len(row)) for row in rows], dtype=torch.float64)


def whitened(rows: list[list[float]]) -> list[list[float]]:
    every = flat(rows)
    mean = sum(every) / len(every)
    std = math.sqrt(sum((x - mean) ** 2 for x in every) / len(every) + 1e-8)
    return [[(x - mean) / std for x in row] for row in rows]


def rewards_with_penalty(penalty: list[list[float]]) -> list[list[float]]:
    rows = [[-p for p in row] for row in penalty]
    for row, score in zip(rows, SCORES.tolist(), strict=True):
        if row:
            row[-1] += score
    return rows


def groups() -> list[list[int]]:
    return [[i for i in range(start, start + GROUP) if VALID[i]] for start in range(0, ROWS, GROUP)]


def test_a_score_comes_with_the_last_token_and_the_penalty_with_each() -> None:
    found = advantages.token_rewards(SCORES, noise(2), MASK)
    torch.testing.assert_close(found, padded(rewards_with_penalty(lists(noise(2)))), **CLOSE)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.5, 0.0)])
def test_gae_is_the_sum_over_all_later_errors(gamma: float, lam: float) -> None:
    rewards, values = lists(noise(3)), lists(noise(4))
    expected = []
    for r, v in zip(rewards, values, strict=True):
        following = [*v[1:], 0.0]
        delta = [r[t] + gamma * following[t] - v[t] for t in range(len(r))]
        expected.append([sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(r))) for t in range(len(r))])
    found, returns = advantages.gae(noise(3), noise(4), MASK, gamma=gamma, lam=lam)
    torch.testing.assert_close(found, padded(expected), **CLOSE)
    sums = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(expected, values, strict=True)]
    torch.testing.assert_close(returns, padded(sums), **CLOSE)


def test_whitened_numbers_have_mean_0_and_variance_1() -> None:
    found = whiten(noise(5) * 7 + 3, MASK)
    assert abs(float(masked_mean(found, MASK))) < 1e-9
    assert float(masked_mean(found**2, MASK)) == pytest.approx(1, abs=1e-6)
    assert not found[~MASK].any()
    torch.testing.assert_close(found, padded(whitened(lists(noise(5) * 7 + 3))), **CLOSE)
    scaled = whiten(noise(5) * 7 + 3, MASK, shift_mean=False)
    assert float(masked_mean(scaled, MASK)) == pytest.approx(float(masked_mean(noise(5) * 7 + 3, MASK)))


def test_what_lies_outside_the_mask_does_not_matter() -> None:
    poisoned = torch.where(MASK, noise(5), float("nan"))
    torch.testing.assert_close(whiten(poisoned, MASK), whiten(noise(5), MASK))


@pytest.mark.parametrize("scale", [True, False])
def test_grpo_compares_within_the_group(scale: bool) -> None:
    expected = [0.0] * ROWS
    for members in groups():
        r = [float(SCORES[i]) for i in members]
        mean = sum(r) / len(r)
        std = math.sqrt(sum((x - mean) ** 2 for x in r) / (len(r) - 1))
        for i, x in zip(members, r, strict=True):
            expected[i] = (x - mean) / (std + 1e-4) if scale else x - mean
    found = advantages.grpo(SCORES, VALID, GROUP, scale=scale)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **CLOSE)


def test_rloo_leaves_one_out() -> None:
    expected = [0.0] * ROWS
    for members in groups():
        for i in members:
            others = [float(SCORES[j]) for j in members if j != i]
            expected[i] = float(SCORES[i]) - sum(others) / len(others)
    found = advantages.rloo(SCORES, VALID, GROUP)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **CLOSE)


def test_a_response_without_a_score_or_without_company_gets_no_advantage() -> None:
    alone = torch.tensor([True, False, False, False] + [True] * 4)
    for found in (advantages.grpo(SCORES, alone, GROUP, scale=True), advantages.rloo(SCORES, alone, GROUP)):
        assert not found[:4].any() and found[4:].all()
    poisoned = torch.where(VALID, SCORES, float("nan"))
    torch.testing.assert_close(advantages.rloo(poisoned, VALID, GROUP), advantages.rloo(SCORES, VALID, GROUP))


def test_reinforce_plus_plus_is_the_whitened_reward_to_come() -> None:
    rewards = lists(noise(6))
    sums = [[sum(0.9 ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))] for row in rewards]
    found = advantages.reinforce_plus_plus(noise(6), MASK, gamma=0.9)
    torch.testing.assert_close(found, padded(whitened(sums)), **CLOSE)


@pytest.mark.parametrize("dual", [None, 3.0])
def test_the_clipped_policy_loss(dual: float | None) -> None:
    ratios, a = lists(noise(7).exp() * 1.5), lists(noise(8))
    expected = []
    for rho_row, a_row in zip(ratios, a, strict=True):
        row = []
        for rho, x in zip(rho_row, a_row, strict=True):
            loss = max(-x * rho, -x * min(max(rho, 0.9), 1.3))
            row.append(min(loss, -x * dual) if dual and x < 0 else loss)
        expected.append(row)
    log_ratio = torch.log(noise(7).exp() * 1.5)
    found = losses.clipped_policy_loss(log_ratio, noise(8), clip_low=0.1, clip_high=0.3, dual_clip=dual)
    torch.testing.assert_close(torch.where(MASK, found, 0.0), padded(expected), **CLOSE)
    part = losses.clip_fraction(log_ratio, noise(8), clip_low=0.1, clip_high=0.3)
    outside = [[float((rho > 1.3 and x > 0) or (rho < 0.9 and x < 0)) for rho, x in zip(r, y, strict=True)]
               for r, y in zip(ratios, a, strict=True)]  # fmt: skip
    torch.testing.assert_close(torch.where(MASK, part, 0.0), padded(outside), **CLOSE)


def test_the_clipped_value_loss() -> None:
    expected = [
        [0.5 * max((v - r) ** 2, (min(max(v, o - 0.2), o + 0.2) - r) ** 2) for v, o, r in zip(*rows, strict=True)]
        for rows in zip(lists(noise(9)), lists(noise(10)), lists(noise(11)), strict=True)
    ]
    found = losses.clipped_value_loss(noise(9), noise(10), noise(11), clip=0.2)
    torch.testing.assert_close(torch.where(MASK, found, 0.0), padded(expected), **CLOSE)


def test_aggregation_and_that_parts_add_up() -> None:
    rows = lists(noise(12))
    filled = [row for row in rows if row]
    means = {
        "token": sum(flat(rows)) / len(flat(rows)),
        "sequence": sum(sum(row) / len(row) for row in filled) / len(filled),
        "constant": sum(flat(rows)) / (len(filled) * 9),
    }
    for how, expected in means.items():
        total = len(flat(rows)) if how == "token" else len(filled)
        options: dict[str, Any] = {"total": total, "length": 9}
        whole = losses.aggregate(noise(12), MASK, how, **options)  # type: ignore[arg-type]
        parts = [losses.aggregate(noise(12)[s], MASK[s], how, **options) for s in (slice(0, 3), slice(3, 8))]  # type: ignore[arg-type]
        assert float(whole) == pytest.approx(expected, abs=1e-9) == float(sum(parts))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo(smoothing: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = (noise(seed)[:, 0] for seed in range(13, 17))
    expected = []
    for c, r, rc, rr in zip(*(x.tolist() for x in (chosen, rejected, ref_chosen, ref_rejected)), strict=True):
        p = 1 / (1 + math.exp(-0.3 * ((c - rc) - (r - rr))))
        expected.append(-(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p))
    found = losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3, label_smoothing=smoothing)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **CLOSE)


def test_kl_estimators_agree_in_the_mean_and_differ_in_the_sample() -> None:
    logits, ref_logits = torch.tensor([0.3, -1.0, 2.0]).double(), torch.tensor([0.0, 0.5, 0.2]).double()
    p, logp, logr = logits.softmax(0), logits.log_softmax(0), ref_logits.log_softmax(0)
    exact = float((p * (logp - logr)).sum())
    assert float((p * kl_estimate(logp, logr, "k1")).sum()) == pytest.approx(exact)
    assert float((p * kl_estimate(logp, logr, "k3")).sum()) == pytest.approx(exact)
    d = (logp - logr).tolist()
    torch.testing.assert_close(kl_estimate(logp, logr, "k2"), torch.tensor([x * x / 2 for x in d], dtype=torch.float64))
    torch.testing.assert_close(
        kl_estimate(logp, logr, "k3"), torch.tensor([math.exp(-x) - 1 + x for x in d], dtype=torch.float64)
    )
    assert torch.isfinite(kl_estimate(torch.tensor([0.0]), torch.tensor([900.0]), "k3")).all()


def test_only_k2_has_the_gradient_of_the_kl_when_differentiated_through() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    logr = torch.tensor([0.0, 0.5, 0.2], dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    exact = torch.autograd.grad((logp.exp() * (logp - logr)).sum(), logits, retain_graph=True)[0]
    weights = logp.exp().detach()
    by = {
        kind: torch.autograd.grad((weights * kl_estimate(logp, logr, kind)).sum(), logits, retain_graph=True)[0]
        for kind in ("k1", "k2", "k3")
    }
    torch.testing.assert_close(by["k2"], exact)
    assert not by["k1"].abs().max() > 1e-9 and (by["k3"] - exact).abs().max() > 0.01


def test_the_controller_moves_towards_the_target_and_never_by_more_than_a_fifth() -> None:
    options = {"target": 6.0, "samples": 100, "horizon": 1000}
    assert next_kl_coefficient(0.1, 6.6, **options) == pytest.approx(0.1 * (1 + 0.1 * 0.1))  # type: ignore[arg-type]
    assert next_kl_coefficient(0.1, 60.0, **options) == pytest.approx(0.1 * 1.02)  # type: ignore[arg-type]
    assert next_kl_coefficient(0.1, 0.0, **options) == pytest.approx(0.1 * 0.98)  # type: ignore[arg-type]
    assert next_kl_coefficient(0.1, 0.0, target=6.0, samples=600, horizon=100) == pytest.approx(0.08), "never negative"


def test_explained_variance() -> None:
    returns = noise(17)
    assert float(explained_variance(returns, returns, MASK)) == pytest.approx(1)
    assert float(explained_variance(torch.full_like(returns, 3.0), returns, MASK)) == pytest.approx(0)
    assert math.isnan(float(explained_variance(returns, torch.ones_like(returns), MASK)))


def test_shaping_never_makes_a_number_of_none() -> None:
    scores = np.array([[1.0, 2.0, np.nan, 4.0], [3.0, 2.0, 1.0, 0.0], [2.0, 2.0, 1.0, 2.0]])
    found = shaping.combine(scores, 0.5)
    for column in (0, 1, 3):
        values = scores[:, column].tolist()
        mean = sum(values) / 3
        std = math.sqrt(sum((x - mean) ** 2 for x in values) / 2)
        assert found[column] == pytest.approx(mean - 0.5 * std)
    assert math.isnan(found[2])
    assert math.isnan(shaping.clip(found, 1.0)[2]) and shaping.clip(found, 1.0)[1] == 1.0
    assert math.isnan(shaping.without_end(found, np.array([False] * 4), 1.0)[2])
    np.testing.assert_array_equal(shaping.combine(scores[:1], 0.5), scores[0])
    np.testing.assert_array_equal(shaping.combine(scores, 0.0, worst=True), [1.0, 2.0, np.nan, 0.0])


def test_the_length_ramp() -> None:
    lengths = np.array([0, 60, 70, 80, 90, 100])
    assert shaping.length_ramp(lengths, 100, 40, 2.0).tolist() == [0, 0, 0.5, 1.0, 1.5, 2.0]
    assert not shaping.length_ramp(lengths, 100, 0, 2.0).any()


def test_permuting_the_batch_permutes_the_advantages() -> None:
    order = torch.tensor(random.Random(0).sample(range(ROWS), ROWS))
    found = advantages.reinforce_plus_plus(noise(6), MASK, gamma=1.0)
    torch.testing.assert_close(advantages.reinforce_plus_plus(noise(6)[order], MASK[order], gamma=1.0), found[order])
