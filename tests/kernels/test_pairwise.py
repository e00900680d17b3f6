"""The Bradley-Terry kernel against its definition, far from zero too, and with responses in many comparisons."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid

from plaudit_kernels.pairwise import COMPARISONS, TritonBradleyTerry, bradley_terry

from .agreement import agree, poisoned, random

CASES = [(2, 1), (5, 123), (300, COMPARISONS), (31, COMPARISONS + 1), (4, 0)]


def comparisons(scores: int, count: int) -> list[torch.Tensor]:
    """Chosen, rejected, share, margin, weight, with exact ties and hard labels among the shares."""
    generator = torch.Generator().manual_seed(count)
    rows = [torch.randint(0, scores, (count,), generator=generator) for _ in range(2)]
    share = torch.rand(count, generator=generator)
    share[::3], share[1::3] = 1.0, 0.5
    return [*rows, share, torch.rand(count, generator=generator), torch.rand(count, generator=generator)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("centring", [0.0, 0.01])
@pytest.mark.parametrize("case", CASES)
def test_bradley_terry(case: tuple[int, int], centring: float, dtype: torch.dtype, device: torch.device) -> None:
    pairs = comparisons(*case)
    agree(
        lambda scores: TritonBradleyTerry.apply(scores, *(part.to(device) for part in pairs), centring),
        lambda scores: bradley_terry(scores, *pairs, centring=centring),
        [3 * random(case[0])],
        dtype,
        device,
    )


def test_torch_is_the_definition() -> None:
    scores, (chosen, rejected, share, margin, weight) = random(30), comparisons(30, 100)
    gap = scores[chosen] - scores[rejected] - margin
    loss = -share * logsigmoid(gap) - (1 - share) * logsigmoid(-gap) + 0.1 * (scores[chosen] + scores[rejected]) ** 2
    ours = bradley_terry(scores, chosen, rejected, share, margin, weight, centring=0.1)
    assert torch.allclose(ours, weight * loss, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("gap", [-200.0, -20.0, 0.0, 20.0, 200.0])
def test_certain_comparisons(gap: float, device: torch.device) -> None:
    scores = torch.tensor([gap, 0.0], device=device, requires_grad=True)
    rows, ones = torch.tensor([0, 1], device=device), torch.ones(1, device=device)
    with poisoned():
        loss = TritonBradleyTerry.apply(scores, rows[:1], rows[1:], ones, 0 * ones, ones, 0.0)
        (gradient,) = torch.autograd.grad(loss.sum(), scores)
    truth = torch.nn.functional.softplus(torch.tensor(-gap, dtype=torch.float64))
    torch.testing.assert_close(loss.cpu().double(), truth[None], rtol=1e-5, atol=1e-38)
    slope = -torch.sigmoid(torch.tensor(-gap, dtype=torch.float64))
    torch.testing.assert_close(gradient.cpu().double(), torch.stack([slope, -slope]), rtol=1e-5, atol=1e-7)
