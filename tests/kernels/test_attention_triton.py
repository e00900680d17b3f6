"""The Triton attention against its definition, forward and backward, and the same bits whatever is shared."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plaudit_kernels import attention_backward, attention_triton
from plaudit_kernels.attention import packed_attention, reference_attention
from plaudit_kernels.blocks import TILE, BlockPlan, plan_blocks

from .batches import Segments, grouped, heads


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """torch fills what it allocates with NaN: a row that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def planned(segments: Segments, causal: bool = True, window: int | None = None) -> BlockPlan:
    return plan_blocks(np.array(segments), sum(s[1] for s in segments), causal=causal, window=window)


def attended(
    tensors: list[torch.Tensor], plan: BlockPlan, softcap: float | None = None, seed: int = 1
) -> list[torch.Tensor]:
    """Output and gradients of query, key and value, for random gradients of the output."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = packed_attention(*leaves, plan.to(leaves[0].device), scale=leaves[0].shape[-1] ** -0.5, softcap=softcap)
    out.backward(_weights(out, seed))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def output(tensors: list[torch.Tensor], plan: BlockPlan, softcap: float | None = None) -> torch.Tensor:
    with torch.no_grad():
        return packed_attention(
            *tensors, plan.to(tensors[0].device), scale=tensors[0].shape[-1] ** -0.5, softcap=softcap
        )


def defined(
    tensors: list[torch.Tensor],
    segments: Segments,
    causal: bool,
    window: int | None,
    softcap: float | None,
    seed: int = 1,
) -> list[torch.Tensor]:
    """The same by definition, in the dtype of the tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    scale = leaves[0].shape[-1] ** -0.5
    out = reference_attention(*leaves, segments, causal=causal, scale=scale, window=window, softcap=softcap)
    out.backward(_weights(out, seed))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _weights(out: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    """FlashAttention's rule: our error is at most twice that of torch in the same dtype; and, where torch happens to
    be exact, a few roundings of the fp32 sums over a head of values of about 1."""
    floor = 4 * torch.finfo(torch.float32).eps * truth[0].shape[-1] ** 0.5
    names = ("out", "dq", "dk", "dv")[: len(ours)]
    for name, our, their, true in zip(names, ours, theirs, truth, strict=True):
        error, allowed = (our.double() - true).abs().max(), (their.double() - true).abs().max()
        assert error <= 2 * allowed + floor, f"{name}: {error:.2e} where torch has {allowed:.2e}"


CHAIN = [(0, 20, 0, 0), (20, 30, 0, 20), (50, 9, 0, 50), (59, 11, 0, 30)]  # prefixes of several, and parts of, segments

CASES = {
    "one token": (grouped([(0, [1])]), 2, 2, 32, {}),
    "tile edges": (grouped([(0, [TILE - 1]), (0, [TILE]), (0, [TILE + 1])]), 1, 1, 32, {}),
    "shared": (grouped([(70, [3, 61]), (0, [123])]), 2, 1, 64, {}),
    "whole blocks, seen by all": (grouped([(70, [130, 61]), (0, [200])]), 2, 1, 64, {}),
    "parts of a segment": ([(0, 200, 0, 0), (200, 150, 0, 70), (350, 70, 90, 60)], 2, 1, 64, {}),
    "prefix of a whole tile": (grouped([(TILE, [1, 5])]), 4, 1, 80, {}),
    "responses of one token": (grouped([(33, [1] * 20)]), 1, 1, 32, {}),
    "chain": (CHAIN, 2, 1, 40, {}),
    "wide heads": (grouped([(20, [9, 40])]), 1, 1, 256, {}),
    "window of one": (grouped([(70, [3, 61])]), 2, 2, 32, {"window": 1}),
    "window": (grouped([(150, [3, 70]), (0, [5])]), 2, 1, 64, {"window": 40}),
    "wide window": (grouped([(33, [3, 61])]), 2, 1, 128, {"window": 4096}),
    "softcap": (grouped([(33, [3, 61])]), 2, 2, 128, {"softcap": 3.0}),
    "softcap and window": (grouped([(33, [3, 61])]), 2, 1, 32, {"softcap": 3.0, "window": 32}),
    "5 x 123": (grouped([(0, [123])] * 5), 1, 1, 64, {}),
    "bidirectional": (grouped([(0, [n]) for n in (5, 123, 1, 65)]), 2, 2, 64, {"causal": False}),
    "local": (grouped([(0, [n]) for n in (5, 199)]), 2, 2, 32, {"causal": False, "window": 16}),
    "local softcap": (grouped([(0, [n]) for n in (67, 5)]), 2, 1, 96, {"causal": False, "window": 65, "softcap": 3.0}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_its_definition(case: str, dtype: torch.dtype, device: torch.device) -> None:
    segments, query_heads, kv_heads, width, options = CASES[case]
    causal, window, softcap = options.get("causal", True), options.get("window"), options.get("softcap")
    tensors = [t.to(device, dtype) for t in heads(sum(s[1] for s in segments), query_heads, kv_heads, width)]
    truth = defined([t.double() for t in tensors], segments, causal, window, softcap)
    theirs = defined(tensors, segments, causal, window, softcap)
    assert_close(attended(tensors, planned(segments, causal, window), softcap), theirs, truth)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.soak)])
@pytest.mark.parametrize("case", ["shared", "softcap", "wide heads"])
def test_so_it_is_with_the_blocks_of_other_chips(
    case: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (attention_triton, attention_backward):
        monkeypatch.setattr(module, "table_of", lambda _: "default")
    test_attention_is_its_definition(case, dtype, device)


@pytest.mark.parametrize(
    ("dtype", "window", "softcap"),
    [(torch.float32, None, None), (torch.float16, None, None), (torch.float32, 40, None), (torch.float16, None, 5.0)],
)
def test_sharing_neighbours_and_order_change_no_bit(
    dtype: torch.dtype, window: int | None, softcap: float | None, device: torch.device
) -> None:
    segments = grouped([(45, [3, 70]), (0, [64]), (64, [1])])
    tensors = [t.to(device, dtype) for t in heads(247, 2, 1, 32)]
    together = output(tensors, planned(segments, window=window), softcap)
    sequences = []
    for start, length, prefix_start, prefix_length in reversed(segments):
        parts = torch.arange(prefix_start, prefix_start + prefix_length), torch.arange(start, start + length)
        sequences.append((torch.cat(parts), prefix_length))
    rows = torch.cat([sequence for sequence, _ in sequences])
    unshared = grouped([(0, [len(sequence)]) for sequence, _ in sequences])
    apart = output([t[rows] for t in tensors], planned(unshared, window=window), softcap)
    for (sequence, prefix), (start, length, _, _) in zip(sequences, unshared, strict=True):
        assert torch.equal(together[sequence[prefix:]], apart[start + prefix : start + length])
    longest = sequences[-3][0]
    alone = output([t[longest] for t in tensors], planned([(0, len(longest), 0, 0)], window=window), softcap)
    assert torch.equal(together[48:118], alone[45:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_depend_on_no_neighbour(dtype: torch.dtype, device: torch.device) -> None:
    segments = grouped([(0, [37]), (45, [3, 70])])
    tensors = [t.to(device, dtype) for t in heads(155, 2, 1, 32)]
    together = attended(tensors, planned(segments))
    assert all(torch.equal(*pair) for pair in zip(together, attended(tensors, planned(segments)), strict=True))
    first = attended([t[:37] for t in tensors], planned(segments[:1]))  # its random gradient is the batch's first rows
    assert all(torch.equal(a, b[:37]) for a, b in zip(first, together, strict=True))


def test_many_responses_of_one_token(device: torch.device) -> None:
    segments = grouped([(33, [1] * 300)])
    tensors = [t.to(device, torch.float16) for t in heads(333, 1, 1, 32)]
    truth = reference_attention(*(t.double() for t in tensors), segments, causal=True, scale=32**-0.5)
    theirs = reference_attention(*tensors, segments, causal=True, scale=32**-0.5)
    assert_close([output(tensors, planned(segments))], [theirs], [truth])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_slices_of_one_fused_projection_are_read_in_place(dtype: torch.dtype, device: torch.device) -> None:
    segments = grouped([(20, [3, 50])])
    fused = torch.randn(73, 2 + 2 + 2, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    slices = list(fused.split([2, 2, 2], dim=1))
    by_head = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in slices]  # (H, T, D) in memory
    expected = attended([t.contiguous() for t in slices], planned(segments))
    for strided in (slices, by_head):
        assert all(torch.equal(*pair) for pair in zip(attended(strided, planned(segments)), expected, strict=True))


def test_a_broadcast_gradient_is_taken(device: torch.device) -> None:
    tensors = [t.to(device).requires_grad_() for t in heads(9, 2, 2, 32)]
    packed_attention(*tensors, planned([(0, 9, 0, 0)]).to(device), scale=0.2).sum().backward()
    assert tensors[2].grad is not None
    torch.testing.assert_close(tensors[2].grad.sum(), torch.tensor(9.0 * 2 * 32, device=device))


@pytest.mark.parametrize("rows", [[132], [33, 34, 72, 132]])
def test_only_the_tiles_of_some_rows(rows: list[int], device: torch.device) -> None:
    segments = np.array(grouped([(30, [3, 40]), (0, [60])]))
    whole = plan_blocks(segments, 133, causal=True)
    some = plan_blocks(segments, 133, causal=True, only=np.array(rows))
    assert len(some.tiles) < len(whole.tiles)
    gradients = []
    for plan in (whole, some):
        leaves = [t.to(device).requires_grad_() for t in heads(133, 2, 1, 32)]
        packed_attention(*leaves, plan.to(device), scale=0.2)[rows].square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((9, 2, 32), (9, 2, 32), (9, 2, 16)), "do not fit"),
        (((9, 3, 32), (9, 2, 32), (9, 2, 32)), "do not fit"),
        (((8, 2, 32), (8, 2, 32), (8, 2, 32)), "plan is for 9"),
        (((9, 2, 36), (9, 2, 36), (9, 2, 36)), "head size 36"),
        (((9, 2, 264), (9, 2, 264), (9, 2, 264)), "head size 264"),
    ],
)
def test_shapes_that_the_kernels_do_not_take_are_refused(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed_attention(*map(torch.zeros, shapes), planned([(0, 9, 0, 0)]), scale=1.0)


def test_strides_and_dtypes_that_the_kernels_do_not_take_are_refused() -> None:
    plan, good = planned([(0, 9, 0, 0)]), torch.zeros(9, 2, 32)
    with pytest.raises(ValueError, match="strides"):
        packed_attention(good, good, torch.zeros(9, 32, 2).transpose(1, 2), plan, scale=1.0)
    with pytest.raises(ValueError, match="strides"):
        packed_attention(good, torch.zeros(9, 2, 33)[..., :32], good, plan, scale=1.0)
    with pytest.raises(ValueError, match="dtypes"):
        packed_attention(good, good.half(), good, plan, scale=1.0)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_a_plan_holds_every_row_once_and_every_reader(drawn: list[tuple[int, int, int]]) -> None:
    segments: Segments = []
    for length, low, high in drawn:
        row = sum(s[1] for s in segments)
        edges = sorted((row * low // 9, row * high // 9))
        segments.append((row, length, edges[0], edges[1] - edges[0]))
    plan = planned(segments)
    asked, kept = np.zeros(plan.tokens, dtype=int), np.zeros(plan.tokens, dtype=int)
    for number, tile in plan.tiles.tolist():
        start, length, _, prefix = segments[number]
        asked[max(start, start + tile * TILE - prefix) : min(start + length, start + (tile + 1) * TILE - prefix)] += 1
    for number, tile in plan.key_tiles.tolist():
        start, length, _, _ = segments[number]
        kept[start + tile * TILE : min(start + length, start + (tile + 1) * TILE)] += 1
    assert (asked == 1).all() and (kept == 1).all()
    offsets = plan.visitor_offsets.tolist()
    for number, (start, length, _, _) in enumerate(segments):
        readers = [r for r, (_, _, low, count) in enumerate(segments) if low < start + length and start < low + count]
        readers = [r for r in readers if segments[r][3]]
        assert plan.visitors[offsets[number] : offsets[number + 1]].tolist() == [number, *readers]
