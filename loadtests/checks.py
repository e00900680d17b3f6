"""Is an answer right? Every response of a load test is checked, because a fast wrong score is worse than none.

The checks read the raw JSON and share no code with the server or the SDK.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

WRONG = "wrong answer"


class WrongAnswer(Exception):
    """An answer that no client should have got: another length or order, a number that is none, another score."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{WRONG}: {what}")


class ItemsFailed(Exception):
    """The answer is well formed, but items have an error in place of a score."""


ALIKE = 4
"""So many different items in a row with one score: whoever gives it has not looked at them. A batch has as many
responses to a prompt, so that one who looks at the prompt alone is found, too."""

Place = tuple[int, int | None]
"""Where a score belongs: the position of its item, and of the response within it if the item has `responses`."""


def checked_scores(answer: object, places: Sequence[Place]) -> list[float]:
    """The scores of a `POST /score` answer, one for each place, in order.

    Raises WrongAnswer if the answer is not exactly that, ItemsFailed if it says that items failed.
    """
    if not isinstance(answer, Mapping):
        raise WrongAnswer("the body is not a JSON object")
    scores, results = answer.get("scores"), answer.get("results")
    if not isinstance(scores, list) or not isinstance(results, list):
        raise WrongAnswer("no lists `scores` and `results`")
    if not len(scores) == len(results) == len(places):
        raise WrongAnswer(f"{len(scores)} scores and {len(results)} results for {len(places)} items")
    for index, (score, result, place) in enumerate(zip(scores, results, places, strict=True)):
        _check_result(index, score, result, place)
    if failed := [result["error"] for result in results if result.get("error") is not None]:
        raise ItemsFailed(f"{len(failed)} items failed: {_code(failed[0])}")
    if len(places) == 1 and "score" in answer and answer["score"] != scores[0]:
        raise WrongAnswer("the top-level score is not the score of the only item")
    return [float(score) for score in scores]


def identity(answer: Mapping[str, Any]) -> tuple[str, str, str]:
    """What gave the scores: model, revision, numerics. Raises WrongAnswer if the answer does not say."""
    parts = [answer.get(name) for name in ("model", "revision", "numerics")]
    if not all(isinstance(part, str) and part for part in parts):
        raise WrongAnswer("model, revision or numerics is missing")
    return (str(parts[0]), str(parts[1]), str(parts[2]))


class Ledger:
    """The first score of every item that comes again, and the last score; the only memory of a load test.

    Scores of one item under one identity may differ by `tolerance`; 0 asks for the same bits.
    """

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._first: dict[tuple[tuple[str, str, str], str, int], float] = {}
        self._last: dict[tuple[str, str, str], tuple[tuple[str, int], float, int]] = {}

    def __len__(self) -> int:
        return len(self._first)

    def look(self, who: tuple[str, str, str], key: str, scores: Sequence[float], start: int = 0) -> None:
        """Raises WrongAnswer when the scores of responses `start`, `start` + 1, ... to the prompt `key` are one score,
        and that of `ALIKE` different items in a row."""
        for j, score in enumerate(scores, start):
            item, last, alike = self._last.get(who, (None, None, 0))
            if item != (key, j):
                self._last[who] = (key, j), score, alike + 1 if score == last else 1
            if self._last[who][2] >= ALIKE:
                raise WrongAnswer(f"{self._last[who][2]} different items in a row, one score")

    def check(self, who: tuple[str, str, str], key: str, scores: Sequence[float], start: int = 0) -> None:
        """Compare with (or note) the scores of responses `start`, `start` + 1, ... to the prompt `key`.

        Raises WrongAnswer when an item was scored differently before.
        """
        for j, score in enumerate(scores, start):
            first = self._first.setdefault((who, key, j), score)
            if first != score and not abs(first - score) <= self._tolerance:
                raise WrongAnswer(f"one item, two scores, {abs(first - score):.3g} apart")


def _check_result(index: int, score: object, result: object, place: Place) -> None:
    if not isinstance(result, Mapping):
        raise WrongAnswer("a result is not a JSON object")
    if result.get("index") != index:
        raise WrongAnswer("results are out of order")
    if (result.get("item_index"), result.get("response_index")) != place:
        raise WrongAnswer("a result names another item or response")
    if result.get("score") != score:
        raise WrongAnswer("`scores` and `results` disagree")
    if (score is None) is not (result.get("error") is not None):
        raise WrongAnswer("neither a score nor an error, or both")
    if score is not None and not _is_finite_number(score):
        raise WrongAnswer("a score is not a finite number")


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _code(error: object) -> str:
    return str(error.get("code")) if isinstance(error, Mapping) else "without a code"
