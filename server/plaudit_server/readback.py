"""Scores on their way to the host, behind a forward that the device still computes.

Whoever waits for scores as soon as their forward is launched leaves the device idle while the next batch is received,
packed and launched. So they are asked for at once, into pinned memory, and read when they have come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from .messages import Attributes


class Readback(Protocol):
    def landed(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> Attributes:
        """Attributes (N, A) fp32. Raises what the device says of the forward."""


class CudaReadback:
    """One copy, in the order of the stream."""

    def __init__(self, scores_NA: torch.Tensor) -> None:
        self._host = torch.empty(scores_NA.shape, dtype=scores_NA.dtype, pin_memory=True)
        self._host.copy_(scores_NA, non_blocking=True)
        self._copied = torch.cuda.current_stream(scores_NA.device).record_event()

    def landed(self) -> bool:
        return bool(self._copied.query())

    def wait(self) -> Attributes:
        self._copied.synchronize()
        attributes: Attributes = self._host.numpy()
        return attributes


def readback_of(device: str) -> Callable[[torch.Tensor], Readback] | None:
    """How scores of this device are read; None where a forward has computed them when it returns."""
    return CudaReadback if device.startswith("cuda") else None
