"""What waits to be scored, and what is scored together. No clock, no asyncio, no torch."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from operator import attrgetter, itemgetter
from typing import Literal

from plaudit_model.packing import Group, Ids, common_prefix

from .domain import Priority, Work


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One item of one request, on its way to an answer. Times are seconds of one monotonic clock; `key` is
    equal for items whose scores are equal; `size` is how many tokens its request has
    to compute, `client` whose turn it takes."""

    work: Work
    key: bytes
    priority: Priority
    arrived: float
    deadline: float | None = None
    size: int = 0
    client: str = ""


@dataclass(slots=True, eq=False)
class Entry:
    """One distinct sequence, with every job that waits for its score.

    `order` compares as the token ids do, lexicographically: sequences that begin alike lie side by side.
    `jobs` is a dict used as an ordered set. The batcher owns all that changes: who waits, how urgently, and
    whether the sequence waits its turn, waits to be run again (`suspect`) or is with the worker (`running`).
    """

    work: Work
    key: bytes
    priority: Priority
    arrived: float
    size: int
    client: str
    order: bytes
    jobs: dict[Job, None] = field(default_factory=dict)
    state: Literal["waiting", "suspect", "running"] = "waiting"

    @classmethod
    def of(cls, job: Job) -> Entry:
        order = job.work.ids.astype(">i4").tobytes() + job.work.prompt_tokens.to_bytes(4, "big")
        return cls(job.work, job.key, job.priority, job.arrived, job.size, job.client, order, {job: None})

    @property
    def ids(self) -> Ids:
        return self.work.ids

    @property
    def tokens(self) -> int:
        return len(self.work.ids)


Family = tuple[Entry, ...]
"""Entries whose common token prefix is computed once."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What goes through one forward. A `suspect` batch holds what was in flight when a worker was lost, a `deadly` one
    what was lost with two."""

    families: tuple[Family, ...]
    suspect: bool = False
    deadly: bool = False

    @property
    def entries(self) -> tuple[Entry, ...]:
        """In the order of the rows of the answer."""
        return tuple(entry for family in self.families for entry in family)

    def groups(self) -> tuple[Group, ...]:
        """As the packer wants it; `indices` count through `entries`."""
        groups, first = [], 0
        for family in self.families:
            groups.append(_group(family, first))
            first += len(family)
        return tuple(groups)

    def halves(self) -> tuple[Batch, Batch]:
        """Two suspect batches; families are cut in at most one place."""
        middle = len(self.entries) // 2
        return self._part(0, middle), self._part(middle, len(self.entries))

    def wanted(self) -> Batch | None:
        """The batch without the entries that nobody waits for any more; None if nothing is left."""
        families = tuple(kept for family in self.families if (kept := tuple(e for e in family if e.jobs)))
        return replace(self, families=families) if families else None

    def _part(self, start: int, stop: int) -> Batch:
        families, first = [], 0
        for family in self.families:
            part = family[max(start - first, 0) : max(stop - first, 0)]
            first += len(family)
            if part:
                families.append(part)
        return Batch(tuple(families), suspect=True, deadly=self.deadly)


def _group(family: Sequence[Entry], first: int) -> Group:
    sequences = [entry.ids for entry in family]
    shared = common_prefix(sequences) if len(family) > 1 else 0
    return Group(
        prefix=sequences[0][:shared],
        suffixes=tuple(ids[shared:] for ids in sequences),
        indices=tuple(range(first, first + len(family))),
        boundaries=tuple(entry.work.prompt_tokens for entry in family),
    )


@dataclass(slots=True, eq=False)
class _Own:
    """What waits for one client, in order of arrival."""

    entries: OrderedDict[bytes, Entry] = field(default_factory=OrderedDict)
    tokens: int = 0
    fair: bool = True

    def leaders(self, most: int) -> list[Entry]:
        """So many, in order of arrival, and the next time those of short requests first."""
        self.fair = not self.fair
        entries = self.entries.values()
        return sorted(entries, key=attrgetter("size"))[:most] if self.fair else list(islice(entries, most))


class Line:
    """Entries of one class. The client that has been given nothing for longest comes first."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, _Own] = OrderedDict()
        self.tokens = 0

    @property
    def oldest(self) -> float:
        """When the first arrived of those who wait; infinity if nobody does."""
        return min((next(iter(own.entries.values())).arrived for own in self._clients.values()), default=float("inf"))

    def leads(self, entry: Entry) -> bool:
        """It is the next of its client."""
        own = self._clients.get(entry.client)
        return own is not None and next(iter(own.entries.values())) is entry

    def share(self, client: str) -> tuple[int, int]:
        """The tokens of a client, and how many clients there are, with it."""
        own = self._clients.get(client)
        return (own.tokens, len(self._clients)) if own else (0, len(self._clients) + 1)

    def leaders(self, most: int) -> Iterator[Entry]:
        """In turns that give each client as many tokens, of a line that is not empty: the first so many, at least."""
        first, *others = islice(self._clients.values(), most)
        turns = (first.leaders(most), *(list(islice(own.entries.values(), most)) for own in others))
        given = (zip(accumulate((entry.tokens for entry in turn), initial=0), turn, strict=False) for turn in turns)
        return (entry for _, entry in heapq.merge(*given, key=itemgetter(0)))

    def add(self, entry: Entry, *, front: bool = False) -> None:
        own = self._clients.get(entry.client) or self._clients.setdefault(entry.client, _Own())
        own.entries[entry.key] = entry
        own.entries.move_to_end(entry.key, last=not front)
        if front:
            self._clients.move_to_end(entry.client, last=False)
        own.tokens += entry.tokens
        self.tokens += entry.tokens

    def remove(self, entry: Entry) -> None:
        own = self._clients[entry.client]
        del own.entries[entry.key]
        own.tokens -= entry.tokens
        self.tokens -= entry.tokens
        if not own.entries:
            del self._clients[entry.client]

    def take(self, entry: Entry) -> None:
        """Remove it to be computed: that was its client's turn."""
        self._clients.move_to_end(entry.client)
        self.remove(entry)
