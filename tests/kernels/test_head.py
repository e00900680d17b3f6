"""The pooled head: the fused kernel and the trained composition against their definition in fp64."""

from __future__ import annotations

import pytest
import torch

from plaudit_kernels import head, norm
from plaudit_kernels.head import fused_head, pooled_head

from .agreement import agree, poisoned, random

EPS = 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("normed", "unit_offset"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("count", "attributes", "width"), [(1, 1, 64), (33, 3, 200), (5, 19, 123), (77, 2, 1023)])
def test_fused_head(
    count: int, attributes: int, width: int, normed: bool, unit_offset: bool, dtype: torch.dtype, device: torch.device
) -> None:
    hidden = random(90, width + 8)[:, :width].to(device, dtype)
    rows = torch.randint(0, 90, (count,), generator=torch.Generator().manual_seed(3)).to(device)
    weight = random(attributes, width, seed=1).float().to(device)
    bias = random(attributes, seed=2).float().to(device) if attributes > 1 else None
    factor = random(width, seed=4).to(device, dtype) if normed else None
    with poisoned():
        ours = fused_head(hidden, rows, weight, bias, factor, EPS, unit_offset)
    assert ours.dtype == torch.float32
    doubles = [None if part is None else part.double().cpu() for part in (hidden, weight, bias, factor)]
    truth = pooled_head(doubles[0], rows.cpu(), *doubles[1:3], norm_weight=doubles[3], eps=EPS, unit_offset=unit_offset)
    # fp32 throughout: a sum of `width` products of size 1, whatever the dtype of the trunk.
    assert float((ours.cpu() - truth).abs().max()) < 2e-6 * width**0.5 * float(truth.abs().max())
    with torch.no_grad():
        plain = pooled_head(
            hidden.cpu(), rows.cpu(), weight.cpu(), None if bias is None else bias.cpu(),
            norm_weight=None if factor is None else factor.cpu(), eps=EPS, unit_offset=unit_offset,
        )  # fmt: skip
    assert float((plain - truth).abs().max()) < 2e-6 * width**0.5 * float(truth.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_head_is_trained_through_the_fused_norm(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.tensor([4, 0, 4, 31])

    def head(*parts: torch.Tensor) -> torch.Tensor:
        hidden, weight, bias, factor = parts
        return pooled_head(hidden, rows.to(hidden.device), weight, bias, norm_weight=factor, eps=EPS)

    def fused(*parts: torch.Tensor) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(norm, "uses_triton", lambda _: True)
            return head(*parts)

    inputs = [random(32, 96), random(3, 96, seed=1), random(3, seed=2), random(96, seed=3)]
    agree(fused, head, inputs, dtype, device)


def test_a_score_does_not_know_its_neighbours(device: torch.device) -> None:
    hidden, weight, factor = random(70, 576).half().to(device), random(2, 576).float().to(device), random(576)
    rows = torch.arange(70, device=device)
    together = fused_head(hidden, rows, weight, None, factor.half().to(device), EPS, False)
    for some in ([69], [3, 3, 7]):
        alone = fused_head(hidden, rows[some], weight, None, factor.half().to(device), EPS, False)
        assert torch.equal(alone, together[some])


def test_rows_in_turns_have_the_bits_of_rows_of_their_own(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, factor = random(23, 200).half().to(device), random(3, 200).float().to(device), random(200)
    given = hidden, torch.arange(23, device=device).flip(0), weight, None, factor.half().to(device), EPS, False
    alone = fused_head(*given)
    for programs in (1, 4, 22):
        monkeypatch.setattr(head, "PROGRAMS", programs)
        with poisoned():
            assert torch.equal(fused_head(*given), alone)


def test_nothing_pooled(device: torch.device) -> None:
    hidden, none = torch.zeros(3, 8), torch.zeros(0, dtype=torch.int64)
    assert pooled_head(hidden, none, torch.ones(2, 8), None).shape == (0, 2)
    fused = fused_head(hidden.to(device), none.to(device), torch.ones(2, 8, device=device), None, None, EPS, False)
    assert fused.shape == (0, 2)
