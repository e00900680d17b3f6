"""What the command line scores with: a server, or a model loaded in this process. Both give `Scores`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from . import _wire
from ._client import Client
from ._extras import install
from ._items import Limits, pieces, plan_chunks
from ._retry import RetryPolicy
from ._settings import Overlong, Priority, environment_url
from .errors import ConfigurationError, RevisionChanged, Unavailable
from .types import Comparison, Identity, Item, Prompt, Scores

LOCAL_GROUP = "plaudit.local_scorers"
HASTY = RetryPolicy(retries=3)
"""Of the first question, so that a mistyped URL is an error at once."""
UNLIMITED = Limits(sys.maxsize, sys.maxsize)


class Scorer(Protocol):
    """`score_items` gives failed items beside scored ones, and raises if nothing can be scored now.

    `ahead`: how many calls of it may run at the same time.
    """

    ahead: int
    identity: Identity

    def score_items(self, items: Sequence[Item]) -> Scores: ...
    def compare(self, prompt: Prompt, response_a: str, response_b: str) -> Comparison: ...


class ServerScorer:
    """A server. An item that failed for want of the server is no result: the call raises."""

    def __init__(self, client: Client, ahead: int) -> None:
        self._client = client.with_options(on_error="none")
        self.ahead = ahead
        self.identity = client.with_options(retry=HASTY).info().identity

    def score_items(self, items: Sequence[Item]) -> Scores:
        scores = self._client.score_items(items)
        if error := scores.unfinished:
            raise Unavailable(f"not everything could be scored: {error.code}: {error.message}")
        return scores

    def compare(self, prompt: Prompt, response_a: str, response_b: str) -> Comparison:
        return self._client.compare(prompt, response_a, response_b)


class LocalScorer:
    """A model in this process, behind an entry point of `plaudit.local_scorers`. Its results are checked like a
    server's."""

    ahead = 1

    def __init__(self, scorer: Any, revision: str | None) -> None:
        self._scorer = scorer
        self._info: Mapping[str, Any] = scorer.info()
        self.identity = _wire.parse_identity(self._info)
        if revision not in (None, self.identity.revision):
            raise RevisionChanged(f"{self.identity.model} is revision {self.identity.revision}, not {revision}")

    def score_items(self, items: Sequence[Item]) -> Scores:
        chunks = plan_chunks(pieces(items), UNLIMITED)
        places = chunks[0].places if chunks else ()
        return Scores(_wire.parse_results(self._scorer.score_items(list(items)), places), self.identity)

    def compare(self, prompt: Prompt, response_a: str, response_b: str) -> Comparison:
        temperature = self._info.get("temperature")
        if temperature is None:
            raise ConfigurationError(
                f"{self.identity.model} has no fitted temperature, which a probability needs; `plaudit rank` needs none"
            )
        a, b = map(float, self.score_items([{"prompt": prompt, "responses": [response_a, response_b]}]))
        return Comparison(0.5 * (1 + math.tanh((a - b) / temperature / 2)), a - b, self.identity)


@contextmanager
def open_scorer(
    url: str | None, model: str | None, *, timeout: float, attempt_timeout: float = 0.0, overlong: Overlong,
    revision: str | None = None, concurrency: int = 1, priority: Priority | None = None,
) -> Iterator[Scorer]:  # fmt: skip
    """A server's scorer if a URL is given or, unless `model` is a directory, set in the environment; else the
    model's own. `timeout` 0 means no limit, `attempt_timeout` 0 an automatic one."""
    if url is None and not (model and Path(model).is_dir()):
        url = environment_url()
    if url is None and model is None:
        raise ConfigurationError("nothing to score with: pass --url (or set PLAUDIT_URL), or --model with a directory")
    if url is None:
        found = list(entry_points(group=LOCAL_GROUP))
        if not found:
            raise ConfigurationError(f"no local scorer is installed: {install('model')}, or pass --url")
        yield LocalScorer(found[0].load()(model, overlong=overlong), revision)
        return
    limits: dict[str, Any] = {"timeout": timeout or None, "attempt_timeout": attempt_timeout or None}
    limits["retry"] = RetryPolicy(retries=None)  # `timeout` is the limit, as its help says
    about: dict[str, Any] = {"model": model, "revision": revision, "overlong": overlong, "priority": priority}
    with Client(url, concurrency=concurrency, **limits, **about) as client:
        yield ServerScorer(client, ahead=concurrency)
