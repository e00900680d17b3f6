"""The losses against closed forms and float64 references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid

from plaudit_training.loss import Pairs, preference_loss, smooth

scores = st.floats(-30, 30, allow_nan=False)
shares = st.floats(0, 1)


def loss_of(chosen: Tensor, rejected: Tensor, share: float = 1.0, margin: float = 0.0, centring: float = 0.0) -> Tensor:
    """Of one comparison."""
    rest = (torch.tensor([value], dtype=torch.float64) for value in (share, margin, 1.0))
    pairs = Pairs(torch.tensor([0]), torch.tensor([1]), *rest)
    return preference_loss(torch.stack([chosen, rejected]), pairs, center_rewards_coefficient=centring)


def wide(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@given(scores, scores, st.floats(0, 3))
def test_bradley_terry_is_minus_log_of_the_sigmoid(chosen: float, rejected: float, margin: float) -> None:
    loss = loss_of(wide(chosen), wide(rejected), margin=margin)
    probability = 1 / (1 + math.exp(-(chosen - rejected - margin)))
    assert loss.item() == pytest.approx(-math.log(probability), rel=1e-6, abs=1e-12)


def test_equal_scores_cost_log_two() -> None:
    assert loss_of(wide(3.0), wide(3.0)).item() == pytest.approx(math.log(2))


def test_a_difference_beyond_the_exponential_stays_finite() -> None:
    assert loss_of(torch.tensor(0.0), torch.tensor(1e4)).item() == 1e4


@given(scores, scores, shares, st.floats(0, 3))
def test_the_soft_label_is_a_mixture_of_the_two_hard_ones(
    first: float, second: float, share: float, margin: float
) -> None:
    z = wide(first - second - margin)
    hard = -share * logsigmoid(z) - (1 - share) * logsigmoid(-z)
    assert loss_of(wide(first), wide(second), share, margin).item() == pytest.approx(hard.item(), rel=1e-9, abs=1e-12)


@given(shares.filter(lambda share: 0.01 < share < 0.99))
def test_the_soft_label_is_least_where_the_model_says_the_share(share: float) -> None:
    delta = wide(math.log(share / (1 - share))).requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(delta, wide(0.0), share), delta)
    assert abs(slope.item()) < 1e-6


def test_smoothing_moves_a_label_towards_its_opposite() -> None:
    assert smooth(torch.tensor([1.0, 0.5, 0.0]), 0.1).tolist() == pytest.approx([0.9, 0.5, 0.1])


def test_centring_is_least_for_opposite_scores() -> None:
    for chosen, rejected, square in [(2.0, -2.0, 0.0), (2.0, 1.0, 9.0)]:
        added = loss_of(wide(chosen), wide(rejected), centring=1.0) - loss_of(wide(chosen), wide(rejected))
        assert added.item() == pytest.approx(square)


def test_half_precision_scores_are_widened_before_they_are_subtracted() -> None:
    loss = loss_of(*(torch.tensor(score, dtype=torch.bfloat16) for score in (8.0625, 8.0)))
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.0625))), rel=1e-6)


def random_pairs(generator: torch.Generator, count: int, dtype: torch.dtype) -> Pairs:
    rows = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(count)])
    share, margin, weight = (torch.rand(count, generator=generator, dtype=dtype) for _ in range(3))
    return Pairs(rows[:, 0], rows[:, 1], share, margin, weight)


def by_hand(scores_N: Tensor, pairs: Pairs, coefficient: float, smoothing: float) -> Tensor:
    """The definition, one comparison at a time."""
    total = scores_N.new_zeros(())
    for i in range(len(pairs.share)):
        chosen, rejected = scores_N[pairs.chosen[i]], scores_N[pairs.rejected[i]]
        share = pairs.share[i] * (1 - smoothing) + (1 - pairs.share[i]) * smoothing
        z = chosen - rejected - pairs.margin[i]
        loss = -share * logsigmoid(z) - (1 - share) * logsigmoid(-z) + coefficient * (chosen + rejected) ** 2
        total = total + pairs.weight[i] * loss
    return total


def test_the_loss_is_the_weighted_sum_of_its_parts_and_so_are_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = random_pairs(generator, 9, torch.float64)
    scores_N = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    ours = preference_loss(scores_N, pairs, center_rewards_coefficient=0.3, label_smoothing=0.2)
    theirs = by_hand(scores_N, pairs, 0.3, 0.2)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    (mine,) = torch.autograd.grad(ours, scores_N)
    (truth,) = torch.autograd.grad(theirs, scores_N)
    torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)


def test_gradients_agree_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = random_pairs(generator, 5, torch.float64)
    scores_N = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)

    def loss(scores: Tensor) -> Tensor:
        return preference_loss(scores, pairs, center_rewards_coefficient=0.01, label_smoothing=0.05)

    assert torch.autograd.gradcheck(loss, (scores_N,))


def test_fp32_stays_close_to_fp64() -> None:
    generator = torch.Generator().manual_seed(2)
    pairs = random_pairs(generator, 50, torch.float64)
    narrow = Pairs(pairs.chosen, pairs.rejected, pairs.share.float(), pairs.margin.float(), pairs.weight.float())
    scores_N = 10 * torch.randn(6, generator=generator, dtype=torch.float64)
    truth = preference_loss(scores_N, pairs, center_rewards_coefficient=0.01)
    assert preference_loss(scores_N.float(), narrow, center_rewards_coefficient=0.01).item() == pytest.approx(
        truth.item(), rel=1e-6
    )
