"""The Plackett-Luce kernel against its definition: short and long groups, scores far apart, shared responses."""

from __future__ import annotations

import pytest
import torch

from plaudit_kernels.listwise import TILE, TritonPlackettLuce, _tile, plackett_luce

from .agreement import agree, random

GROUPS = [[2], [1, 0, 3], [63, 64, 65], [3 * TILE + 5, 2, TILE + 1, TILE], [4, 130, 0, *range(1, 40)], [0, 0], []]
SCORES = 800


@pytest.mark.parametrize("sizes", GROUPS)
def test_a_tile_is_full_of_groups_of_the_mean_size(sizes: list[int]) -> None:
    groups, chunk = _tile(sum(sizes), len(sizes))
    assert groups * chunk == TILE and chunk >= 16
    assert chunk == TILE or sum(sizes) <= chunk * max(1, len(sizes))


def ranking(sizes: list[int], scores: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(sizes))
    rows = [torch.randperm(scores, generator=generator)[:size] for size in sizes]
    return torch.cat([*rows, torch.zeros(0, dtype=torch.int64)]), torch.tensor([0, *sizes]).cumsum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 12.0, 30.0])
@pytest.mark.parametrize("sizes", GROUPS)
def test_plackett_luce(sizes: list[int], spread: float, dtype: torch.dtype, device: torch.device) -> None:
    rows, offsets = ranking(sizes, SCORES)
    agree(
        lambda scores: TritonPlackettLuce.apply(scores, rows.to(device), offsets.to(device)),
        lambda scores: plackett_luce(scores, rows, offsets),
        [spread * random(SCORES)],
        dtype,
        device,
    )


@pytest.mark.parametrize("sizes", GROUPS)
def test_torch_is_the_definition(sizes: list[int]) -> None:
    scores = random(SCORES).requires_grad_()
    rows, offsets = ranking(sizes, SCORES)
    expected = [
        sum((scores[group[i:]].logsumexp(0) - scores[group[i]] for i in range(len(group))), 0 * scores[0])
        for group in rows.split(sizes)
    ]
    losses = plackett_luce(scores, rows, offsets)
    assert torch.allclose(losses, torch.stack([*expected, 0 * scores[0]])[:-1])
    ours, truth = (torch.autograd.grad(part, scores) for part in (losses.sum(), sum(expected, 0 * scores[0])))
    assert torch.allclose(ours[0], truth[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("-inf"), float("inf"), float("nan")])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 3, 1], [1, 0, 2, 3]])
def test_a_score_that_is_no_number_shows_and_ends(bad: float, order: list[int], device: torch.device) -> None:
    scores = torch.tensor([1.0, bad, 0.5, 2.0], device=device, requires_grad=True)
    ranked, ends = (torch.tensor(values, device=device) for values in (order, [0, 4]))
    loss = TritonPlackettLuce.apply(scores, ranked, ends)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert not (loss.isfinite().all() and gradient.isfinite().all())


def test_a_pair_is_bradley_terry() -> None:
    loss = plackett_luce(torch.tensor([0.5, 2.0]), torch.tensor([1, 0]), torch.tensor([0, 2]))
    assert torch.allclose(loss, torch.nn.functional.softplus(torch.tensor([-1.5])))


def test_a_group_without_a_loss_says_so_and_no_other(device: torch.device) -> None:
    scores = random(6).float().to(device)
    rows, offsets = torch.arange(6, device=device), torch.tensor([0, 2, 5, 6], device=device)
    expected = TritonPlackettLuce.apply(scores, rows, offsets)
    scores[3] = torch.nan
    losses = TritonPlackettLuce.apply(scores, rows, offsets)
    assert losses[1].isnan() and torch.equal(losses[::2], expected[::2])
