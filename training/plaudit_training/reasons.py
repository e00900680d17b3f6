"""What can become of a row besides being used, by code: the one list that code, reports and tests share.

A *bad* row goes to quarantine and, beyond `max_bad_rows`, stops the run. A *dropped* row is well formed but
is not used. A *noted* row is used, and the report says what is odd about it.
"""

from __future__ import annotations

from typing import Literal

BadReason = Literal[
    "bad_utf8", "bad_json", "bad_csv", "too_deep", "too_large", "missing_key", "wrong_type", "empty_prompt",
    "empty_response", "lone_surrogate", "bad_margin", "bad_transcript", "different_prompts", "unknown_label",
    "unsupported",
]  # fmt: skip
DropReason = Literal["identical_pair", "duplicate", "tie", "not_in_strict_ids", "unlabelled"]
NoteReason = Literal[
    "contradictory_pair", "one_empty_response", "negative_margin", "gold_missing", "gold_against_votes",
    "tie_votes_set_aside",
]  # fmt: skip

BAD: dict[BadReason, str] = {
    "bad_utf8": "the bytes are not UTF-8",
    "bad_json": "the row is not JSON, or names a key twice",
    "bad_csv": "the cells do not fit the header, or a quote is not closed",
    "too_deep": "the JSON is nested too deeply",
    "too_large": "the row has more bytes than a row may have",
    "missing_key": "a column that the format needs is absent",
    "wrong_type": "a column holds another type than the format has there",
    "empty_prompt": "there is no prompt, or only white space",
    "empty_response": "both responses are empty; one alone may be: policies do end at once",
    "lone_surrogate": "a text has half of a surrogate pair, which is no character",
    "bad_margin": "the margin is no number, or a senseless one",
    "bad_transcript": "the turns of a conversation cannot be told apart, or do not end with the assistant's",
    "different_prompts": "the two responses answer different prompts",
    "unknown_label": "the label is none of those that the label map names",
    "unsupported": "tool calls and content other than text are not read",
}
DROPPED: dict[DropReason, str] = {
    "identical_pair": "both responses are the same text: no scores can tell them apart",
    "duplicate": "the same comparison of the same texts was read before",
    "tie": "no winner, and ties are dropped",
    "not_in_strict_ids": "its id is not in the file of strict ids",
    "unlabelled": "the judge could not tell, or left it to people: `label` is null",
}
NOTED: dict[NoteReason, str] = {
    "contradictory_pair": "the other response won when the same pair was read before; both are used: together "
    "they say that people disagree",
    "one_empty_response": "one of the responses is empty",
    "negative_margin": "the margin asks the chosen response to score below the rejected one",
    "gold_missing": "without gold label: the winner is the majority of the votes",
    "gold_against_votes": "the gold label is not the majority of the votes; the gold label decides the winner",
    "tie_votes_set_aside": "a tie whose votes lean: labelled 0.5, its votes are set aside (`--ties keep` keeps them)",
}
