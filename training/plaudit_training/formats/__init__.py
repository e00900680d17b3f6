"""The formats that are read, and how one is told from another by the columns of its first rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ..errors import DataError
from . import hh_rlhf, pairs, preference, ukpconvarg1
from .format import Columns, Format, Reading

NAMES = ("hh-rlhf", "preference", "pairs", "ukpconvarg1")

__all__ = ["NAMES", "Columns", "Format", "Reading", "all_formats", "detect"]


def all_formats(labels: Mapping[str, str]) -> dict[str, Format]:
    """Every format by its name. `labels` is the label map of `pairs`. Raises OptionError."""
    formats = (hh_rlhf.FORMAT, preference.FORMAT, pairs.format_for(labels), ukpconvarg1.FORMAT)
    return {format.name: format for format in formats}


def detect(rows: Sequence[Columns], formats: Mapping[str, Format]) -> Format:
    """The format that most of the rows look like. Raises DataError if none or several do."""
    matches = Counter(name for row in rows for name, format in formats.items() if format.matches(row))
    most = max(matches.values(), default=0)
    names = [name for name in formats if matches[name] == most]
    if not most:
        known = "; ".join(f"{format.name} ({format.description})" for format in formats.values())
        columns = ", ".join(dict.fromkeys(key for row in rows for key in row))
        raise DataError(f"no known format has the columns {columns}; name one with --format, or map the columns "
                        f"with --columns prompt=...,chosen=...,rejected=...: {known}")  # fmt: skip
    if len(names) > 1:
        raise DataError(f"the rows could be {' or '.join(names)}; say which with --format")
    return formats[names[0]]
