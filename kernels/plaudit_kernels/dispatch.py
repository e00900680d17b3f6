"""Which implementation of the operations runs, chosen once per process, with the reason in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Choice:
    """The implementation and why it was chosen; both are shown in `/info`."""

    implementation: Literal["torch"]
    reason: str


def select(device: torch.device) -> Choice:
    """The implementation for `device`."""
    if device.type == "cpu":
        return Choice("torch", "packed tiles over torch's CPU attention")
    return Choice("torch", f"packed tiles over torch's attention on {device.type}; no fused kernels are used")
