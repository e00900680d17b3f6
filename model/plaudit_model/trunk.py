"""From a packed batch to one hidden state a sequence.

`PackedTrunk` runs transformers' own modules over one token axis (1, T) with our attention plugged in through
its `AttentionInterface`: no padding, a shared prompt once. It is used for the families in `FAMILIES`, where it
is proven against the plain model at load. Every other architecture runs through `PaddedTrunk`, its own forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AttentionInterface

from plaudit_kernels import BLOCK, TilePlan, packed_attention, plan_tiles

from .heads import is_known, last_hidden_state
from .last_layer import pooled_layer
from .packing import PackedBatch

ATTENTION = "plaudit_packed"

_STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})


@dataclass(frozen=True)
class Family:
    """What the packed trunk needs to know of an architecture."""

    causal: bool


FAMILIES = {
    "llama": Family(causal=True),
    "qwen3": Family(causal=True),
    "bert": Family(causal=False),
}


class Trunk(Protocol):
    """Hidden states (N, d) at the pooled token of each sequence of a batch, in the batch's order; or, if
    `gives_scores`, the attributes (N, A) fp32 themselves."""

    shares_prompt: bool
    gives_scores: bool
    reason: str

    def __call__(self, batch: PackedBatch) -> torch.Tensor: ...


class PackedTrunk:
    """No padding. In exact mode the token axis is rounded up to whole blocks of rows, which belong to a
    segment of their own: matrix products choose another kernel for very few rows, and with it other bits."""

    gives_scores = False

    def __init__(self, module: nn.Module, family: Family, *, exact: bool) -> None:
        self._module = module
        self._family = family
        self._exact = exact
        self.shares_prompt = family.causal
        self.reason = "packed: transformers' modules with our attention"
        module.set_attn_implementation(ATTENTION)  # type: ignore[operator]

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        device = next(self._module.parameters()).device
        rows = with_padding_segment(batch) if self._exact else batch
        plan = plan_tiles(rows.segments, rows.tokens, causal=self._family.causal).to(device)
        inputs = {"input_ids": _row(rows.input_ids, device), "position_ids": _row(rows.position_ids, device)}
        if self._family.causal:
            return self._decode(inputs, plan, rows, device)
        inputs["token_type_ids"] = _row(rows.type_ids, device)
        hidden = last_hidden_state(self._module, plan=plan, **inputs)[0]
        return hidden.index_select(0, torch.from_numpy(rows.pool_first).to(device))

    def _decode(
        self, inputs: dict[str, torch.Tensor], plan: TilePlan, rows: PackedBatch, device: torch.device
    ) -> torch.Tensor:
        """All layers but the last over all rows, the last over the pooled ones, rounded up to whole blocks."""
        base: Any = self._module.base_model
        *body, last = base.layers
        hidden = base.embed_tokens(inputs["input_ids"])
        rotary = base.rotary_emb(hidden, inputs["position_ids"])
        for layer in body:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, plan=plan)
        count = len(rows.pool_last)
        pool = torch.from_numpy(np.resize(rows.pool_last, _whole(count)) if self._exact else rows.pool_last)
        pooled_plan = plan_tiles(rows.segments, rows.tokens, causal=True, only=rows.pool_last).to(device)
        cos, sin = rotary
        pooled = pooled_layer(last, hidden[0], (cos[0], sin[0]), pooled_plan, pool.to(device), count)
        output: torch.Tensor = base.norm(pooled)[:count]
        return output


class PaddedTrunk:
    """The architecture's own forward over right-padded rows; in exact mode one sequence at a time, so that
    its shape, and with it every bit, depends on the sequence alone. A head that is not known to us is left to the
    architecture too."""

    shares_prompt = False

    def __init__(self, module: nn.Module, *, causal: bool, exact: bool, reason: str) -> None:
        self._module = module
        self._causal = causal
        self._exact = exact
        self.gives_scores = not is_known(module)
        self._types = int(getattr(module.config, "type_vocab_size", 0) or 0) > 1
        self.reason = f"padded: {reason}"

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        sequences = unpack(batch)
        if self._exact:
            return torch.cat([self._forward([sequence]) for sequence in sequences])
        return self._forward(sequences)

    def _forward(self, sequences: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> torch.Tensor:
        device = next(self._module.parameters()).device
        lengths = torch.tensor([len(ids) for ids, _ in sequences], device=device)
        ids, types = (
            nn.utils.rnn.pad_sequence([torch.from_numpy(pair[part]) for pair in sequences], batch_first=True).to(device)
            for part in (0, 1)
        )
        arguments = {"input_ids": ids, "attention_mask": torch.arange(ids.shape[1], device=device) < lengths[:, None]}
        if self._types:
            arguments["token_type_ids"] = types
        if self.gives_scores:
            scores: torch.Tensor = self._module(**arguments).logits.float()
            return scores
        hidden = last_hidden_state(self._module, **arguments)
        return hidden[torch.arange(len(sequences), device=device), lengths - 1 if self._causal else 0]


def make_trunk(module: nn.Module, *, pooling: str, exact: bool) -> Trunk:
    """The packed trunk where it is known to hold for this configuration, else the padded one with the reason."""
    config: Any = module.config
    family = FAMILIES.get(config.model_type)
    if reason := _unpackable(config, family):
        return PaddedTrunk(module, causal=pooling == "last", exact=exact, reason=reason)
    assert family is not None
    return PackedTrunk(module, family, exact=exact)


def with_padding_segment(batch: PackedBatch) -> PackedBatch:
    """The batch with its rows rounded up to a multiple of BLOCK. The added rows form one more segment, so
    every row is computed from rows that exist; nothing is pooled from them."""
    extra = -batch.tokens % BLOCK
    if not extra:
        return batch
    zeros = np.zeros(extra, dtype=np.int64)
    return PackedBatch(
        input_ids=np.concatenate([batch.input_ids, zeros]),
        position_ids=np.concatenate([batch.position_ids, np.arange(extra)]),
        type_ids=np.concatenate([batch.type_ids, zeros]),
        segments=np.concatenate([batch.segments, np.array([[batch.tokens, extra, 0, 0]])]),
        pool_last=batch.pool_last,
        pool_first=batch.pool_first,
        indices=batch.indices,
    )


def unpack(batch: PackedBatch) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Token ids and token types of each sequence, its prefix written out again."""
    own = {int(start + length - 1): (start, length, p, n) for start, length, p, n in batch.segments.tolist()}
    sequences = []
    for last in batch.pool_last.tolist():
        start, length, prefix, shared = own[last]
        rows = np.concatenate([np.arange(prefix, prefix + shared), np.arange(start, start + length)])
        sequences.append((batch.input_ids[rows], batch.type_ids[rows]))
    return sequences


def _unpackable(config: Any, family: Family | None) -> str:
    if family is None:
        return f"packing is not proven for {config.model_type}"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "sliding-window layers"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return "" if rope in _STATIC_ROPE else f"rope type {rope} depends on the longest sequence of the batch"


def _whole(count: int) -> int:
    return -(-count // BLOCK) * BLOCK


def _row(values: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device)[None]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    plan: TilePlan,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D)."""
    query_THD, key_TKD, value_TKD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return packed_attention(query_THD, key_TKD, value_TKD, plan, scale=scaling)[None], None


AttentionInterface.register(ATTENTION, _attention)
