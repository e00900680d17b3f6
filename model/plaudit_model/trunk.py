"""From a packed batch to scores, one way for each architecture.

Families of decoders and encoders have a packed forward of our own. Every other architecture runs through its own
forward, padded.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from . import decoder, encoder_trunk
from .heads import apply_head, is_known, last_hidden_state
from .infer import ENCODERS
from .packing import PackedBatch

_STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})


class Trunk(Protocol):
    """Attributes (N, A) fp32 of the sequences of a batch, in the batch's order. Frozen, it may keep copies of the
    weights, which must not change any more, and gives no gradients."""

    shares_prompt: bool
    reason: str

    def freeze(self) -> None: ...
    def thaw(self) -> None: ...
    def __call__(self, batch: PackedBatch) -> torch.Tensor: ...


class PaddedTrunk:
    """The architecture's own forward over right-padded rows; in exact mode one sequence at a time, so that
    its shape, and with it every bit, depends on the sequence alone. A head that is not known to us is left to the
    architecture too."""

    shares_prompt = False

    def __init__(self, module: nn.Module, *, causal: bool, exact: bool, reason: str) -> None:
        self._module = module
        self._causal = causal
        self._exact = exact
        self._own_head = not is_known(module)
        self._types = int(getattr(module.config, "type_vocab_size", 0) or 0) > 1
        self.reason = f"padded: {reason}"

    def freeze(self) -> None:
        """Nothing is kept."""

    def thaw(self) -> None:
        """Nothing was kept."""

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
        if self._own_head:
            scores: torch.Tensor = self._module(**arguments).logits.float()
            return scores
        hidden = last_hidden_state(self._module, **arguments)
        return apply_head(
            self._module, hidden[torch.arange(len(sequences), device=device), lengths - 1 if self._causal else 0]
        )


def make_trunk(module: nn.Module, *, pooling: str, exact: bool) -> Trunk:
    """The packed trunk where it is known to hold for this configuration, else the padded one with the reason."""
    config: Any = module.config
    own = encoder_trunk if config.model_type in ENCODERS else decoder
    if reason := own.unsupported(config) or _moving_rope(config):
        return PaddedTrunk(module, causal=pooling == "last", exact=exact, reason=reason)
    if own is decoder:
        return decoder.DecoderTrunk(module, exact=exact)
    return encoder_trunk.EncoderTrunk(module, exact=exact)


def unpack(batch: PackedBatch) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Token ids and token types of each sequence, its prefix written out again."""
    own = {int(start + length - 1): (start, length, p, n) for start, length, p, n in batch.segments.tolist()}
    sequences = []
    for last in batch.pool_last.tolist():
        start, length, prefix, shared = own[last]
        rows = np.concatenate([np.arange(prefix, prefix + shared), np.arange(start, start + length)])
        sequences.append((batch.input_ids[rows], batch.type_ids[rows]))
    return sequences


def _moving_rope(config: Any) -> str:
    """Why rotary angles would depend on the batch; empty if they do not."""
    settings = getattr(config, "rope_parameters", None) or {}
    for rope in [settings, *(value for value in settings.values() if isinstance(value, dict))]:
        if (kind := rope.get("rope_type", "default")) not in _STATIC_ROPE:
            return f"rope type {kind} depends on the longest sequence of the batch"
    return ""
