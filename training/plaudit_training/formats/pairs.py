"""Two responses and a label: `prompt`, `response_a`, `response_b`, `label`. Tables of other names are mapped to it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from plaudit_model.records import Comparison, Origin, Outcome

from ..errors import BadRow, Dropped, OptionError
from . import fields
from .format import Columns, Format, Reading, pair_reading
from .prompts import prompt_and_pair

NAME = "pairs"
OUTCOMES: dict[str, Outcome] = {"a": "first", "b": "second", "tie": "tie"}
DEFAULT_LABELS = {
    "a": "a", "b": "b", "1": "a", "2": "b", "response_a": "a", "response_b": "b", "tie": "tie", "equal": "tie",
}  # fmt: skip
"""Compared without case. 0 is a tie in some sets and the first response in others, so it must be said."""


def format_for(labels: Mapping[str, str]) -> Format:
    """The format with a label map, their value -> `a`, `b` or `tie`; empty: DEFAULT_LABELS. Raises OptionError."""
    if wrong := sorted(set(labels.values()) - set(OUTCOMES)):
        raise OptionError(f"a label must be mapped to a, b or tie, got {wrong[0]!r}")
    outcomes = {theirs.casefold(): OUTCOMES[ours] for theirs, ours in (labels or DEFAULT_LABELS).items()}
    return Format(
        name=NAME,
        description="response_a, response_b, label; prompt, margin, annotator, source, id",
        columns=frozenset({"id", "prompt", "response_a", "response_b", "label", "margin", "annotator", "source"}),
        matches=lambda row: {"response_a", "response_b", "label"} <= row.keys(),
        parse=partial(_parse, outcomes),
    )


def _parse(outcomes: Mapping[str, Outcome], row: Columns, origin: Origin) -> Reading:
    prompt, pair = prompt_and_pair(row, "response_a", "response_b")
    source = fields.source(row)
    if source == "ai" and row.get("label", "") is None:
        raise Dropped("unlabelled")
    outcome = outcomes.get(_label(fields.value(row, "label")))
    if outcome is None:
        known = ", ".join(outcomes)
        found = fields.quoted(row["label"])
        raise BadRow("unknown_label", f"{found}; known are {known}; say what others mean: --labels 1=a,2=b,0=tie")
    annotators = (fields.text(row, "annotator"),) if row.get("annotator") else ()
    comparison = Comparison(0, 1, outcome, margin=fields.margin(row), annotators=annotators, source=source)
    return pair_reading(fields.record_id(row, origin), prompt, pair, comparison, origin)


def _label(value: object) -> str:
    """A label as it is written in a label map: `1` for 1 and 1.0, `true` for true."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().casefold()
