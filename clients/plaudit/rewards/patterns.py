"""The operator's patterns on texts of a model. A search ends: one that backtracks without end is given up."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from .._extras import install
from ..errors import ConfigurationError

SECONDS = 0.5
"""A search, or one for all matches, may compute for so long; on any text of a response's length a sane pattern needs
milliseconds. A process that stands still computes nothing."""


@functools.lru_cache(maxsize=1024)
def compiled(pattern: str) -> Any:
    """Raises ValueError if it is no pattern, ConfigurationError if what matches them is not installed."""
    try:
        import regex
    except ImportError:
        raise ConfigurationError(f"patterns need regex: {install('rewards')}") from None
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{pattern!r} is no pattern: {error}") from None


def found(pattern: str, text: str, *, whole: bool = False) -> bool:
    """Whether the pattern is found in the text, or matches all of it. Raises TimeoutError."""
    one = compiled(pattern)
    search = one.fullmatch if whole else one.search
    return search(text, timeout=SECONDS, concurrent=True) is not None


def last(pattern: str, text: str) -> str | None:
    """The last match, its first group if it has one; None if there is none. Raises TimeoutError."""
    matches = deque(compiled(pattern).finditer(text, timeout=SECONDS, concurrent=True), maxlen=1)
    return str(matches[0][1 if matches[0].re.groups else 0] or "") if matches else None


def bounded(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A JSON schema whose patterns are searched as those of terms are. Raises ValueError for what cannot be: a
    `patternProperties`, another dialect inside of it, or a pattern that is none."""
    bare = {key: value for key, value in schema.items() if key != "$schema"}
    for key, value in _members(bare):
        if key in ("$schema", "patternProperties"):
            raise ValueError(f"{key} is not supported; for names of fields, propertyNames with a pattern is")
        if key == "pattern" and isinstance(value, str):
            compiled(value)
    return bare


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
        value = list(value.values())
    for part in value if isinstance(value, list) else ():
        yield from _members(part)
