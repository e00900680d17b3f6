"""Scoring without a server: the same model, the wire's item shapes in and its results out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .encode import Encoded, Overlong
from .errors import ItemError
from .items import encode_item, flatten
from .memory import keep_freed_memory
from .reward_model import RewardModel


class LocalScorer:
    """A loaded model that answers like `/score`. Not thread-safe."""

    def __init__(self, model: RewardModel, overlong: Overlong = "error") -> None:
        self.model = model
        self._overlong = overlong

    def info(self) -> dict[str, Any]:
        """Identity of what scores."""
        contract = self.model.contract
        return {
            "model": str(self.model.directory),
            "revision": contract.revision(),
            "numerics": self.model.numerics,
            "max_length": contract.max_length,
            "attributes": list(contract.head.attributes),
            "temperature": contract.calibration.temperature if contract.calibration else None,
        }

    def score_items(self, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """One result a response, in order; a bad item has `score: null` and an `error` beside its neighbours."""
        encoded = [(place, *one) for place, item in enumerate(items) for one in enumerate(self._encode(item))]
        scores = iter(self.model.score_encoded([one for *_, one in encoded if isinstance(one, Encoded)]))
        return [
            {"index": index, "item_index": item, "response_index": response, "cached": False, **_result(one, scores)}
            for index, (item, response, one) in enumerate(encoded)
        ]

    def _encode(self, item: dict[str, Any]) -> list[Encoded | ItemError]:
        try:
            flat = list(flatten(item))
        except ItemError as error:
            return [error]
        return [self._encode_one(one) for one in flat]

    def _encode_one(self, item: dict[str, Any]) -> Encoded | ItemError:
        try:
            return encode_item(self.model.encoder, item, self._overlong)
        except ItemError as error:
            return error


def _result(encoded: Encoded | ItemError, scores: Iterator[NDArray[np.float32]]) -> dict[str, Any]:
    """What is said of one response; `scores` are those of what could be encoded, in order."""
    if isinstance(encoded, ItemError):
        return {"score": None, "tokens": 0, "truncated": None, "error": _error(encoded)}
    attributes, cut = next(scores), encoded.truncated
    told = {"score": None, "tokens": len(encoded.ids), "truncated": asdict(cut) if cut else None}
    if not np.isfinite(attributes).all():
        return {**told, "error": _error(ItemError("non_finite_score", "the model gave a score that is not finite"))}
    return {**told, "score": float(attributes[0])}


def _error(error: ItemError) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "retryable": False}


def open_scorer(name: str | Path, overlong: Overlong = "error") -> LocalScorer:
    """The scorer of a model directory or Hub id. Raises ModelError."""
    keep_freed_memory()
    return LocalScorer(RewardModel.load(name), overlong)
