"""Who among the waiting begins with the same tokens.

Sequences are kept in lexicographic order of their token ids, with the length of the common prefix of each two
neighbours. In that order the common prefix of any two sequences is the smallest one between them, so the
relatives of a sequence are found by walking outwards from it, without comparing tokens again. It needs no
declared boundary: text that arrives already rendered shares its prompt just as well.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from operator import attrgetter

from plaudit_model.packing import MIN_SHARED, Ids

from .waiting import Entry

_order = attrgetter("order")


class PrefixIndex:
    """Entries in order. `tokens` is the size of their prefix tree: no packing of them can cost less.

    With `share` false (a model in which a prompt depends on its response) nobody is anybody's relative.
    """

    def __init__(self, *, share: bool) -> None:
        self._share = share
        self._entries: list[Entry] = []
        self._common: list[int] = []  # of entries i - 1 and i; _common[0] is 0
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> int:
        """Returns how many of its tokens were in the tree already."""
        at = bisect_left(self._entries, entry.order, key=_order)
        before = self.common(self._entries[at - 1], entry) if at else 0
        after = self.common(entry, self._entries[at]) if at < len(self._entries) else 0
        self._entries.insert(at, entry)
        self._common.insert(at, before)
        if at + 1 < len(self._common):
            self._common[at + 1] = after
        self.tokens += entry.tokens - max(before, after)
        return max(before, after)

    def remove(self, entry: Entry) -> None:
        at = self._position(entry)
        before, after = self._common[at], self._common_at(at + 1)
        del self._entries[at], self._common[at]
        if at < len(self._common):
            self._common[at] = min(before, after)
        self.tokens -= entry.tokens - max(before, after)

    def common(self, a: Entry, b: Entry) -> int:
        """Tokens that two entries, in the index or not, could share."""
        return _common_prefix(a.ids, b.ids) if self._share else 0

    def relatives(self, entry: Entry) -> Iterator[tuple[Entry, int]]:
        """Other entries with the length of the prefix they have in common with `entry`, nearest first.

        Ends on each side where the common prefix is not worth sharing, or where the next one has more than
        twice as much in common with those beyond it: it has a better family there.
        """
        at = self._position(entry)
        left, right = self._side(at, -1), self._side(at, +1)
        a, b = next(left, None), next(right, None)
        while a is not None or b is not None:
            if b is None or (a is not None and a[1] >= b[1]):
                assert a is not None
                yield a
                a = next(left, None)
            else:
                yield b
                b = next(right, None)

    def _side(self, at: int, step: int) -> Iterator[tuple[Entry, int]]:
        common = self._entries[at].tokens
        position = at + step
        while 0 <= position < len(self._entries):
            inner, outer = (position, position + 1) if step > 0 else (position + 1, position)
            common = min(common, self._common_at(inner))
            if common < MIN_SHARED or 2 * common < self._common_at(outer):
                return
            yield self._entries[position], common
            position += step

    def _common_at(self, position: int) -> int:
        return self._common[position] if position < len(self._common) else 0

    def _position(self, entry: Entry) -> int:
        at = bisect_left(self._entries, entry.order, key=_order)
        if at == len(self._entries) or self._entries[at] is not entry:
            raise KeyError("the entry is not in the index")
        return at


def _common_prefix(a: Ids, b: Ids) -> int:
    """All that they have in common, where `packing.common_prefix` leaves each a token of its own."""
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    return int(different.argmax()) if different.any() else length
