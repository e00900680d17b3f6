"""Scoring without a server: the same model, the wire's item shapes in and its results out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
        results: list[dict[str, Any]] = []
        good: list[tuple[int, Encoded]] = []
        for item_index, item in enumerate(items):
            for response_index, encoded in enumerate(self._encode(item)):
                result: dict[str, Any] = {
                    "index": len(results),
                    "item_index": item_index,
                    "response_index": response_index,
                    "score": None,
                    "tokens": 0,
                    "truncated": None,
                    "cached": False,
                }
                if isinstance(encoded, ItemError):
                    result["error"] = {"code": encoded.code, "message": encoded.message, "retryable": False}
                else:
                    cut = encoded.truncated
                    result["tokens"] = len(encoded.ids)
                    result["truncated"] = {"side": cut.side, "tokens": cut.tokens} if cut else None
                    good.append((len(results), encoded))
                results.append(result)
        self._score(results, good)
        return results

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

    def _score(self, results: list[dict[str, Any]], good: list[tuple[int, Encoded]]) -> None:
        scores = self.model.score_encoded([encoded for _, encoded in good])
        for (index, _), attributes in zip(good, scores, strict=True):
            if np.isfinite(attributes).all():
                results[index]["score"] = float(attributes[0])
            else:
                message = "the model gave a score that is not finite"
                results[index]["error"] = {"code": "non_finite_score", "message": message, "retryable": False}


def open_scorer(name: str | Path, overlong: Overlong = "error") -> LocalScorer:
    """The scorer of a model directory or Hub id. Raises ModelError."""
    keep_freed_memory()
    return LocalScorer(RewardModel.load(name), overlong)
