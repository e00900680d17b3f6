"""QK-norm and RoPE: the kernel against torch, torch against transformers' functions."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from plaudit_kernels.rotary import TritonRotary, rotary

from .agreement import agree, random

EPS = 1e-6
CASES = [  # tokens, query heads, key heads, head size, rotary dimensions
    (1, 2, 1, 64, 64),
    (33, 3, 1, 128, 128),
    (65, 2, 2, 96, 96),
    (123, 1, 1, 80, 32),
    (17, 9, 1, 80, 80),
    (35, 4, 5, 20, 6),
]


def angles(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.arange(tokens)[:, None] * 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    both = torch.cat([half, half], dim=-1)
    return both.cos() * 1.1, both.sin() * 1.1


def heads(tokens: int, query_heads: int, key_heads: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a fused QKV."""
    fused = random(tokens, query_heads + 2 * key_heads, width)
    return fused[:, :query_heads], fused[:, query_heads : query_heads + key_heads]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("normed", "unit_offset"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rotary(
    case: tuple[int, int, int, int, int], normed: bool, unit_offset: bool, dtype: torch.dtype, device: torch.device
) -> None:
    tokens, query_heads, key_heads, width, rotated = case
    cos, sin = angles(tokens, rotated)

    def fused(query: torch.Tensor, key: torch.Tensor, *norms: torch.Tensor | None) -> object:
        turn = (cos.to(device, dtype), sin.to(device, dtype))
        return TritonRotary.apply(query, key, *turn, *norms, EPS, unit_offset)

    def reference(query: torch.Tensor, key: torch.Tensor, *norms: torch.Tensor | None) -> object:
        turn = (cos.to(query), sin.to(query))
        return rotary(query, key, *turn, query_norm=norms[0], key_norm=norms[1], eps=EPS, unit_offset=unit_offset)

    norms = [random(width, seed=1), random(width, seed=2)] if normed else [None, None]
    agree(fused, reference, [*heads(tokens, query_heads, key_heads, width), *norms], dtype, device)


@pytest.mark.usefixtures("torch_operations")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_torch_gives_the_bits_of_transformers(normed: bool, gradients: bool, dtype: torch.dtype) -> None:
    query, key = (part.to(dtype) for part in heads(41, 4, 2, 64))
    cos, sin = (part.to(dtype) for part in angles(41, 64))
    layers = [LlamaRMSNorm(64, EPS).to(dtype), LlamaRMSNorm(64, EPS).to(dtype)]
    for seed, layer in enumerate(layers):
        layer.weight.data.copy_(random(64, seed=seed))
    norms = dict(zip(("query_norm", "key_norm"), (layer.weight for layer in layers), strict=True)) if normed else {}
    given = [layer(part) if normed else part for layer, part in zip(layers, (query, key), strict=True)]
    expected = apply_rotary_pos_emb(*(part.transpose(0, 1)[None] for part in given), cos[None], sin[None])
    kept = query.clone()
    with torch.set_grad_enabled(gradients):
        turned = rotary(query, key, cos, sin, eps=EPS, **norms)
    for ours, theirs in zip(turned, expected, strict=True):
        assert torch.equal(ours, theirs[0].transpose(0, 1))
    assert not gradients or torch.equal(query, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gradients", [False, True])
def test_wide_angles_round_once(dtype: torch.dtype, gradients: bool) -> None:
    query, key = (part.to(dtype) for part in heads(9, 2, 1, 32))
    cos, sin = (part.float() for part in angles(9, 16))
    wide, _ = rotary(query.float(), key.float(), cos, sin)
    with torch.set_grad_enabled(gradients):
        narrow, _ = rotary(query, key, cos, sin)
    assert narrow.dtype == dtype
    assert torch.equal(narrow, wide.to(dtype))


def test_a_head_does_not_know_its_neighbours(device: torch.device) -> None:
    query, key = (part.half().to(device) for part in heads(77, 3, 1, 64))
    cos, sin = (part.half().to(device) for part in angles(77, 64))
    norms = (random(64).half().to(device), random(64, seed=1).half().to(device))
    together = TritonRotary.apply(query, key, cos, sin, *norms, EPS, False)
    rows = [76, 3]
    alone = TritonRotary.apply(query[rows], key[rows], cos[rows], sin[rows], *norms, EPS, False)
    assert all(torch.equal(one, all_[rows]) for one, all_ in zip(alone, together, strict=True))


def test_narrow_angles_do_not_round_wide_heads(device: torch.device) -> None:
    query, key = (part.float() for part in heads(9, 2, 1, 32))
    cos, sin = (part.half() for part in angles(9, 16))
    expected = rotary(query, key, cos, sin)
    turned = TritonRotary.apply(*(part.to(device) for part in (query, key, cos, sin)), None, None, EPS, False)
    for ours, theirs in zip(turned, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=1e-6)


def test_heads_of_an_odd_size_are_refused() -> None:
    odd, turn = torch.zeros(2, 1, 9), torch.ones(2, 4)
    with pytest.raises(ValueError, match="even"):
        rotary(odd, odd, turn, turn)


def test_one_norm_of_two_is_refused() -> None:
    query, key = heads(2, 1, 1, 8)
    with pytest.raises(ValueError, match="neither"):
        rotary(query, key, *angles(2, 8), query_norm=torch.ones(8))
