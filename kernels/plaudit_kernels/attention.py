"""Attention over a packed batch whose segments may share a prefix.

Each query row r of a segment attends, in a causal model, to the rows of its prefix and to its own segment up
to itself; in a bidirectional model to all rows of its segment. Grouped-query heads are folded into taller
query tiles instead of repeating keys and values.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from .blocks import BlockPlan
from .launch import autocast
from .plan import AttentionPlan
from .tiles import TileClass, TilePlan


def packed_attention(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention output (T, H, D) in the dtype of the query; under autocast in its dtype, as of torch's attention.

    query (T, H, D); key, value (T, K, D) with H a multiple of K; fp32 or bf16; plan on the same device.
    Differentiable: a shared prefix accumulates the gradients of every segment that reads it.
    The plan says which implementation runs: a TilePlan torch's; a SegmentPlan the fused CPU kernel, without gradients;
    a BlockPlan the Triton kernels (fp16 too; strides of rows and heads multiples of 8). `softcap` bounds the logits by
    softcap * tanh(logits / softcap), as Gemma 2 does.
    """
    query_THD, key_TKD, value_TKD = autocast(query_THD, key_TKD, value_TKD)
    if isinstance(plan, BlockPlan):
        from .attention_backward import attend  # needs triton, which the torch path does not
        from .varlen import attend_unshared

        if softcap is None and (out := attend_unshared(query_THD, key_TKD, value_TKD, plan, scale)) is not None:
            return out
        return attend(query_THD, key_TKD, value_TKD, plan, scale, softcap)
    if not isinstance(plan, TilePlan):
        from .cpu_attention import attend_segments  # needs numba, which the torch path does not

        return attend_segments(query_THD, key_TKD, value_TKD, plan, scale, softcap)
    tokens, heads, width = query_THD.shape
    outputs = [_tile_class(query_THD, key_TKD, value_TKD, tiles, scale, softcap) for tiles in plan.classes]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.index_select(0, plan.output_rows).view(tokens, heads, width)


def _tile_class(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    tiles: TileClass,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Outputs (n * Q, H * D) of the tiles of one shape."""
    n, rows = tiles.query_rows.shape
    columns = tiles.key_rows.shape[1]
    _, heads, width = query_THD.shape
    kv_heads = key_TKD.shape[1]
    fold = heads // kv_heads
    query = query_THD.index_select(0, tiles.query_rows.reshape(-1)).view(n, rows, kv_heads, fold, width)
    query = query.permute(0, 2, 3, 1, 4).reshape(n, kv_heads, fold * rows, width)
    key_rows = tiles.key_rows.reshape(-1)
    key = key_TKD.index_select(0, key_rows).view(n, columns, kv_heads, width).transpose(1, 2)
    value = value_TKD.index_select(0, key_rows).view(n, columns, kv_heads, width).transpose(1, 2)
    mask = tiles.mask if tiles.mask.shape[-2] == 1 else torch.cat([tiles.mask] * fold, -2)
    if softcap is None:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)  # (n, K, fold * rows, D)
    else:
        logits = softcap * torch.tanh((query @ key.transpose(-1, -2)).float() * (scale / softcap))
        out = logits.masked_fill(~mask, float("-inf")).softmax(-1).to(value.dtype) @ value
    out = out.view(n, kv_heads, fold, rows, width).permute(0, 3, 1, 2, 4)
    return out.reshape(n * rows, heads * width)


def reference_attention(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    segments: list[tuple[int, int, int, int]],
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The same, written as its definition: one dense softmax a segment. (T, H, D). The truth of the tests."""
    fold = query_THD.shape[1] // key_TKD.shape[1]
    key, value = key_TKD.repeat_interleave(fold, 1), value_TKD.repeat_interleave(fold, 1)
    outputs = []
    for start, length, prefix_start, prefix_length in segments:
        rows = torch.cat(
            [torch.arange(prefix_start, prefix_start + prefix_length), torch.arange(start, start + length)]
        ).to(query_THD.device)
        logits = torch.einsum("qhd,khd->hqk", query_THD[start : start + length], key[rows]) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        positions = torch.arange(prefix_length + length, device=rows.device)
        ahead = positions[prefix_length:, None] - positions  # of a query before its key
        seen = ahead >= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
        if window is not None:
            seen &= ahead < window if causal else ahead.abs() <= window // 2
        logits = logits.masked_fill(~seen, float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), value[rows]))
    return torch.cat(outputs)
