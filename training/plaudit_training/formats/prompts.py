"""The prompt of two responses: said in a column, or recovered from what both begin with."""

from __future__ import annotations

from collections.abc import Sequence

from plaudit_model.records import Message

from ..errors import BadRow
from . import fields
from .format import Columns

Turns = tuple[Message, ...]
Pair = tuple[str, str]


def prompt_and_pair(row: Columns, first: str, second: str) -> tuple[Turns, Pair]:
    """Prompt and responses of a row whose responses are in columns `first` and `second`.

    They are texts or lists of turns. `prompt` is a text, a list of turns, or absent: then it is what both
    responses begin with, as in TRL's implicit-prompt form, cut between turns or, in plain text, between words.
    Raises BadRow.
    """
    prompt = row.get("prompt")
    lead = fields.turns(row, "prompt") if isinstance(prompt, list) else ()
    if prompt is not None and not isinstance(prompt, list):
        lead = (Message("user", fields.text(row, "prompt")),)
    if any(isinstance(fields.value(row, key), list) for key in (first, second)):
        return _conversations(lead, fields.turns(row, first), fields.turns(row, second))
    pair = fields.text(row, first), fields.text(row, second)
    return _common_words(*pair) if prompt is None else (lead, pair)


def last_turns(first: Turns, second: Turns) -> tuple[Turns, Pair]:
    """Two conversations that differ in their last turn alone, which is the assistant's. Raises BadRow."""
    if not (first and second) or any(turns[-1].role != "assistant" for turns in (first, second)):
        raise BadRow("bad_transcript", "a conversation must end with the assistant's turn")
    if first[:-1] == second[:-1]:
        return first[:-1], (first[-1].content, second[-1].content)
    same = _common(first, second)
    if not same:
        raise BadRow("different_prompts", "the two conversations share no turn")
    raise BadRow("bad_transcript", f"the conversations part at turn {same + 1} of {len(first)} and {len(second)}; "
                 "only the last may differ")  # fmt: skip


def _conversations(lead: Turns, first: Turns, second: Turns) -> tuple[Turns, Pair]:
    """Responses given as turns: those after the prompt column, as in TRL's explicit-prompt form, which then begin with
    the assistant's, or whole conversations. These begin with the turns of the prompt column, after a system turn at
    most, or have them before the last, as UltraFeedback has."""
    if len(first) == len(second) == 1 or (_continues(first, lead) and _continues(second, lead)):
        return last_turns(lead + first, lead + second)
    prompt, pair = last_turns(first, second)
    if not _begins(prompt, lead) and prompt[-len(lead) :] != lead:
        raise BadRow("different_prompts", "the conversations neither begin with the turns of the prompt column nor "
                     "have them before the last")  # fmt: skip
    return prompt, pair


def _continues(turns: Turns, lead: Turns) -> bool:
    """Whether turns are what follows on `lead`."""
    return bool(turns) and turns[0].role == "assistant" and not _begins(turns, lead)


def _begins(turns: Turns, lead: Turns) -> bool:
    """Whether turns begin with `lead`, or do so after a system turn."""
    after = 1 if turns and turns[0].role == "system" else 0
    return lead in (turns[: len(lead)], turns[after : after + len(lead)])


def _common_words(first: str, second: str) -> tuple[Turns, Pair]:
    """The words that both texts begin with, and the rest of each without the white space between."""
    same = _common(first, second)
    if not all(len(text) == same or text[same].isspace() for text in (first, second)):
        same = max((i for i in range(same) if first[i].isspace()), default=0)
    return (Message("user", first[:same]),), (first[same + 1 :], second[same + 1 :])


def _common(first: Sequence[object], second: Sequence[object]) -> int:
    """How many elements both begin with."""
    differ = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))
