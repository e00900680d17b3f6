"""How preference files are to be read: one frozen object, the same for `plaudit data` and `plaudit train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from plaudit._trees import option

from .errors import OptionError

Ties = Literal["drop", "half", "keep"]
"""What becomes of a comparison without a winner.

drop  it is not used, and counted
half  it is used with the label 0.5; where its votes lean to one side they are set aside, and counted
keep  it is used with its votes as they are: vote-share labels then follow the votes
"""


READ = {name: name for name in ("format", "columns", "labels", "strict_ids", "ties", "max_bad_rows")}
"""The options of a command that reads preference files."""


@dataclass(frozen=True)
class ReadOptions:
    """`columns` maps our names to the file's (`prompt` -> `question`), `labels` the file's labels to `a`, `b`
    or `tie`. With `strict_ids` (a file with an id a line, may be .gz) only rows with those ids are used.

    `max_row_bytes` bounds a row in bytes of the uncompressed file. `starter_records` and `seed` say what the
    path `starter` stands for. Without `quarantine` bad rows are counted but not listed in a file.

    Raises OptionError for a name that does not exist.
    """

    format: str = option("auto", "auto (by the columns), hh-rlhf, preference, pairs or ukpconvarg1")
    columns: Mapping[str, str] = option(
        {}, "our column = theirs: prompt=question,chosen=good,rejected=bad, or response_a=x,response_b=y,label=z"
    )
    labels: Mapping[str, str] = option({}, "what their labels say: 1=a,2=b,0=tie; known without it: a, b, 1, 2, tie")
    strict_ids: Path | None = option(None, "use only the rows whose id this file lists, one a line (may be .gz)")
    ties: Ties = option("half", "half: used with the label 0.5; keep: with their votes as they are; drop: not used")
    max_bad_rows: int = option(0, "bad rows to tolerate; all are counted either way")
    quarantine: Path | None = None
    quarantine_text: bool = False
    max_row_bytes: int = 8 << 20
    starter_records: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        from . import formats  # which the command line would load for its help

        known = formats.all_formats(self.labels)
        _expect("format", self.format, ("auto", *known))
        _expect("ties", self.ties, get_args(Ties))
        columns = sorted(frozenset[str]().union(*(format.columns for format in known.values())))
        for ours in self.columns:
            _expect("columns", ours, columns)
        for name in ("max_bad_rows", "max_row_bytes", "starter_records"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name} must not be negative, got {getattr(self, name)}")


def read_options(**given: Any) -> ReadOptions:
    """ReadOptions from what a command line gives: maps are written `ours=theirs,...`, None is the default. Raises
    OptionError."""
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name in {"columns", "labels"} & chosen.keys():
        chosen[name] = parse_map(chosen[name], name)
    return ReadOptions(**chosen)


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
