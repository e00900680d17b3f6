"""What people said of responses: the one noun that flows through training. Imports nothing heavy.

A `Record` is a prompt, its responses and the comparisons among them, with where it came from. Loaders build
records, everything after them reads records; nothing is a dict past the loader.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["system", "user", "assistant", "tool"]
Outcome = Literal["first", "second", "tie"]
LabelSource = Literal["human", "ai", "verifier", "synthetic"]

_WHITE_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"role must be one of {', '.join(get_args(Role))}, got {self.role!r}")


Conversation = tuple[tuple[Message, ...], str]
"""A prompt and the response to it."""


@dataclass(frozen=True, slots=True)
class Votes:
    """How many people preferred the first response, the second, or neither."""

    first: int
    second: int
    tie: int = 0

    @property
    def total(self) -> int:
        return self.first + self.second + self.tie


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was collected about two responses of one record.

    `first` and `second` index `Record.responses`. `margin` is TRL's: by how much the preferred response
    should win, on the score's scale. A column that was absent is None, never 0.
    """

    first: int
    second: int
    outcome: Outcome
    votes: Votes | None = None
    margin: float | None = None
    annotators: tuple[str, ...] = ()
    source: LabelSource = "human"

    def share(self) -> float:
        """The share of votes for the first response, ties counted half; 1, 0 or 0.5 without votes."""
        if self.votes is not None and self.votes.total:
            return (self.votes.first + 0.5 * self.votes.tie) / self.votes.total
        return {"first": 1.0, "second": 0.0, "tie": 0.5}[self.outcome]


@dataclass(frozen=True, slots=True)
class Origin:
    """The place a record was read from: `line` counts from 1."""

    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Record:
    """A prompt, N responses to it, and the comparisons among them."""

    id: str
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    origin: Origin
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for comparison in self.comparisons:
            if not (0 <= comparison.first < len(self.responses) and 0 <= comparison.second < len(self.responses)):
                raise ValueError(f"record {self.id}: a comparison names a response that is not there")
            if comparison.first == comparison.second:
                raise ValueError(f"record {self.id}: a comparison of a response with itself")

    def conversation(self) -> str:
        """Key of the conversation this record belongs to: a hash of the first user turn, case and white
        space evened out. A split by this key never puts one conversation on both sides."""
        for message in self.prompt:
            if message.role == "user":
                text = message.content
                break
        else:
            text = "\n".join(m.content for m in self.prompt)
        normal = _WHITE_SPACE.sub(" ", text).strip().lower()
        return hashlib.sha256(normal.encode("utf-8", "surrogatepass")).hexdigest()[:24]
