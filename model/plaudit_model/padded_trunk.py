"""The architecture's own forward over padded rows: the path of last resort, open to every architecture."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .errors import ContractError
from .heads import apply_head, is_known, last_hidden_state
from .packing import PackedBatch
from .rope import forget_lengths, moving_rope

Sequence = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Token ids and token types of one sequence."""


class PaddedTrunk:
    """The architecture's own forward over right-padded rows; in exact mode one sequence at a time, so that
    its shape, and with it every bit, depends on the sequence alone. So too where rotary angles depend on the longest
    sequence. A head that is not known to us is left to the architecture."""

    shares_prompt = False

    def __init__(self, module: nn.Module, *, causal: bool, exact: bool, reason: str) -> None:
        self._module = module
        self._causal = causal
        self._moving = bool(moving_rope(module.config))
        self._alone = exact or self._moving
        self._own_head = not is_known(module)
        self._types = int(getattr(module.config, "type_vocab_size", 0) or 0) > 1
        self.reason = f"padded: {reason}"

    def freeze(self) -> None:
        """Nothing is kept."""

    def thaw(self) -> None:
        """Nothing was kept."""

    def recompute(self, on: bool) -> None:
        recompute_layers(self._module, on)

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        sequences = unpack(batch)
        lengths = [len(ids) for ids, _ in sequences]
        parts = [[i] for i in range(len(lengths))] if self._alone else split_by_length(lengths)
        scores = torch.cat([self._forward([sequences[i] for i in part]) for part in parts])
        places = np.argsort(np.concatenate(parts))
        return scores[torch.from_numpy(places).to(scores.device)]

    def _forward(self, sequences: list[Sequence]) -> torch.Tensor:
        if self._moving:
            forget_lengths(self._module)
        device = next(self._module.parameters()).device
        lengths = torch.tensor([len(ids) for ids, _ in sequences], device=device)
        ids, types = (
            nn.utils.rnn.pad_sequence([torch.from_numpy(pair[part]) for pair in sequences], batch_first=True).to(device)
            for part in (0, 1)
        )
        arguments = {"input_ids": ids, "attention_mask": torch.arange(ids.shape[1], device=device) < lengths[:, None]}
        if self._types:
            arguments["token_type_ids"] = types
        if self._own_head:
            scores: torch.Tensor = self._module(**arguments).logits.float()
            return scores
        hidden = last_hidden_state(self._module, **arguments)
        return apply_head(
            self._module, hidden[torch.arange(len(sequences), device=device), lengths - 1 if self._causal else 0]
        )


def recompute_layers(module: nn.Module, on: bool) -> None:
    """Whether the layers of transformers are computed once more in the backward pass. Raises ContractError for a module
    whose layers cannot be."""
    layers = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    if on and not layers:
        raise ContractError(f"{type(module).__name__} has no gradient checkpointing in transformers")
    for layer in layers:
        layer.gradient_checkpointing = on
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def split_by_length(lengths: list[int]) -> list[list[int]]:
    """Indices of sequences in batches of like lengths, longest first. Padded, none has more rows than all sequences
    have tokens: padding costs no more memory than packing would."""
    budget = sum(lengths)
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def unpack(batch: PackedBatch) -> list[Sequence]:
    """Token ids and token types of each sequence, its prefix written out again."""
    own = {int(start + length - 1): (start, length, p, n) for start, length, p, n in batch.segments.tolist()}
    sequences = []
    for last in batch.pool_last.tolist():
        start, length, prefix, shared = own[last]
        rows = np.concatenate([np.arange(prefix, prefix + shared), np.arange(start, start + length)])
        sequences.append((batch.input_ids[rows], batch.type_ids[rows]))
    return sequences
