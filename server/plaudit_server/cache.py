"""Scores that are known already: an exact-result cache, bounded in bytes."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from .domain import ModelInfo, Work

_OVERHEAD = 200
"""Bytes of an entry besides its numbers: the key, the dict slot and the tuple, as CPython lays them out."""
_NUMBER = 32


class ScoreKeys:
    """sha256 of everything a score depends on: the model's revision, its numerics, and the item's tokens with
    the boundary between prompt and response (token types depend on it)."""

    def __init__(self, info: ModelInfo) -> None:
        self._of_model = hashlib.sha256(f"{info.revision}\0{info.numerics}\0".encode())

    def key(self, work: Work) -> bytes:
        digest = self._of_model.copy()
        digest.update(work.prompt_tokens.to_bytes(4, "little"))
        digest.update(work.ids.astype("<i4", copy=False).tobytes())
        return digest.digest()


class ScoreCache:
    """Raw attributes by key, least recently used out first. Only scores are put in, never errors."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._scores: OrderedDict[bytes, tuple[float, ...]] = OrderedDict()
        self.bytes = 0

    def get(self, key: bytes) -> tuple[float, ...] | None:
        scores = self._scores.get(key)
        if scores is not None:
            self._scores.move_to_end(key)
        return scores

    def put(self, key: bytes, attributes: tuple[float, ...]) -> None:
        if key not in self._scores:
            self.bytes += _size(attributes)
        self._scores[key] = attributes
        self._scores.move_to_end(key)
        while self.bytes > self._max_bytes:
            _, oldest = self._scores.popitem(last=False)
            self.bytes -= _size(oldest)


def _size(attributes: tuple[float, ...]) -> int:
    return _OVERHEAD + _NUMBER * len(attributes)
