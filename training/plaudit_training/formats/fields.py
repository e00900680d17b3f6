"""Typed access to the columns of a row. Everything raises BadRow; `path` is how a message names the place."""

from __future__ import annotations

import math
from typing import Any, cast, get_args

from plaudit_model.records import LabelSource, Message, Origin, Role

from ..errors import BadRow
from .format import Columns

_LONGEST_LABEL = 40
MOST_MARGIN = 1e6
"""Beyond what any scale of scores needs: one that fp32 cannot hold would cost the whole step that it is in."""


def value(row: Columns, key: str, path: str = "") -> Any:
    """The value of a column that must be there and not null."""
    if row.get(key) is None:
        raise BadRow("missing_key", f"{path or key} is " + ("null" if key in row else "absent"))
    return row[key]


def text(row: Columns, key: str, path: str = "") -> str:
    """A text that can be UTF-8. May be empty."""
    return as_text(value(row, key, path), path or key)


def as_text(found: Any, path: str) -> str:
    if not isinstance(found, str):
        raise BadRow("wrong_type", f"{path} should be text, is {type(found).__name__}")
    try:
        found.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("lone_surrogate", f"{path}, character {error.start}") from None
    return found


def table(row: Columns, key: str, path: str = "") -> dict[str, Any]:
    """A nested object."""
    found = value(row, key, path)
    if not isinstance(found, dict):
        raise BadRow("wrong_type", f"{path or key} should be an object, is {type(found).__name__}")
    return found


def rows(row: Columns, key: str, path: str = "") -> list[Any]:
    """A list."""
    found = value(row, key, path)
    if not isinstance(found, list):
        raise BadRow("wrong_type", f"{path or key} should be a list, is {type(found).__name__}")
    return found


def turns(row: Columns, key: str) -> tuple[Message, ...]:
    """A list of {role, content}."""
    return tuple(_message(turn, f"{key}[{i}]") for i, turn in enumerate(rows(row, key)))


def margin(row: Columns) -> float | None:
    """TRL's `margin`: a finite number, or None where the column is absent, null or an empty cell."""
    found = row.get("margin")
    if found is None or found == "":
        return None
    try:
        number = math.nan if isinstance(found, bool) else float(found)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= MOST_MARGIN:
        raise BadRow("bad_margin", f"margin is no number within {MOST_MARGIN:g}")
    return number


def source(row: Columns) -> LabelSource:
    """Who gave the label: people, where the column is absent or says something else, such as a data set's name."""
    found = row.get("source")
    return cast(LabelSource, found) if found in get_args(LabelSource) else "human"


def quoted(label: Any) -> str:
    """A label for a message. What is too long for one may be a text, which no message quotes."""
    shown = repr(label)
    return shown if len(shown) <= _LONGEST_LABEL else f"a {type(label).__name__} of {len(shown):,} characters"


def record_id(row: Columns, origin: Origin) -> str:
    """The row's `id`, or its place where it has none."""
    found = row.get("id")
    if found is None or found == "":
        return f"{origin.file}:{origin.line}"
    return str(found) if isinstance(found, int) else as_text(found, "id")


def refuse(row: Columns, *keys: str, path: str = "") -> None:
    """Columns whose content would change what is scored, and which are not read, must be empty."""
    for key in keys:
        if row.get(key):
            raise BadRow("unsupported", f"{path}{key} is not read")


def _message(turn: Any, path: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow("wrong_type", f"{path} should be an object, is {type(turn).__name__}")
    refuse(turn, "tool_calls", "function_call", "reasoning_content", path=f"{path}.")
    if isinstance(turn.get("content"), list):
        raise BadRow("unsupported", f"{path}.content has parts; only text is read")
    role, content = value(turn, "role", f"{path}.role"), text(turn, "content", f"{path}.content")
    if role not in get_args(Role):
        raise BadRow("wrong_type", f"{path}.role should be one of {', '.join(get_args(Role))}")
    return Message(role, content)
