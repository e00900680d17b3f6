"""Rewards of items: every term computed, the model's by its server, and put together."""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._async_client import AsyncClient
from .._row_files import digest
from .._settings import Overlong
from ..errors import ConfigurationError, PlauditError, ResponseInvalid, Unavailable
from ..types import Identity, Item, ItemError
from .code import code
from .config import Code, Exact, JsonSchema, Model, Regex, Rewards, Term
from .sandbox import works
from .terms import TermError, reference_of, schema_validator, value_of


@dataclass(frozen=True, slots=True)
class Candidate:
    """One response: the item as a plaudit server takes it, its text (None where only the model can tell the response
    from the prompt), and what is known to be right."""

    item: Item
    response: str | None
    reference: Any = None


@dataclass(frozen=True, slots=True)
class Reward:
    """What became of a candidate: `score` is None exactly when there is an `error`. `attributes`: the values of the
    terms, without weight and clip. `floor`: the required term that made the score the floor."""

    score: float | None
    attributes: Mapping[str, float] = field(default_factory=dict)
    floor: str | None = None
    tokens: int | None = None
    error: ItemError | None = None


@dataclass(frozen=True, slots=True)
class Value:
    """What became of one term of one candidate: a number that `Rewards.combine` refuses if it is none, or an error."""

    number: float = math.nan
    tokens: int | None = None
    error: ItemError | None = None


class Composer:
    """Computes rewards. Owns the clients of the model terms, and the slots for programs."""

    def __init__(self, rewards: Rewards, *, allow_code: bool = False, isolated: bool = True) -> None:
        """Raises ConfigurationError for a schema that is none, and for programs that may not or cannot be run."""
        self.rewards = rewards
        self._isolated = isolated
        self._slots = asyncio.Semaphore(os.cpu_count() or 1)
        self._clients = {term.name: _client(term) for term in rewards.terms if isinstance(term, Model)}
        self._identities: dict[str, Identity] = {}
        for term in rewards.terms:
            if isinstance(term, JsonSchema):
                schema_validator(term)
        if any(isinstance(term, Code) for term in rewards.terms):
            if not allow_code:
                raise ConfigurationError("a code term runs programs that models wrote: pass --allow-code to allow that")
            if isolated and not works():
                raise ConfigurationError("no namespaces can be made here, so programs cannot be isolated; allow that "
                                         "(util-linux, user namespaces), or pass --allow-code-unisolated")  # fmt: skip

    @property
    def identity(self) -> Identity:
        """Of the rewards: their file and the revisions of the models, as these last answered."""
        models = sorted((name, one.revision, one.numerics) for name, one in self._identities.items())
        numerics = "+".join(numerics for _, _, numerics in models) or "exact"
        return Identity(self.rewards.name, digest([self.rewards.sha256, models])[:16], numerics)

    async def start(self, seconds: float) -> None:
        """Return when every model's server has scored a pair. Raises Unavailable, Refused, RevisionChanged."""

        async def ask(name: str, client: AsyncClient) -> None:
            await client.wait_until_ready(seconds)
            await client.score("Hello.", "Hello.")  # refused: the term names no model, or none that is served there
            self._identities[name] = (await client.info()).identity

        await asyncio.gather(*(ask(name, client) for name, client in self._clients.items()))

    async def ready(self) -> bool:
        """Whether every model's server says that it is."""
        checks = (client.wait_until_ready(2.0) for client in self._clients.values())
        return not any(await asyncio.gather(*checks, return_exceptions=True))

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(*(client.aclose() for client in self._clients.values()))

    async def rewards_of(
        self, candidates: Sequence[Candidate], overlong: Overlong | None = None, seconds: float = math.inf
    ) -> list[Reward]:
        """One reward for each candidate, in order. A term without a value is the candidate's error. The models' servers
        are told that nobody waits longer than so many seconds."""
        models = {name: self._scores(name, candidates, overlong, seconds) for name in self._clients if candidates}
        scored = dict(zip(models, await asyncio.gather(*models.values()), strict=True))
        return await asyncio.gather(
            *(
                self._reward(candidate, {name: values[place] for name, values in scored.items()})
                for place, candidate in enumerate(candidates)
            )
        )

    async def _scores(
        self, name: str, candidates: Sequence[Candidate], overlong: Overlong | None, seconds: float
    ) -> list[Value]:
        client = self._clients[name]
        client = client.with_options(overlong=overlong, timeout=min(seconds, client.settings.timeout or math.inf))
        try:
            scores = await client.score_items([candidate.item for candidate in candidates])
        except PlauditError as error:  # of no item in particular; where the server refuses, patience does not help
            passing = isinstance(error, (Unavailable, ResponseInvalid))
            said = _down(name, str(error)) if passing else ItemError("scoring_failed", f"{name}: {error}")
            return [Value(error=said)] * len(candidates)
        if scores.identity is not None:
            self._identities[name] = scores.identity
        return [
            Value(float(r), r.tokens)
            if r.error is None
            else Value(error=_down(name, r.error.message) if r.error.retryable else r.error)
            for r in scores
        ]

    async def _reward(self, candidate: Candidate, values: dict[str, Value]) -> Reward:
        for term in self.rewards.terms:
            if term.name not in values:
                values[term.name] = await self._value(term, candidate, values)
        if error := next((value.error for value in values.values() if value.error), None):
            return Reward(None, error=error)
        numbers = {term.name: values[term.name].number for term in self.rewards.terms}
        tokens = next((value.tokens for value in values.values() if value.tokens is not None), None)
        try:
            score, floor = self.rewards.combine(numbers)
        except (ValueError, OverflowError) as error:
            return Reward(None, error=ItemError("non_finite_score", str(error)))
        return Reward(score, numbers, floor, tokens)

    async def _value(self, term: Term, candidate: Candidate, values: Mapping[str, Value]) -> Value:
        if candidate.response is None:
            why = f"{term.name}: where the response begins cannot be told; send prompt and response (to /get_reward, "
            why += "prompts that are rendered: what each query begins with)"
            return Value(error=ItemError("no_boundary", why))
        counted = values.get(getattr(term, "of", None) or "")
        if counted is not None and counted.error:
            return counted
        try:
            if isinstance(term, Code):
                return Value(await self._run(term, candidate.response, candidate.reference))
            texts = candidate.response, candidate.reference, counted.tokens if counted else None
            if isinstance(term, (Exact, JsonSchema, Regex)):  # a search may take its time, others need not wait for it
                return Value(await asyncio.to_thread(value_of, term, *texts))
            return Value(value_of(term, *texts))
        except TermError as error:
            return Value(error=ItemError(error.code, str(error), retryable=error.code == "unavailable"))

    async def _run(self, term: Code, response: str, reference: Any) -> float:
        own = reference_of(term, reference)
        if own is None:
            raise TermError("missing_reference", f"{term.name}: the item has no reference")
        unwanted = threading.Event()
        await self._slots.acquire()
        run = asyncio.ensure_future(asyncio.to_thread(code, term, response, own, unwanted, isolated=self._isolated))
        run.add_done_callback(lambda _: self._slots.release())
        try:  # cancelled, a thread runs on: it has its slot until its test has ended, and begins no other
            return await asyncio.shield(run)
        finally:
            unwanted.set()


def _client(term: Model) -> AsyncClient:
    options: dict[str, Any] = {"model": term.model, "revision": term.revision}
    limits: dict[str, Any] = {"timeout": term.seconds, "attempt_timeout": term.attempt_seconds}
    return AsyncClient(term.url, **options, **limits, on_error="none", priority="batch")


def _down(name: str, message: str) -> ItemError:
    return ItemError("unavailable", f"{name}: {message}", retryable=True)
