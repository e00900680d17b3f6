"""The flow behind every route: candidates -> token ids -> engine -> results, in the order of the request."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from plaudit_model.encode import Encoded, Overlong
from plaudit_model.errors import ItemError

from .domain import Priority, Scored, Work
from .engine_errors import EngineError
from .envelope import Candidate
from .errors import from_engine
from .results import Result, transformation
from .schema import Include, Transform
from .served import Served

Answer = asyncio.Future[Scored]


@dataclass(frozen=True, slots=True)
class Terms:
    """How a request is to be scored, once the route's defaults are filled in. `deadline` is a moment of
    `time.monotonic()`, `client` who takes turns with others."""

    overlong: Overlong
    priority: Priority
    deadline: float
    transform: Transform
    include: Sequence[Include]
    client: str


class Scoring:
    """One request on its way. Leaving the `async with` withdraws whatever has no answer yet."""

    def __init__(self, model: Served, candidates: Sequence[Candidate], terms: Terms) -> None:
        self._model = model
        self._candidates = candidates
        self._terms = terms
        self._transform = transformation(terms.transform, model.contract)
        self._encoded: list[Encoded | ItemError] = []
        self._answers: dict[int, Answer] = {}
        self.tokenize_seconds = 0.0

    async def __aenter__(self) -> Scoring:
        """Encode and submit. Raises RequestError if the engine does not take the request."""
        model, terms = self._model, self._terms
        _ = model.loaded
        started = time.monotonic()
        self._encoded = await model.encoders.encode([c.item for c in self._candidates], terms.overlong)
        self.tokenize_seconds = time.monotonic() - started
        model.metrics.tokenized(self.tokenize_seconds)
        good = {index: encoded for index, encoded in enumerate(self._encoded) if isinstance(encoded, Encoded)}
        work = [Work(encoded.ids, encoded.prompt_tokens) for encoded in good.values()]
        try:
            answers = model.engine.submit(work, deadline=terms.deadline, priority=terms.priority, client=terms.client)
        except EngineError as error:
            raise from_engine(error) from error
        self._answers = dict(zip(good, answers, strict=True))
        return self

    async def __aexit__(self, *_exception: object) -> None:
        for answer in self._answers.values():
            if not answer.cancel() and not answer.cancelled():
                answer.exception()  # looked at, so that asyncio does not report it as forgotten

    async def all(self) -> list[Result]:
        """Every result, in order."""
        for answer in self._answers.values():
            with suppress(EngineError):  # `_result` says which
                await answer
        results = [self._result(index) for index in range(len(self._candidates))]
        self._count(results)
        return results

    async def as_finished(self) -> AsyncIterator[Result]:
        """Every result, as soon as it is there."""
        finished: asyncio.Queue[Answer] = asyncio.Queue()
        places = {answer: index for index, answer in self._answers.items()}
        for answer in places:
            answer.add_done_callback(finished.put_nowait)
        for index in range(len(self._candidates)):
            result = self._result(places[await finished.get()] if index in self._answers else index)
            self._count([result])
            yield result

    def _result(self, index: int) -> Result:
        candidate, encoded = self._candidates[index], self._encoded[index]
        if isinstance(encoded, ItemError):
            return Result(index, candidate, None, error=encoded)
        try:
            scored = self._answers[index].result()
            score = self._transform(scored.attributes[0])
            if not math.isfinite(score):
                raise ItemError("non_finite_score", "the score of this item is not finite")
        except (EngineError, ItemError) as error:
            return Result(index, candidate, encoded, error=error)
        return Result(index, candidate, encoded, scored, score)

    def _count(self, results: Sequence[Result]) -> None:
        scores = [result.scored.attributes[0] for result in results if result.scored]
        self._model.metrics.answered(scores, [result.error.code for result in results if result.error])
