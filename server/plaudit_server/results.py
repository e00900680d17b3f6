"""What became of each candidate, and how that reads as JSON. No asyncio, no HTTP."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from plaudit_model.contract import RewardContract
from plaudit_model.encode import Encoded
from plaudit_model.errors import ItemError

from .domain import Scored
from .engine_errors import EngineError
from .envelope import Candidate
from .errors import RequestError, item_json
from .schema import Include, Transform


@dataclass(frozen=True, slots=True)
class Result:
    """A score or an error, never both. `score` is transformed as asked; `scored` holds the raw heads."""

    index: int
    candidate: Candidate
    encoded: Encoded | None
    scored: Scored | None = None
    score: float | None = None
    error: ItemError | EngineError | None = None

    def json(self, attributes: Sequence[str], include: Sequence[Include]) -> dict[str, Any]:
        """One entry of `results`. `attributes` names the heads."""
        encoded, scored = self.encoded, self.scored
        cut = encoded.truncated if encoded else None
        entry: dict[str, Any] = {
            "index": self.index, "item_index": self.candidate.item_index,
            "response_index": self.candidate.response_index, "score": self.score,
            "tokens": len(encoded.ids) if encoded else None,
            "truncated": {"side": cut.side, "tokens": cut.tokens} if cut else None,
            "cached": scored.cached if scored else False,
        }  # fmt: skip
        if scored and "attributes" in include:
            entry["attributes"] = dict(zip(attributes, scored.attributes, strict=True))
        if scored and "timing" in include:
            entry["timing"] = {"queue_ms": _ms(scored.queue_seconds), "compute_ms": _ms(scored.compute_seconds)}
        if self.error is not None:
            entry["error"] = item_json(self.error)
        return entry


def usage(results: Sequence[Result]) -> dict[str, int]:
    """Token counts of what was scored."""
    prompt = total = shared = cached = 0
    for result in results:
        if result.encoded and result.scored:
            prompt += result.encoded.prompt_tokens
            total += result.scored.tokens
            shared += result.scored.shared_tokens
            cached += result.scored.tokens if result.scored.cached else 0
    return {"prompt_tokens": prompt, "total_tokens": total, "shared_tokens": shared, "cached_tokens": cached}


def best_first(results: Sequence[Result]) -> list[Result]:
    """Those that have a score; equal ones keep their order."""
    return sorted((r for r in results if r.score is not None), key=lambda result: -(result.score or 0.0))


def timing(results: Sequence[Result], tokenize_seconds: float) -> dict[str, float]:
    """Milliseconds: of the item that waited longest, and of the slowest batch."""
    queue = compute = 0.0
    for result in results:
        if result.scored:
            queue, compute = max(queue, result.scored.queue_seconds), max(compute, result.scored.compute_seconds)
    return {"queue_ms": _ms(queue), "tokenize_ms": _ms(tokenize_seconds), "compute_ms": _ms(compute)}


def transformation(name: Transform, contract: RewardContract) -> Callable[[float], float]:
    """The transform of a raw score, in float64. Raises RequestError where the model lacks what it needs."""
    if name == "none":
        return float
    if contract.statistics is None:
        raise _missing(f"{name} scores need the model's mean and standard deviation", "transform")
    mean, std = contract.statistics.mean, contract.statistics.std
    if name == "normalized":
        return lambda score: (score - mean) / std
    scale = temperature(contract, "transform")
    return lambda score: sigmoid((score - mean) / scale)


def temperature(contract: RewardContract, param: str | None = None) -> float:
    """The fitted temperature. Raises RequestError where the model has none."""
    if contract.calibration is None:
        raise _missing("a probability needs a fitted temperature", param)
    return contract.calibration.temperature


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x) without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def dumps(value: Any) -> bytes:
    """Strict JSON: NaN and infinity raise ValueError."""
    data = to_json(value)
    if b"NaN" in data or b"Infinity" in data:  # a number, or a word in somebody's text: the standard library knows
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    return data


def _missing(what: str, param: str | None) -> RequestError:
    return RequestError(
        "missing_statistics", f"{what}, which its contract does not have; use the raw scores, or a model that "
        "`plaudit train` has fitted with a held-out split: it stores them", param=param,
    )  # fmt: skip


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
