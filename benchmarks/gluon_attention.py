"""A candidate for the forward pass of attention on sm_90 in Gluon, Triton's lower language. Measured nowhere yet; no
model and no server uses it.

Triton waits for the product query * key at once, so that in a program the matrix unit rests while softmax computes.
Here, as in FlashAttention-3 (Shah et al., 2407.08608), two products are under way during the softmax of a block: that
of the values of the block before and that of the keys of the block after. The compiler moves arithmetic across the
issue of a product and the wait for it, but not across the loop that waits for a tile of the copy engine: such a loop
lies after each issue, where it is over at once, and before each wait.

A program takes ROWS logical positions of GROUP query heads with the same keys: two heads halve what is read of keys and
values. Blocks of ROWS keys lie at fixed logical positions, and each is computed by the same operations, whether it is
a block of the prefix or of own rows: the bits of a row do not depend on what is shared. The copy engine brings all
but the block with keys of both; values behind the end of a sequence, a neighbour's, are replaced by zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from plaudit_kernels.attention_triton import LOG2_E, UNREAD, UNSPECIALISED, check, strides
from plaudit_kernels.blocks import TILE, BlockPlan
from plaudit_kernels.descriptors import heads_side_by_side

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # as Triton 3.6 calls it

ROWS = gl.constexpr(64)
MASKED = gl.constexpr(-1e30)
LOWEST = gl.constexpr(-1e20)


class Stages(NamedTuple):
    """Tiles of keys and of values that are in shared memory or on the way."""

    keys: int
    values: int


STAGES = {(2, False): Stages(3, 3), (2, True): Stages(3, 3), (1, False): Stages(3, 3), (1, True): Stages(2, 2)}
"""By the heads of a program and whether some prompt is shared, which takes room for one more tile of each. Programs of
one head are to fit twice on a processor, for heads of 128."""


@gluon.jit
def stored(tiles, dtype: gl.constexpr, STAGES: gl.constexpr, SHARED: gl.constexpr):
    """(descriptor, ring of tiles, their barriers): where keys or values come from and go to."""
    SPARE: gl.constexpr = 1 if SHARED else 0
    ring = gl.allocate_shared_memory(dtype, [STAGES + SPARE, ROWS, tiles.block_type.shape[1]], tiles.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(bars.index(stage), 1)
    return tiles, ring, bars


@gluon.jit
def announce(source, block, wanted, STAGES: gl.constexpr):
    """The barrier of a block's tile counts its bytes from now on."""
    tiles, _, bars = source
    mbarrier.expect(bars.index(block % STAGES), tiles.block_type.nbytes, pred=wanted)


@gluon.jit
def bring(source, block, wanted, segment, column, STAGES: gl.constexpr):
    """The copy engine begins to bring a block's tile. Of the block that has keys of the prefix and own ones it brings
    something else, which nobody reads."""
    tiles, ring, bars = source
    start, _, prefix_start, prefix = segment
    at = block * ROWS
    row = at + gl.where(at < prefix, prefix_start, start - prefix)
    slot = block % STAGES
    tma.async_copy_global_to_shared(tiles, [row, column], bars.index(slot), ring.index(slot), pred=wanted)


@gluon.jit
def landed(source, block, wanted, STAGES: gl.constexpr):
    _, _, bars = source
    mbarrier.wait(bars.index(block % STAGES), (block // STAGES) & 1, pred=wanted)


@gluon.jit
def place(source, block, straddling, STAGES: gl.constexpr, SHARED: gl.constexpr):
    """Where a block's tile lies; the straddling one in the last place, which the copy engine does not use."""
    _, ring, _ = source
    if SHARED:
        return ring.index(gl.where(block == straddling, STAGES, block % STAGES))
    else:
        return ring.index(block % STAGES)


@gluon.jit
def gathered(base, row_stride, block, segment, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """A block's keys or values row by row, 0 behind the end of the sequence."""
    start, total, prefix_start, prefix = segment
    keys = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    rows = keys + gl.where(keys < prefix, prefix_start, start - prefix)
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    pointers = base + (rows.to(gl.int64) * (row_stride * 8))[:, None] + columns[None, :]
    return gl.load(pointers, mask=(keys < total)[:, None], other=0.0)


@gluon.jit
def begin(keys, values, count, segment, column, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr):
    """As many blocks as there are stages are asked for."""
    for stage in gl.static_range(K_STAGES):
        announce(keys, stage, stage < count, K_STAGES)
    for stage in gl.static_range(V_STAGES):
        announce(values, stage, stage < count, V_STAGES)
    for stage in gl.static_range(K_STAGES):
        bring(keys, stage, stage < count, segment, column, K_STAGES)
    for stage in gl.static_range(V_STAGES):
        bring(values, stage, stage < count, segment, column, V_STAGES)


@gluon.jit
def clear(value, real, LAYOUT: gl.constexpr):
    """The rows of a tile of values from `real` on become 0."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    value.store(gl.where((rows < real)[:, None], value.load(LAYOUT), 0.0))
    hopper.fence_async_shared()
    barrier()


@gluon.jit
def unseen(QUERIES: gl.constexpr, WIDTH: gl.constexpr, S: gl.constexpr, OUT: gl.constexpr):
    """Running maximum, sum of weights and sum of values before the first key."""
    top = gl.full([QUERIES], LOWEST, gl.float32, gl.SliceLayout(1, S))
    return top, gl.zeros([QUERIES], gl.float32, gl.SliceLayout(1, S)), gl.zeros([QUERIES, WIDTH], gl.float32, OUT)


@gluon.jit
def softmax(x, top, weight, inner):
    """(weights of a block, what older sums are multiplied by, running maximum, running sum of the weights)."""
    peak = gl.maximum(top, gl.max(x, 1) * inner)
    share = gl.exp2(gl.fma(x, inner, -peak[:, None]))
    fade = gl.exp2(top - peak)
    return share, fade, peak, weight * fade + gl.sum(share, 1)


@gluon.jit
def seen(x, first, total, QUERIES: gl.constexpr, LAYOUT: gl.constexpr):
    """The products of the last block, with those masked that a query does not see."""
    positions = first + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, LAYOUT)) % ROWS
    keys = first + gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT))
    return gl.where((keys[None, :] <= positions[:, None]) & (keys < total)[None, :], x, MASKED)


@gluon.jit
def locate(segments, tiles, TILE: gl.constexpr):
    """The program's segment (start, total, prefix_start, prefix) and first position."""
    tile = gl.program_id(0) // (TILE // ROWS)
    first = gl.load(tiles + 2 * tile + 1) * TILE + gl.program_id(0) % (TILE // ROWS) * ROWS
    fields = segments + 4 * gl.load(tiles + 2 * tile).to(gl.int64)
    start, length, prefix_start, prefix = (
        gl.load(fields), gl.load(fields + 1), gl.load(fields + 2), gl.load(fields + 3),
    )  # fmt: skip
    return (start, prefix + length, prefix_start, prefix), first


@gluon.jit
def queries(head, first, segment, QUERIES: gl.constexpr, WIDTH: gl.constexpr, FLAT: gl.constexpr):
    """(rows of the batch, heads and columns that a program's tile of queries has, which of them exist)."""
    start, total, _, prefix = segment
    lines = gl.arange(0, QUERIES, layout=gl.SliceLayout(1, FLAT))
    at = first + lines % ROWS
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, FLAT))
    return (start - prefix + at).to(gl.int64), head + lines // ROWS, columns, (at >= prefix) & (at < total)


@gluon.jit
def walk(
    query, x, top, weight, sums, keys, values, count, segment, column, straddling, inner,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, SHARED: gl.constexpr, QUERIES: gl.constexpr,
    S: gl.constexpr, OUT: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """All blocks but the last, whose softmax it computes too. With a block's products x waited for, the loop has under
    way those of the values before and of the keys after, both drained at its end: ptxas knows of none across it."""
    DTYPE: gl.constexpr = query.dtype
    nothing = gl.zeros([QUERIES, ROWS], gl.float32, S)
    landed(keys, 1, True, K_STAGES)
    key = place(keys, 1, straddling, K_STAGES, SHARED)
    ahead = hopper.warpgroup_mma(query, key.permute((1, 0)), nothing, use_acc=False, is_async=True)
    landed(keys, 1, True, K_STAGES)
    barrier()
    announce(keys, K_STAGES, count > K_STAGES, K_STAGES)
    bring(keys, K_STAGES, count > K_STAGES, segment, column, K_STAGES)
    share, fade, top, weight = softmax(x, top, weight, inner)
    parts = gl.convert_layout(share.to(DTYPE), P)
    landed(values, 0, True, V_STAGES)
    landed(keys, 2, count > 2, K_STAGES)
    x = hopper.warpgroup_mma_wait(0, deps=[ahead])
    for block in range(1, count - 1):
        value = place(values, block - 1, straddling, V_STAGES, SHARED)
        mixed = hopper.warpgroup_mma(parts, value, sums, is_async=True)
        key = place(keys, block + 1, straddling, K_STAGES, SHARED)
        ahead = hopper.warpgroup_mma(query, key.permute((1, 0)), nothing, use_acc=False, is_async=True)
        landed(keys, block + 1, True, K_STAGES)  # it has: what follows is not to move before the products
        barrier()  # every warp is done with the keys of this block and the values of the one before the last
        k_next, v_next = block + K_STAGES, block - 2 + V_STAGES
        more = (block > 1) & (v_next < count)
        announce(keys, k_next, k_next < count, K_STAGES)
        announce(values, v_next, more, V_STAGES)
        bring(keys, k_next, k_next < count, segment, column, K_STAGES)
        bring(values, v_next, more, segment, column, V_STAGES)
        share, fade, top, weight = softmax(x, top, weight, inner)
        landed(values, block, True, V_STAGES)
        sums, share = hopper.warpgroup_mma_wait(1, deps=[mixed, share])
        sums = sums * gl.convert_layout(fade, gl.SliceLayout(1, OUT))[:, None]
        parts = gl.convert_layout(share.to(DTYPE), P)
        landed(keys, block + 2, block + 2 < count, K_STAGES)
        x = hopper.warpgroup_mma_wait(0, deps=[ahead])
    value = place(values, count - 2, straddling, V_STAGES, SHARED)
    mixed = hopper.warpgroup_mma(parts, value, sums, is_async=True)
    landed(values, count - 2, True, V_STAGES)
    if V_STAGES < 3:  # the loop brings values two blocks late, so that of two stages the last is left
        barrier()
        announce(values, count - 1, count > 2, V_STAGES)
        bring(values, count - 1, count > 2, segment, column, V_STAGES)
    share, fade, top, weight = softmax(seen(x, (count - 1) * ROWS, segment[1], QUERIES, S), top, weight, inner)
    landed(values, count - 1, True, V_STAGES)
    sums, share = hopper.warpgroup_mma_wait(0, deps=[mixed, share])
    return share, fade, top, weight, sums


@gluon.jit(do_not_specialize=UNSPECIALISED)
def _forward(
    q, k, v, k_tiles, v_tiles, out, lse, segments, tiles, inner,
    q_row, q_head, k_row, k_head, v_row, v_head, o_row, o_head, tokens,
    SHARED: gl.constexpr, FOLD: gl.constexpr, GROUP: gl.constexpr, TILE: gl.constexpr, WIDTH: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """One program. Arguments are those of `attention_triton._forward`."""
    QUERIES: gl.constexpr = ROWS * GROUP
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * GROUP, 1], [16, 64, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * GROUP, 1], [16, WIDTH, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4 * GROUP, 1], [1, 0])
    DTYPE: gl.constexpr = q.dtype.element_ty
    segment, first = locate(segments, tiles, TILE)
    start, total, _, prefix = segment
    if (first >= total) | (first + ROWS <= prefix):
        return
    count = first // ROWS + 1
    head = gl.program_id(1).to(gl.int64) * GROUP
    column = gl.program_id(1) * GROUP // FOLD * WIDTH
    keys = stored(k_tiles, DTYPE, K_STAGES, SHARED)
    values = stored(v_tiles, DTYPE, V_STAGES, SHARED)
    hopper.fence_async_shared()
    barrier()
    begin(keys, values, count, segment, column, K_STAGES, V_STAGES)
    rows, heads, columns, own = queries(head, first, segment, QUERIES, WIDTH, FLAT)
    places = (heads * (q_head * 8) + rows * (q_row * 8))[:, None] + columns[None, :]
    query = gl.convert_layout(gl.load(q + places, mask=own[:, None], other=0.0), gl.DotOperandLayout(0, S, 2))
    straddling = -1
    if SHARED:
        straddling = gl.where(prefix % ROWS != 0, prefix // ROWS, -1)
        if straddling >= 0:
            at = head // FOLD * 8
            keys[1].index(K_STAGES).store(gathered(k + at * k_head, k_row, straddling, segment, WIDTH, FLAT))
            values[1].index(V_STAGES).store(gathered(v + at * v_head, v_row, straddling, segment, WIDTH, FLAT))
            hopper.fence_async_shared()
        barrier()
    top, weight, sums = unseen(QUERIES, WIDTH, S, OUT)
    landed(keys, 0, True, K_STAGES)
    key = place(keys, 0, straddling, K_STAGES, SHARED).permute((1, 0))
    x = hopper.warpgroup_mma(query, key, gl.zeros([QUERIES, ROWS], gl.float32, S), use_acc=False)
    if count > 1:
        share, fade, top, weight, sums = walk(
            query, x, top, weight, sums, keys, values, count, segment, column, straddling, inner,
            K_STAGES, V_STAGES, SHARED, QUERIES, S, OUT, P,
        )  # fmt: skip
    else:
        share, fade, top, weight = softmax(seen(x, first, total, QUERIES, S), top, weight, inner)
        landed(values, 0, True, V_STAGES)
    sums = sums * gl.convert_layout(fade, gl.SliceLayout(1, OUT))[:, None]
    value = place(values, count - 1, straddling, V_STAGES, SHARED)
    if first + ROWS > total:
        clear(value, total - first, FLAT)
    sums = hopper.warpgroup_mma(gl.convert_layout(share.to(DTYPE), P), value, sums)
    barrier()  # the layout of the output is changed through shared memory that a slower warp may still read
    result = (sums / gl.convert_layout(weight, gl.SliceLayout(1, OUT))[:, None]).to(DTYPE)  # every query sees key 0
    places = (heads * (o_head * 8) + rows * (o_row * 8))[:, None] + columns[None, :]
    gl.store(out + places, gl.convert_layout(result, FLAT), mask=own[:, None])
    rows, heads, _, own = queries(head, first, segment, QUERIES, WIDTH, S)
    gl.store(lse + heads * tokens + rows, top + gl.log2(weight), mask=own)


def forward(
    query_THD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, plan: BlockPlan, scale: float, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (T, H, D) and base-2 log-denominators (H, T) fp32, as `attention_triton.forward` gives them, `group` (1 or
    2) query heads a program. Raises ValueError for what it does not take."""
    k_tiles, v_tiles = described(query_THD, key_TKD, value_TKD, plan, group)
    tokens, heads, width = query_THD.shape
    out = query_THD.new_empty((tokens, heads, width))
    lse = query_THD.new_empty((heads, tokens), dtype=torch.float32)
    if not plan.whole:
        out.zero_()
        lse.fill_(UNREAD.value)
    _forward[(len(plan.tiles) * (TILE // ROWS.value), heads // group)](
        query_THD, key_TKD, value_TKD, k_tiles, v_tiles, out, lse, plan.segments, plan.tiles, scale * LOG2_E,
        *strides(query_THD), *strides(key_TKD), *strides(value_TKD), *strides(out), tokens,
        **constants(width, heads // key_TKD.shape[1], group, plan.unshared is None),
        num_warps=4 * group, enable_fp_fusion=False,
    )  # fmt: skip
    return out, lse


def described(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: BlockPlan, group: int
) -> tuple[Any, Any]:
    """Descriptors of tiles of keys and of values. Raises ValueError for what the kernel does not take."""
    check(query, key, value, plan)
    width, fold = query.shape[2], query.shape[1] // key.shape[1]
    if width not in (64, 128) or query.element_size() != 2 or not plan.causal or plan.window:
        raise ValueError("plain causal attention of heads of 64 or 128 in 16 bits alone")
    if group not in (1, 2) or fold % group:
        raise ValueError(f"{group} heads a program, where {fold} read the same keys")
    flat = [heads_side_by_side(tensor) for tensor in (key, value)]
    if flat[0] is None or flat[1] is None:
        raise ValueError("the heads of a row have gaps between them")
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    box = [ROWS.value, width]
    key_tiles, value_tiles = (TensorDescriptor(m, list(m.shape), list(m.stride()), box, layout) for m in flat)
    return key_tiles, value_tiles


def constants(width: int, fold: int, group: int, shared: bool) -> dict[str, Any]:
    stages = STAGES[group, shared]
    return {
        "SHARED": shared, "FOLD": fold, "GROUP": group, "TILE": TILE, "WIDTH": width,
        "K_STAGES": stages.keys, "V_STAGES": stages.values,
    }  # fmt: skip
