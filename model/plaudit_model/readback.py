"""Scores on their way to the host, behind a forward that the device still computes.

Whoever waits for scores as soon as their forward is launched leaves a GPU idle while the next batch is packed and
launched. So they are asked for at once, into pinned memory, and read when they have come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


class Landing(Protocol):
    """Attributes (N, A) fp32, to be had when `landed`."""

    def landed(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> NDArray[np.float32]:
        """The numbers. Raises what the device says of the forward."""


class Readback:
    """`Landing` of a forward: on CUDA one copy, in the order of the stream."""

    def __init__(self, scores_NA: torch.Tensor) -> None:
        self._copied = None
        if not scores_NA.is_cuda:
            self._host = scores_NA.cpu()
        else:
            self._host = torch.empty(scores_NA.shape, dtype=scores_NA.dtype, pin_memory=True)
            self._host.copy_(scores_NA, non_blocking=True)
            self._copied = torch.cuda.current_stream(scores_NA.device).record_event()

    def landed(self) -> bool:
        return self._copied is None or bool(self._copied.query())

    def wait(self) -> NDArray[np.float32]:
        if self._copied is not None:
            self._copied.synchronize()
        attributes: NDArray[np.float32] = self._host.numpy()
        return attributes


def readback_of(device: str) -> Callable[[torch.Tensor], Landing] | None:
    """What reads scores while the device computes others; None where a forward has computed them when it returns."""
    return Readback if device.startswith("cuda") else None
