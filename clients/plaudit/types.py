"""The values that the client takes and gives. All frozen; none of them needs anything but the standard library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from .errors import ItemFailed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OnError = Literal["raise", "none"]


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Prompt = str | Sequence[Message]
"""A text (one user message) or the messages of a conversation."""

Item = Mapping[str, Any] | tuple[Prompt, str]
"""One of the native shapes (see `plaudit._items.SHAPES`), or a pair (prompt, response)."""


def system(content: str) -> Message:
    """A system message."""
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """An assistant's message."""
    return {"role": "assistant", "content": content}


@dataclass(frozen=True, slots=True)
class Truncation:
    """What was cut from an item: the side and the number of tokens."""

    side: str
    tokens: int


@dataclass(frozen=True, slots=True)
class ItemError:
    """Why an item has no score. `code` is stable; `retryable` says that the item itself may be fine."""

    code: str
    message: str
    retryable: bool = False


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """What became of one response. `score` is None exactly when `error` is not.

    `index` is the position in the flattened input; `item_index` and `response_index` say which item, and which
    of its `responses`, it was. `attributes` are the raw heads (with `include=("attributes",)`); `extra` is
    whatever else the server said of the item.
    """

    score: float | None
    index: int = 0
    item_index: int = 0
    response_index: int | None = None
    tokens: int | None = None
    truncated: Truncation | None = None
    cached: bool = False
    attributes: Mapping[str, float] | None = None
    error: ItemError | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __float__(self) -> float:
        """The score. Raises ItemFailed if there is none: an error is never a number."""
        if self.score is None:
            error = self.error or ItemError("unknown", "the server gave no reason")
            raise ItemFailed(f"no score: {error.code}: {error.message}", code=error.code, index=self.index)
        return self.score


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompts, of everything, and how many of them were shared or came from the cache."""

    prompt_tokens: int = 0
    total_tokens: int = 0
    shared_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds the server spent, summed over the requests that one call was cut into."""

    queue_ms: float = 0.0
    tokenize_ms: float = 0.0
    compute_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Identity:
    """What gave the scores: the model, its revision, and the mode, dtype and backend it was computed in.

    Two names of one revision are the same model.
    """

    model: str = field(compare=False)
    revision: str
    numerics: str

    def __str__(self) -> str:
        return f"{self.model}@{self.revision} ({self.numerics})"


@dataclass(frozen=True, slots=True)
class Scores(Sequence[ScoreResult]):
    """The results of one call, in the order of the flattened input. `identity` is None if nothing was scored."""

    results: tuple[ScoreResult, ...]
    identity: Identity | None = None
    transform: str = "none"
    request_ids: tuple[str, ...] = ()
    usage: Usage = Usage()
    timing: Timing = Timing()

    @overload
    def __getitem__(self, index: int) -> ScoreResult: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ScoreResult, ...]: ...
    def __getitem__(self, index: int | slice) -> ScoreResult | tuple[ScoreResult, ...]:
        return self.results[index]

    def __len__(self) -> int:
        return len(self.results)

    @property
    def scores(self) -> list[float | None]:
        """The scores alone; None where an item has none."""
        return [result.score for result in self.results]

    @property
    def failed(self) -> tuple[ScoreResult, ...]:
        """The results without a score."""
        return tuple(result for result in self.results if result.score is None)

    @property
    def unfinished(self) -> ItemError | None:
        """The first error that may go away: an item that may yet get a score."""
        return next((r.error for r in self.failed if r.error is not None and r.error.retryable), None)

    @property
    def model(self) -> str | None:
        return self.identity.model if self.identity else None

    @property
    def revision(self) -> str | None:
        return self.identity.revision if self.identity else None

    @property
    def numerics(self) -> str | None:
        return self.identity.numerics if self.identity else None

    @property
    def request_id(self) -> str | None:
        """The id of the (first) request, for the server's logs."""
        return self.request_ids[0] if self.request_ids else None

    def numpy(self) -> NDArray[np.float64]:
        """The scores as an array (N,) float64; NaN where an item has none. Needs numpy."""
        import numpy as np

        return np.array([np.nan if score is None else score for score in self.scores], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Ranking:
    """The responses to one prompt, best first. `index` of a result is the response's place in the input.

    Equal scores keep the order of the input. Responses without a score are in `failed`, never ranked.
    """

    results: tuple[ScoreResult, ...]
    failed: tuple[ScoreResult, ...]
    identity: Identity | None

    @property
    def order(self) -> list[int]:
        """The places of the responses in the input, best first."""
        return [result.index for result in self.results]

    @property
    def best(self) -> ScoreResult:
        """The best response. Raises ItemFailed if none has a score."""
        if self.results:
            return self.results[0]
        code = self.failed[0].error.code if self.failed and self.failed[0].error else "empty_input"
        raise ItemFailed("no response has a score, so none is the best", code=code)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Response A against response B: `margin` = score(A) - score(B), `probability` that A is the better one.

    `tie_probability` is there only if the model has a fitted tie model.
    """

    probability: float
    margin: float
    identity: Identity
    tie_probability: float | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What `/info` says. The limits are per request; `details` is the whole answer."""

    identity: Identity
    max_items: int
    max_body_bytes: int
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One HTTP attempt of a call, as `Settings.on_attempt` hears of it: `number` counts from 1; `seconds` until its
    answer was complete or it had failed; `failure`: what went wrong, in words that hold no prompt, None if nothing."""

    url: str
    number: int
    items: int
    seconds: float
    failure: str | None
