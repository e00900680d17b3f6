"""Scores over HTTP, while the next responses are generated. An error is never a number."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from plaudit import Client, Identity, Prompt, RetryPolicy, RevisionChanged
from plaudit import Scores as Answer
from plaudit._bulk import started
from plaudit.adapters._rewards import Ledger

from .config import RewardConfig
from .shaping import Scores

LOG = logging.getLogger("plaudit.loops")

Group = tuple[Prompt, Sequence[str]]
"""A prompt with responses to it."""
Promise = Callable[[], Scores]
_HASTY = RetryPolicy(retries=3)


class Rewards(Protocol):
    """Where scores come from."""

    def submit(self, groups: Sequence[Group]) -> Promise:
        """Begin to score; the promise waits for (E, S) float64 scores of E endpoints, responses in order, NaN where
        there is none. It raises what makes the scores of the step unusable."""

    def counts(self) -> Mapping[str, float]:
        """What has been counted since the last call, by metric name."""

    def state(self) -> Mapping[str, Any]:
        """What a checkpoint must hold."""

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` said."""

    def close(self) -> None: ...


class Served:
    """One endpoint, or several as an ensemble, through the SDK, which retries what may help.

    Pinned, each endpoint must answer with the model revision and the numerics that it answered with first, across
    resumes too; otherwise RevisionChanged. Not pinned, a change is logged and counted.
    """

    def __init__(self, urls: Sequence[str], config: RewardConfig) -> None:
        self._config = config
        self._clients = [
            Client(url, model=config.reward_model, timeout=config.timeout or None,
                   attempt_timeout=config.attempt_timeout or None, retry=RetryPolicy(retries=None),
                   on_error=config.on_error, overlong=config.overlong)
            for url in (urls or (None,))
        ]  # fmt: skip
        self._pins: list[Identity] = []
        self._counts: Counter[str] = Counter()

    def connect(self, *, hasty: bool = True) -> list[str]:
        """Ask every endpoint who it is, and hold it to that. Raises PlauditError, `hasty` within seconds, so that a
        mistyped URL is an error at once; a line for each."""
        found = [(one.with_options(retry=_HASTY) if hasty else one).info().identity for one in self._clients]
        self._pins = self._pins or found
        for place, identity in enumerate(found):
            self._compare(place, identity)
        return [f"{client.settings.url}: {one}" for client, one in zip(self._clients, found, strict=True)]

    def expect(self, tokens: int) -> None:
        """Warn if a prompt and its response may be too long for a model: responses may grow late in a run."""
        for client in self._clients if self._config.overlong == "error" else ():
            Ledger(client.settings.base_url, tokens).compare(client.info())

    def submit(self, groups: Sequence[Group]) -> Promise:
        items = [{"prompt": prompt, "responses": list(responses)} for prompt, responses in groups if responses]
        begun = [started(client.score_items, items) for client in self._clients]

        def wait() -> Scores:
            return np.stack([self._checked(place, future.result()) for place, future in enumerate(begun)])

        return wait

    def counts(self) -> Mapping[str, float]:
        counts = {"reward/failed": 0.0, "reward/revision_changes": 0.0} | {n: float(c) for n, c in self._counts.items()}
        self._counts.clear()
        return counts

    def state(self) -> Mapping[str, Any]:
        return {"pins": [[pin.model, pin.revision, pin.numerics] for pin in self._pins]}

    def put_back(self, state: Mapping[str, Any]) -> None:
        pins = [Identity(*pin) for pin in state["pins"]]
        if len(pins) != len(self._clients):
            raise RevisionChanged(f"the run began with {len(pins)} endpoints and goes on with {len(self._clients)}")
        now, self._pins = self._pins, pins
        for place, identity in enumerate(now):
            self._compare(place, identity)

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def _checked(self, place: int, answer: Answer) -> Scores:
        if answer.identity is not None:
            self._compare(place, answer.identity)
        for result in answer.failed:
            code = result.error.code if result.error else "unknown"
            self._counts["reward/failed"] += 1
            self._counts[f"reward/failed/{code}"] += 1
        return answer.numpy()

    def _compare(self, place: int, identity: Identity) -> None:
        pin = self._pins[place]
        if identity == pin:
            return
        text = f"{self._clients[place].settings.url} answers as {identity}, not as {pin} any more"
        if self._config.pin:
            raise RevisionChanged(f"{text}: rewards of two models must not be mixed; serve the first again")
        LOG.warning("%s: rewards from here on are of another model", text)
        self._counts["reward/revision_changes"] += 1
        self._pins[place] = identity
