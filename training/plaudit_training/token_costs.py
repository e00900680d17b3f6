"""What records cost in tokens: padded, packed, and packed with the prompt computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from plaudit_model.encode import Encoded, Encoder
from plaudit_model.errors import ItemError
from plaudit_model.packing import group_items
from plaudit_model.records import Record

from .lengths import LongerWins, Percentiles

PADDED_RECORDS = 16
"""Records in the padded batch that packing is compared with, in the order of the data."""


@dataclass(slots=True)
class TokenCosts:
    """Of `attempted` responses in `records` records some are `truncated` and some `unencodable`, by the error's
    code. The rest is counted over the `responses` of records that can be encoded whole: their lengths in
    tokens, prompt included, before any cut; and how many tokens there are to compute: `padded` batches, `tokens`
    without padding, `shared` with each prompt once.
    """

    max_length: int
    records: int
    attempted: int
    lengths: Percentiles | None = None
    responses: int = 0
    truncated: int = 0
    padded: int = 0
    tokens: int = 0
    shared: int = 0
    wins: LongerWins = field(default_factory=LongerWins)
    unencodable: Counter[str] = field(default_factory=Counter)


def measure(records: Sequence[Record], encoder: Encoder, *, share: bool) -> TokenCosts:
    """Encode every response after its prompt, the prompt's beginning cut where it is too long, and count."""
    attempted = sum(len(record.responses) for record in records)
    costs = TokenCosts(encoder.contract.max_length, len(records), attempted)
    lengths: list[int] = []
    for start in range(0, len(records), PADDED_RECORDS):
        batch: list[Encoded] = []
        for record in records[start : start + PADDED_RECORDS]:
            batch += _encoded(record, encoder, costs, share)
        longest = max((len(item.ids) for item in batch), default=0)
        costs.padded += longest * len(batch)
        lengths += [len(item.ids) + (item.truncated.tokens if item.truncated else 0) for item in batch]
    costs.lengths = Percentiles.of(lengths)
    return costs


def _encoded(record: Record, encoder: Encoder, costs: TokenCosts, share: bool) -> list[Encoded]:
    """The record's items; none if one of its responses cannot be encoded, as training then leaves it out."""
    items: list[Encoded] = []
    for response in record.responses:
        try:
            items.append(encoder.encode(record.prompt, response, "truncate_prompt"))
        except ItemError as error:
            costs.unencodable[error.code] += 1
    costs.truncated += sum(item.truncated is not None for item in items)
    if len(items) < len(record.responses):
        return []
    costs.responses += len(items)
    costs.tokens += sum(len(item.ids) for item in items)
    costs.shared += sum(group.tokens for group in group_items(items, share=share))
    for comparison in record.comparisons:
        costs.wins.add(comparison, [len(item.ids) - item.prompt_tokens for item in items])
    return items
