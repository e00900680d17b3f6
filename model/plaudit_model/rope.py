"""Rotary angles, and those that depend on more than the position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_STATIC = frozenset({"default", "linear", "llama3", "yarn"})


def rotary_angles(
    rotary: Any, position_ids_T: Tensor, dtype: torch.dtype, kind: str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, E) in `dtype` of transformers' module; `kind` is the type of layer where it knows several.

    Multiplied element by element: as a matrix product, which some releases of transformers make of it, TF32 would round
    positions to eleven bits wherever it is allowed, as containers do by an environment variable.
    """
    prefix = f"{kind}_" if kind else ""
    scale = getattr(rotary, f"{prefix}attention_scaling")
    inv_freq: Tensor = getattr(rotary, f"{prefix}inv_freq")
    half_TE = position_ids_T[:, None].float() * inv_freq.to(position_ids_T.device, torch.float)
    angles_TE = torch.cat((half_TE, half_TE), dim=-1)
    return (angles_TE.cos() * scale).to(dtype), (angles_TE.sin() * scale).to(dtype)


def moving_rope(config: Any) -> str:
    """Why rotary angles would depend on the batch; empty if they do not."""
    settings = getattr(config, "rope_parameters", None) or {}
    for rope in [settings, *(value for value in settings.values() if isinstance(value, dict))]:
        if (kind := rope.get("rope_type", "default")) not in _STATIC:
            return f"rope type {kind} depends on the longest sequence of the batch"
    return ""


def forget_lengths(module: nn.Module) -> None:
    """Make dynamic angles a function of the next forward alone: transformers keeps those of the longest sequence so
    far, so that a score would depend on what was scored before."""
    for part in module.modules():
        for name in [name for name in vars(part) if name.endswith("max_seq_len_cached")]:
            setattr(part, name, 0)
