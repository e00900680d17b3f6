"""What a stream of records holds, in characters: no tokenizer needed."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from plaudit_model.records import Record

from .lengths import LongerWins, Percentiles


@dataclass
class Summary:
    """Filled record by record; holds the first record and a few bytes for each other."""

    records: int = 0
    comparisons: int = 0
    conversations: set[bytes] = field(default_factory=set)
    turns: Counter[int] = field(default_factory=Counter)
    wins: LongerWins = field(default_factory=LongerWins)
    first: Record | None = None
    prompt_lengths: array[int] = field(default_factory=lambda: array("L"))
    response_lengths: array[int] = field(default_factory=lambda: array("L"))

    def add(self, record: Record) -> None:
        self.first = self.first or record
        self.records += 1
        self.comparisons += len(record.comparisons)
        self.conversations.add(bytes.fromhex(record.conversation()))
        self.turns[len(record.prompt)] += 1
        lengths = [len(text) for text in record.responses]
        self.prompt_lengths.append(sum(len(message.content) for message in record.prompt))
        self.response_lengths.extend(lengths)
        for comparison in record.comparisons:
            self.wins.add(comparison, lengths)

    def to_json(self) -> dict[str, Any]:
        """Counts and lengths; null where there is nothing to compute from."""
        return {
            "records": self.records, "comparisons": self.comparisons, "conversations": len(self.conversations),
            "turns_of_prompts": {str(turns): count for turns, count in sorted(self.turns.items())},
            "prompt_characters": _json(Percentiles.of(self.prompt_lengths)),
            "response_characters": _json(Percentiles.of(self.response_lengths)),
            "longer_wins": {"share": self.wins.share, **asdict(self.wins)},
        }  # fmt: skip

    def sentences(self) -> list[str]:
        """The same for people."""
        return [
            f"{self.records:,} records of {len(self.conversations):,} conversations, {self.comparisons:,} comparisons",
            f"characters of prompts: {Percentiles.of(self.prompt_lengths) or 'not computable'}",
            f"characters of responses: {Percentiles.of(self.response_lengths) or 'not computable'}",
            f"length: {self.wins}",
        ]


def _json(percentiles: Percentiles | None) -> dict[str, int] | None:
    return asdict(percentiles) if percentiles else None
