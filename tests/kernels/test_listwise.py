"""The Plackett-Luce kernel against its definition: short and long groups, scores far apart, shared responses."""

from __future__ import annotations

import pytest
import torch

from plaudit_kernels.listwise import CHUNK, TritonPlackettLuce, plackett_luce

from .agreement import agree, random

GROUPS = [[2], [1, 0, 3], [CHUNK - 1, CHUNK, CHUNK + 1], [3 * CHUNK + 5, 2], []]


def ranking(sizes: list[int], scores: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(sizes))
    rows = [torch.randperm(scores, generator=generator)[:size] for size in sizes]
    return torch.cat([*rows, torch.zeros(0, dtype=torch.int64)]), torch.tensor([0, *sizes]).cumsum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("sizes", GROUPS)
def test_plackett_luce(sizes: list[int], spread: float, dtype: torch.dtype, device: torch.device) -> None:
    rows, offsets = ranking(sizes, 200)
    agree(
        lambda scores: TritonPlackettLuce.apply(scores, rows.to(device), offsets.to(device)),
        lambda scores: plackett_luce(scores, rows, offsets),
        [spread * random(200)],
        dtype,
        device,
    )


@pytest.mark.parametrize("sizes", GROUPS)
def test_torch_is_the_definition(sizes: list[int]) -> None:
    scores = random(200).requires_grad_()
    rows, offsets = ranking(sizes, 200)
    expected = [
        sum((scores[group[i:]].logsumexp(0) - scores[group[i]] for i in range(len(group))), 0 * scores[0])
        for group in rows.split(sizes)
    ]
    losses = plackett_luce(scores, rows, offsets)
    assert torch.allclose(losses, torch.stack([*expected, 0 * scores[0]])[:-1])
    ours, truth = (torch.autograd.grad(part, scores) for part in (losses.sum(), sum(expected, 0 * scores[0])))
    assert torch.allclose(ours[0], truth[0])


def test_a_pair_is_bradley_terry() -> None:
    loss = plackett_luce(torch.tensor([0.5, 2.0]), torch.tensor([1, 0]), torch.tensor([0, 2]))
    assert torch.allclose(loss, torch.nn.functional.softplus(torch.tensor([-1.5])))
