"""Everything this package raises on purpose about data.

DataError          the data cannot be used as it is
  BadRows          more rows are bad than may be; the message counts them and names the quarantine file
  PreflightError   training on this would be wrong; the message names each problem
OptionError        how to read was said wrongly: a format, a column, a label
BadRow             one row cannot be read; caught by the reader, never leaves it
Dropped            one row is well formed and says nothing; likewise
"""

from __future__ import annotations

from dataclasses import dataclass

from .reasons import BadReason, DropReason


class DataError(Exception):
    """Data that cannot be used as it is. `exit_code` is what the command line exits with."""

    exit_code = 65


class BadRows(DataError):
    """More rows are bad than `max_bad_rows` allows. Raised after all rows were read and all bad ones listed."""


class PreflightError(DataError):
    """A check before the first training step found what would make the run meaningless."""


class OptionError(Exception):
    """The options for reading are wrong; the message says what would be right."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Defect:
    """Why a row is bad. `detail` says where and what, and never quotes the row's text; a short label is none."""

    reason: BadReason
    detail: str


class BadRow(Exception):
    """One row cannot be read."""

    def __init__(self, reason: BadReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.defect = Defect(reason, detail)


class Dropped(Exception):
    """One row is well formed, but is not used."""

    def __init__(self, reason: DropReason) -> None:
        super().__init__(reason)
        self.reason = reason
