"""What one family of starter tasks must provide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Generic, TypeVar

Reference = TypeVar("Reference")


@dataclass(frozen=True, slots=True)
class Family(Generic[Reference]):
    """Three pure functions around one reference type, the data that an answer is checked against.

    draw        a new prompt and its reference
    quality     how good a response is, in [0, 1]; defined for every string, never raises
    candidates  responses of varying quality, in no particular order
    """

    draw: Callable[[Random], tuple[str, Reference]]
    quality: Callable[[Reference, str], float]
    candidates: Callable[[Reference, Random], list[str]]
