"""Which implementation of the operations runs: chosen once per process and device, with the reason in words."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from . import cpu_runtime
from .chips import table_in_words


@dataclass(frozen=True)
class Choice:
    """The implementation and why it was chosen; both are shown in `/info`."""

    implementation: Literal["torch", "triton", "cpu"]
    reason: str
    library: str = ""
    """What attends in its place where nothing is shared, for `numerics`."""


@lru_cache(maxsize=8)
def select(device: torch.device) -> Choice:
    """The implementation for `device`. PLAUDIT_KERNELS=torch keeps fused kernels off; =triton runs those of CUDA on
    the CPU too, where Triton's interpreter is on (TRITON_INTERPRET=1): for tests, it is slow."""
    wish = os.environ.get("PLAUDIT_KERNELS", "auto")
    if wish not in ("auto", "torch", "triton"):
        raise ValueError(f"PLAUDIT_KERNELS is {wish!r}; it can be auto, torch or triton")
    if wish == "torch":
        return Choice("torch", "PLAUDIT_KERNELS=torch")
    installed = importlib.util.find_spec("triton") is not None
    if device.type == "cuda":
        if not installed:
            return Choice("torch", "triton is not installed")
        return Choice("triton", f"fused kernels on CUDA, {table_in_words(device)}")
    if wish == "triton" and installed and os.environ.get("TRITON_INTERPRET") == "1":
        return Choice("triton", "fused kernels in Triton's interpreter")
    if device.type != "cpu":
        return Choice("torch", f"no fused kernels for {device.type}")
    missing = cpu_runtime.unavailable()
    return Choice("torch", f"no fused CPU kernels: {missing}") if missing else Choice("cpu", "fused CPU kernels")


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether an operation on `tensor` runs as a fused kernel."""
    return select(tensor.device).implementation == "triton"


def uses_cpu_kernels(*tensors: torch.Tensor | None) -> bool:
    """Whether an operation on `tensors` runs as a fused CPU kernel: without gradients, all fp32 or all bf16, the last
    dimension of each contiguous."""
    given = [tensor for tensor in tensors if tensor is not None]
    dtype = given[0].dtype
    return (
        not torch.is_grad_enabled()
        and dtype in cpu_runtime.DTYPES
        and all(tensor.dtype == dtype and tensor.stride(-1) == 1 for tensor in given)
        and select(given[0].device).implementation == "cpu"
    )
