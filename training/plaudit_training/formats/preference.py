"""TRL's preference format: `chosen` and `rejected`, `prompt` or none, texts or turns, `margin` or none."""

from __future__ import annotations

from plaudit_model.records import Comparison, Origin

from . import fields, hh_rlhf
from .format import Columns, Format, Reading, pair_reading
from .prompts import prompt_and_pair


def _matches(row: Columns) -> bool:
    return "chosen" in row and "rejected" in row and ("prompt" in row or not hh_rlhf.FORMAT.matches(row))


def _parse(row: Columns, origin: Origin) -> Reading:
    fields.refuse(row, "tools", "images", "chat_template_kwargs")
    prompt, pair = prompt_and_pair(row, "chosen", "rejected")
    comparison = Comparison(0, 1, "first", margin=fields.margin(row))
    return pair_reading(fields.record_id(row, origin), prompt, pair, comparison, origin)


FORMAT = Format(
    name="preference",
    description="TRL: chosen, rejected; prompt, margin, id",
    columns=frozenset({"id", "prompt", "chosen", "rejected", "margin", "tools", "images", "chat_template_kwargs"}),
    matches=_matches,
    parse=_parse,
)
