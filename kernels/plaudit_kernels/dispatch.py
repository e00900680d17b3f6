"""Which implementation of the operations runs: chosen once per process and device, with the reason in words."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from .chips import table_in_words


@dataclass(frozen=True)
class Choice:
    """The implementation and why it was chosen; both are shown in `/info`."""

    implementation: Literal["torch", "triton"]
    reason: str


@lru_cache(maxsize=8)
def select(device: torch.device) -> Choice:
    """The implementation for `device`. PLAUDIT_KERNELS=torch keeps the fused kernels off; =triton runs them on the
    CPU too, where Triton's interpreter is on (TRITON_INTERPRET=1): for tests, it is slow."""
    wish = os.environ.get("PLAUDIT_KERNELS", "auto")
    if wish not in ("auto", "torch", "triton"):
        raise ValueError(f"PLAUDIT_KERNELS is {wish!r}; it can be auto, torch or triton")
    if wish == "torch":
        return Choice("torch", "PLAUDIT_KERNELS=torch")
    if importlib.util.find_spec("triton") is None:
        return Choice("torch", "triton is not installed")
    if device.type == "cuda":
        return Choice("triton", f"fused kernels on CUDA, {table_in_words(device)}")
    if wish == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return Choice("triton", "fused kernels in Triton's interpreter")
    return Choice("torch", f"fused kernels need CUDA; this is {device.type}")


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether an operation on `tensor` runs as a fused kernel."""
    return select(tensor.device).implementation == "triton"
