"""Training and held-out records that share no conversation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from plaudit_model.records import Record

from .errors import DataError


def split_by_conversation(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, held out), both in the order of `records`; about `share` of the conversations are held out.

    The side of a conversation is a function of the seed and its own key: to add or remove records moves no
    other. Raises DataError if that leaves a side empty.
    """
    if not 0 < share < 1:
        raise DataError(f"the share to hold out must lie between 0 and 1, got {share}")
    held_out = {key: _fraction(seed, key) < share for key in {record.conversation() for record in records}}
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        sides[held_out[record.conversation()]].append(record)
    if not all(sides):
        empty = "training" if sides[1] else "held-out"
        raise DataError(f"of {len(held_out):,} conversations none falls on the {empty} side (share {share:g}, seed "
                        f"{seed}); name files to evaluate on, or choose another share or seed")  # fmt: skip
    return sides


def _fraction(seed: int, key: str) -> float:
    """A number in [0, 1), even over keys."""
    digest = hashlib.sha256(f"plaudit split {seed} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
