"""What became of every row that was read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plaudit_model.records import Origin

from .read_options import Ties
from .reasons import BAD, DROPPED, NOTED

_FIRST = 3
_MOST_COLUMNS = 40


@dataclass
class Tally:
    """Rows counted by reason, with the places of the first few and the detail of the very first."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[Origin]] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, reason: str, origin: Origin, detail: str = "") -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.details.setdefault(reason, detail)
        places = self.first.setdefault(reason, [])
        if len(places) < _FIRST:
            places.append(origin)

    def by_frequency(self) -> list[tuple[str, int]]:
        return sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))

    def places(self, reason: str) -> str:
        """`chosen is absent, at train.jsonl:3, 9, 12, ...`"""
        named, file = [], ""
        for origin in self.first[reason]:
            named.append(f"{origin.line}" if origin.file == file else f"{origin.file}:{origin.line}")
            file = origin.file
        named += ["..."] * (self.counts[reason] > len(named))
        return (f"{self.details[reason]}, at " if self.details[reason] else "") + ", ".join(named)

    def to_json(self) -> dict[str, Any]:
        return {
            reason: {"count": count, "first": [{"file": o.file, "line": o.line} for o in self.first[reason]]}
            for reason, count in self.by_frequency()
        }


@dataclass
class FileReport:
    """One file: how it was read, and the names of columns that no format looks at."""

    file: str
    format: str = ""
    detected: bool = False
    rows: int = 0
    columns_not_read: dict[str, None] = field(default_factory=dict)

    def ignore(self, columns: Iterable[str]) -> None:
        for name in columns:
            if len(self.columns_not_read) < _MOST_COLUMNS:
                self.columns_not_read.setdefault(name)


@dataclass
class ReadReport:
    """Every row read is in `used`, `quarantined` or `dropped`; `noted` rows are used. `ties` counts comparisons
    without a winner among the used and those dropped for it."""

    policy: Ties = "half"
    files: list[FileReport] = field(default_factory=list)
    read: int = 0
    used: int = 0
    quarantined: Tally = field(default_factory=Tally)
    dropped: Tally = field(default_factory=Tally)
    noted: Tally = field(default_factory=Tally)
    ties: int = 0
    voted: int = 0
    strict_ids_missing: int = 0
    quarantine: Path | None = None

    @property
    def duplicates(self) -> int:
        return self.dropped.counts.get("duplicate", 0)

    def check(self) -> None:
        """Nothing is lost. A failure is a defect of the reader."""
        accounted = self.used + self.quarantined.total + self.dropped.total
        if self.read != accounted:
            raise AssertionError(f"{self.read} rows were read, but {accounted} are accounted for")

    def conservation(self) -> str:
        """`read 100 = used 90 + quarantined 3 + dropped 7`"""
        return (
            f"read {self.read:,} = used {self.used:,} + quarantined {self.quarantined.total:,}"
            f" + dropped {self.dropped.total:,}"
        )

    def tie_sentence(self) -> str:
        """What happened to comparisons without a winner."""
        done = {
            "drop": "dropped",
            "half": "used with the label 0.5",
            "keep": "used with their votes as they are",
        }[self.policy]
        return f"{self.ties:,} ties, {done} (--ties {self.policy})"

    def complaint(self) -> str:
        """One line that says what was bad, where it began, and where the list is."""
        reasons = "; ".join(
            f"{reason} {count:,} ({self.quarantined.places(reason)})"
            for reason, count in self.quarantined.by_frequency()
        )
        listed = f"all are listed in {self.quarantine}" if self.quarantine else "name a --quarantine file to list them"
        return f"{self.quarantined.total:,} of {self.read:,} rows are bad: {reasons}; {listed}"

    def sentences(self) -> list[str]:
        """What a reader of the report must know, a sentence each, with counts and first places."""
        said = [self.tie_sentence()] if self.ties else []
        tables: tuple[tuple[str, Tally, Mapping[Any, str]], ...] = (
            ("bad", self.quarantined, BAD), ("dropped", self.dropped, DROPPED), ("noted", self.noted, NOTED),
        )  # fmt: skip
        for word, tally, meanings in tables:
            for reason, count in tally.by_frequency():
                said.append(f"{word} {count:,} {reason}: {meanings[reason]} ({tally.places(reason)})")
        for file in self.files:
            if file.columns_not_read:
                said.append(f"columns not read: {', '.join(file.columns_not_read)} ({file.file})")
        if self.strict_ids_missing:
            said.append(f"{self.strict_ids_missing:,} of the strict ids are in none of the files")
        return said

    def to_json(self) -> dict[str, Any]:
        """One object, for `--json` and for the lineage of a model."""
        return {
            "read": self.read, "used": self.used, "voted": self.voted,
            "quarantined": {"total": self.quarantined.total, "reasons": self.quarantined.to_json()},
            "dropped": {"total": self.dropped.total, "reasons": self.dropped.to_json()},
            "noted": self.noted.to_json(),
            "ties": {"policy": self.policy, "count": self.ties},
            "strict_ids_missing": self.strict_ids_missing,
            "quarantine": str(self.quarantine) if self.quarantine and self.quarantined.total else None,
            "files": [
                {"file": f.file, "format": f.format, "detected": f.detected, "rows": f.rows,
                 "columns_not_read": list(f.columns_not_read)}
                for f in self.files
            ],
        }  # fmt: skip
