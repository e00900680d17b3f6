r"""Transcripts as in hh-rlhf (Bai et al., arXiv 2204.05862): `chosen`, `rejected`; `\n\nHuman:`, `\n\nAssistant:`.

Roles alternate. A marker of the role that is speaking is text of its turn: sampled answers write such markers
themselves, and to cut there would tear one response in two.
"""

from __future__ import annotations

import re

from plaudit_model.records import Comparison, Message, Origin, Role

from ..errors import BadRow
from . import fields
from .format import Columns, Format, Reading, pair_reading
from .prompts import last_turns

_MARKER = re.compile(r"\n\n(Human|Assistant):")
_START = re.compile(r"\s*Human:")
_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def _matches(row: Columns) -> bool:
    texts = (row.get("chosen"), row.get("rejected"))
    return all(isinstance(text, str) and _START.match(text) for text in texts)


def _parse(row: Columns, origin: Origin) -> Reading:
    chosen, rejected = (_turns(fields.text(row, key), key) for key in ("chosen", "rejected"))
    prompt, pair = last_turns(chosen, rejected)
    return pair_reading(fields.record_id(row, origin), prompt, pair, Comparison(0, 1, "first"), origin)


def _turns(transcript: str, key: str) -> tuple[Message, ...]:
    if not _START.match(transcript):
        raise BadRow("bad_transcript", f"{key} does not begin with a human turn")
    _, *parts = _MARKER.split("\n\n" + transcript.lstrip())
    turns: list[tuple[str, str]] = []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        if turns and turns[-1][0] == speaker:
            turns[-1] = speaker, f"{turns[-1][1]}\n\n{speaker}:{text}"
        else:
            turns.append((speaker, text))
    return tuple(Message(_ROLES[speaker], text.removeprefix(" ")) for speaker, text in turns)


FORMAT = Format(
    name="hh-rlhf",
    description="chosen, rejected: transcripts with \\n\\nHuman: and \\n\\nAssistant:",
    columns=frozenset({"id", "chosen", "rejected"}),
    matches=_matches,
    parse=_parse,
)
