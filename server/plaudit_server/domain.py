"""The nouns between the HTTP edge and the worker. Frozen values; no asyncio, no torch, no pydantic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Priority = Literal["interactive", "batch"]


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One item to be scored: token ids (L,) int32 and how many of them are the prompt's."""

    ids: NDArray[np.int32]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Scored:
    """What became of one `Work`. `attributes` are the raw fp32 heads, in the contract's order.

    `shared_tokens` counts the tokens of this item that were computed once for it and others; `cached` says
    that nothing was computed: the item was identical to one in flight or in the cache.
    """

    attributes: tuple[float, ...]
    tokens: int
    shared_tokens: int
    cached: bool
    queue_seconds: float
    compute_seconds: float


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the worker said of the model it loaded, once a real score had passed.

    `revision` identifies the files: equal revisions and equal numerics give equal scores. `sharing` says in
    words what `shares_prompt` says to the batcher. `ready_s` is how long the first worker took, in seconds by what they
    were spent on; like `device`, it says nothing of who the model is. `memory_bytes` are predictions and the cap.
    """

    architecture: str
    attributes: tuple[str, ...]
    revision: str
    numerics: str
    dtype: str
    mode: str
    device: str = field(compare=False)
    backend: str
    path: str
    sharing: str
    max_length: int
    parameters: int
    shares_prompt: bool = False
    ready_s: Mapping[str, float] = field(default_factory=dict, compare=False)
    memory_bytes: Mapping[str, int | None] = field(default_factory=dict)
