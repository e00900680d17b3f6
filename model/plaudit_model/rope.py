"""Rotary angles that depend on more than the position."""

from __future__ import annotations

from typing import Any

from torch import nn

_STATIC = frozenset({"default", "linear", "llama3", "yarn"})


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
