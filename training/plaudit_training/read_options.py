"""How preference files are to be read: one frozen object, the same for `plaudit data` and `plaudit train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from . import formats
from .errors import OptionError

Ties = Literal["drop", "half", "keep"]
"""What becomes of a comparison without a winner.

drop  it is not used, and counted
half  it is used with the label 0.5; where its votes lean to one side they are set aside, and counted
keep  it is used with its votes as they are: vote-share labels then follow the votes
"""


@dataclass(frozen=True)
class ReadOptions:
    """`columns` maps our names to the file's (`prompt` -> `question`), `labels` the file's labels to `a`, `b`
    or `tie`. With `strict_ids` (a file with an id a line, may be .gz) only rows with those ids are used.

    `max_row_bytes` bounds a row in bytes of the uncompressed file. `starter_records` and `seed` say what the
    path `starter` stands for. Without `quarantine` bad rows are counted but not listed in a file.

    Raises OptionError for a name that does not exist.
    """

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    strict_ids: Path | None = None
    ties: Ties = "half"
    max_bad_rows: int = 0
    quarantine: Path | None = None
    quarantine_text: bool = False
    max_row_bytes: int = 8 << 20
    starter_records: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        known = formats.all_formats(self.labels)
        _expect("format", self.format, ("auto", *known))
        _expect("ties", self.ties, get_args(Ties))
        columns = sorted(frozenset[str]().union(*(format.columns for format in known.values())))
        for ours in self.columns:
            _expect("columns", ours, columns)
        for name in ("max_bad_rows", "max_row_bytes", "starter_records"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name} must not be negative, got {getattr(self, name)}")


def read_options(
    *, format: str = "auto", columns: str = "", labels: str = "", strict_ids: Path | None = None, ties: str = "half",
    max_bad_rows: int = 0, quarantine: Path | None = None, quarantine_text: bool = False,
) -> ReadOptions:  # fmt: skip
    """ReadOptions from what a command line gives: maps are written `ours=theirs,...`. Raises OptionError."""
    _expect("ties", ties, get_args(Ties))
    return ReadOptions(
        format=format, columns=parse_map(columns, "columns"), labels=parse_map(labels, "labels"),
        strict_ids=strict_ids, ties=ties, max_bad_rows=max_bad_rows,  # type: ignore[arg-type]  # checked above
        quarantine=quarantine, quarantine_text=quarantine_text,
    )  # fmt: skip


def parse_map(text: str, option: str) -> dict[str, str]:
    """`a=b,c=d` as a mapping. Raises OptionError if it is written otherwise, or names a key twice."""
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value) or key in found:
            raise OptionError(f"--{option} is written name=name,name=name, each name once; got {text!r}")
        found[key] = value
    return found


def _expect(option: str, value: str, known: tuple[str, ...] | list[str]) -> None:
    if value not in known:
        raise OptionError(f"{option}: expected one of {', '.join(known)}, got {value!r}")
