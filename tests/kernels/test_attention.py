"""Packed attention against its definition: values, gradients, and the same bits whatever is shared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plaudit_kernels import BLOCK, packed_attention, plan_tiles, reference_attention

from .batches import Segments, grouped, heads


def packed(
    tensors: list[torch.Tensor],
    segments: Segments,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    plan = plan_tiles(np.array(segments), len(tensors[0]), causal=causal, window=window)
    return packed_attention(*tensors, plan, scale=tensors[0].shape[-1] ** -0.5, softcap=softcap)


AWKWARD = [
    [(0, [1])],
    [(0, [BLOCK - 1]), (0, [BLOCK]), (0, [BLOCK + 1])],
    [(BLOCK, [1])],
    [(BLOCK - 1, [1, 2, BLOCK, BLOCK + 1])],
    [(BLOCK + 1, [5] * 300)],
    [(7, [123]), (0, [5]), (41, [3, 80])],
]


@pytest.mark.parametrize("groups", AWKWARD)
@pytest.mark.parametrize(("query_heads", "kv_heads", "width"), [(4, 4, 32), (6, 2, 64)])
def test_causal_attention_is_its_definition(
    groups: list[tuple[int, list[int]]], query_heads: int, kv_heads: int, width: int
) -> None:
    segments = grouped(groups)
    tensors = heads(sum(s[1] for s in segments), query_heads, kv_heads, width)
    expected = reference_attention(*(t.double() for t in tensors), segments, causal=True, scale=width**-0.5)
    # A softmax-weighted sum of unit normals in fp32: rounding grows with the root of the keys, far below 1e-5.
    assert (packed(tensors, segments, True).double() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("lengths", [[1], [BLOCK, BLOCK + 1, 3], [5, 123, 64]])
def test_bidirectional_attention_is_its_definition(lengths: list[int]) -> None:
    segments = grouped([(0, [n]) for n in lengths])
    tensors = heads(sum(lengths), 4, 4, 32)
    expected = reference_attention(*(t.double() for t in tensors), segments, causal=False, scale=32**-0.5)
    assert (packed(tensors, segments, False).double() - expected).abs().max() < 1e-5


def test_gradients_of_a_shared_prefix_accumulate_over_its_responses() -> None:
    segments = grouped([(40, [3, 33, 20]), (0, [9])])
    tensors = [t.requires_grad_() for t in heads(sum(s[1] for s in segments), 4, 2, 16)]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    weight = torch.randn(packed(tensors, segments, True).shape, generator=torch.Generator().manual_seed(1))
    (packed(tensors, segments, True) * weight).sum().backward()
    (reference_attention(*doubles, segments, causal=True, scale=0.25) * weight.double()).sum().backward()
    for ours, truth in zip(tensors, doubles, strict=True):
        assert ours.grad is not None and truth.grad is not None
        assert (ours.grad.double() - truth.grad).abs().max() < 1e-4


@pytest.mark.parametrize(("window", "softcap"), [(1, None), (BLOCK, 3.0), (BLOCK + 2, None), (500, None), (None, 3.0)])
@pytest.mark.parametrize("causal", [True, False])
def test_window_and_softcap_are_their_definition(causal: bool, window: int | None, softcap: float | None) -> None:
    segments = grouped([(BLOCK + 9 if causal else 0, [3, 2 * BLOCK, 100]), (0, [123])])
    tensors = [t.requires_grad_() for t in heads(sum(s[1] for s in segments), 4, 2, 16)]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    out = packed(tensors, segments, causal, window, softcap)
    expected = reference_attention(*doubles, segments, causal=causal, scale=0.25, window=window, softcap=softcap)
    assert (out.double() - expected).abs().max() < 1e-5
    out.square().sum().backward()
    expected.square().sum().backward()
    for ours, truth in zip(tensors, doubles, strict=True):
        assert ours.grad is not None and truth.grad is not None
        assert (ours.grad.double() - truth.grad).abs().max() < 1e-4


def test_a_window_reads_no_block_that_it_does_not_see() -> None:
    plan = plan_tiles(np.array([(0, 40 * BLOCK, 0, 0)]), 40 * BLOCK, causal=True, window=BLOCK)
    assert [tuple(tiles.key_rows.shape) for tiles in plan.classes] == [(1, BLOCK), (39, 2 * BLOCK)]


@pytest.mark.parametrize("window", [1, 2, 5, 6])
def test_windows_are_those_of_transformers(window: int) -> None:
    from transformers import masking_utils

    def seen(causal: bool) -> torch.Tensor:
        """Which keys have weight: the values are the rows of the identity."""
        tensors = torch.zeros(12, 1, 12), torch.zeros(12, 1, 12), torch.eye(12)[:, None]
        return reference_attention(*tensors, [(0, 12, 0, 0)], causal=causal, scale=1.0, window=window)[:, 0] > 0

    sliding = masking_utils.sliding_window_causal_mask_function(window)
    local = masking_utils.sliding_window_bidirectional_mask_function(window // 2)  # what ModernBERT asks for
    q, k = torch.arange(12)[:, None], torch.arange(12)[None, :]
    assert torch.equal(seen(True), sliding(0, 0, q, k))
    assert torch.equal(seen(False), local(0, 0, q, k).expand(12, 12))


@settings(max_examples=40)
@given(
    prefix=st.integers(0, 3 * BLOCK),
    responses=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize(
    ("dtype", "window", "softcap"),
    [(torch.float32, None, None), (torch.bfloat16, None, None), (torch.bfloat16, 40, None), (torch.float32, 40, 5.0)],
)
def test_sharing_a_prefix_changes_no_bit(
    prefix: int, responses: list[int], seed: int, dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    shared = grouped([(prefix, responses)])
    tensors = [t.to(dtype) for t in heads(sum(s[1] for s in shared), 4, 2, 32, seed)]
    together = packed(tensors, shared, True, window, softcap)
    for start, length, prefix_start, prefix_length in shared[1 if prefix else 0 :]:
        rows = torch.cat(
            [torch.arange(prefix_start, prefix_start + prefix_length), torch.arange(start, start + length)]
        )
        alone = packed([t[rows] for t in tensors], [(0, len(rows), 0, 0)], True, window, softcap)
        assert torch.equal(together[start : start + length], alone[prefix_length:])


@pytest.mark.parametrize(
    ("segments", "causal"),
    [
        ([(0, 3, 0, 0), (4, 2, 0, 0)], True),  # a hole
        ([(0, 3, 0, 0), (2, 3, 0, 0)], True),  # an overlap
        ([(0, 5, 0, 0), (5, 0, 0, 0)], True),  # an empty segment
        ([(0, 2, 2, 3), (2, 3, 0, 0)], True),  # a prefix after its reader
        ([(0, 3, 0, 0), (3, 2, 0, 3)], False),  # a shared prefix in a bidirectional model
    ],
)
def test_segments_that_do_not_tile_the_batch_are_refused(segments: Segments, causal: bool) -> None:
    with pytest.raises(ValueError, match="segments|prefix"):
        plan_tiles(np.array(segments), 5, causal=causal)
