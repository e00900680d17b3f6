"""The last decoder layer, for the rows that are pooled and no others.

Of the last layer only the pooled tokens' output is read. Their keys and values come from all rows; queries,
attention output and feed-forward are computed for the pooled rows alone: the same arithmetic on fewer rows.
"""

from __future__ import annotations

from typing import Any

import torch

from plaudit_kernels import TilePlan, packed_attention


def pooled_layer(
    layer: Any,
    hidden_TD: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    plan: TilePlan,
    rows: torch.Tensor,
    distinct: int,
) -> torch.Tensor:
    """Output (R, d) of a Llama- or Qwen3-shaped decoder layer at `rows` (R,) int64 of its input (T, d).

    rotary: cos and sin (T, D) of every row; `plan` needs the tiles of `rows` only. The first `distinct` rows differ;
    the others, which round R up, repeat them.
    """
    attention = layer.self_attn
    normed_TD = layer.input_layernorm(hidden_TD)
    normed_RD = normed_TD.index_select(0, rows)
    cos, sin = rotary
    query = _rotate(_heads(attention, "q", normed_RD), cos.index_select(0, rows), sin.index_select(0, rows))
    key = _rotate(_heads(attention, "k", normed_TD), cos, sin)
    value = _heads(attention, "v", normed_TD)
    # The tiles expect a query on every row; those that nobody reads stay 0.
    # Each row is written once: a repeated one would get its gradient more than once.
    queries = query.new_zeros(len(hidden_TD), *query.shape[1:]).index_copy(0, rows[:distinct], query[:distinct])
    mixed = packed_attention(queries, key, value, plan, scale=attention.scaling).index_select(0, rows)
    hidden_RD = hidden_TD.index_select(0, rows) + attention.o_proj(mixed.flatten(1))
    output: torch.Tensor = hidden_RD + layer.mlp(layer.post_attention_layernorm(hidden_RD))
    return output


def _heads(attention: Any, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """Queries, keys or values (rows, heads, D), normalised where the architecture does (Qwen3)."""
    projected = getattr(attention, f"{name}_proj")(hidden).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    heads: torch.Tensor = projected if norm is None else norm(projected)
    return heads


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al., 2104.09864) of (rows, heads, D), halves paired as in Llama."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return heads * cos[:, None] + turned * sin[:, None]
