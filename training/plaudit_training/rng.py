"""All random number generators of a process as tensors: captured, stored without pickle, put back."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Seed torch (every device), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def capture() -> dict[str, Tensor]:
    """The state of every generator: torch's CPU and CUDA generators, numpy's global one, Python's."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    legacy: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, gauss = legacy
    states["numpy"] = torch.tensor([*keys.tolist(), position, has_gauss, _bits(gauss)], dtype=torch.int64)
    version, words, pending = random.getstate()
    gauss_next = [0, 0] if pending is None else [1, _bits(pending)]
    states["python"] = torch.tensor([version, *words, *gauss_next], dtype=torch.int64)
    return states


def restore(states: Mapping[str, Tensor]) -> None:
    """Put back what `capture` took. A CUDA state without its device is left out: there is nothing to seed."""
    torch.set_rng_state(states["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda{i}"], i)
    *keys, position, has_gauss, gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, _real(gauss)))
    version, *words, has_pending, pending = states["python"].tolist()
    random.setstate((version, tuple(words), _real(pending) if has_pending else None))


def _bits(value: float) -> int:
    """A double's 64 bits as an integer: its exact value, whatever it is."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _real(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])
