"""Checks between reading and the first training step: what would make a run meaningless stops it, what its
owner should know is said.

Problems, by the name under which they can be allowed:

    leakage        a conversation, or the very same prompt and response, is in training and in evaluation
    pad_eos_clash  plain transformers finds a sequence's last token by the pad id; where that is the end-of-sequence
                   id too, it reads another token than the one that was trained
    head_count     the head gives another number of scores than the one that pairs train
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from plaudit_model.encode import Encoder
from plaudit_model.records import Record

from . import token_costs
from .errors import OptionError, PreflightError
from .lengths import LongerWins

PROBLEMS = ("leakage", "pad_eos_clash", "head_count")
SAMPLE_RECORDS = 2000
"""Enough for a rate to be right to two points, and seconds to encode."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the checks must know of the model. `pools_by_pad`: plain transformers would find the last token of
    a padded row by its id. `shares_prompt`: the packed forward computes a common prompt once."""

    pad_token_id: int | None
    eos_token_ids: tuple[int, ...]
    outputs: int
    pools_by_pad: bool
    shares_prompt: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """`value` is the number the message speaks of; None where it is not computable."""

    code: str
    message: str
    value: float | None = None


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """`problems` stop a run unless allowed by code; `notes` are measurements."""

    problems: tuple[Finding, ...]
    notes: tuple[Finding, ...]

    def raise_for_problems(self, allow: Set[str]) -> None:
        """Raises PreflightError for problems that are not allowed, OptionError for a name that is no problem's."""
        if unknown := sorted(allow - set(PROBLEMS)):
            raise OptionError(f"--allow: expected one of {', '.join(PROBLEMS)}, got {unknown[0]!r}")
        open_problems = [problem for problem in self.problems if problem.code not in allow]
        if open_problems:
            said = "; ".join(f"{problem.code}: {problem.message}" for problem in open_problems)
            allowing = " ".join(f"--allow {problem.code}" for problem in open_problems)
            raise PreflightError(f"{said} (to train all the same: {allowing})")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(
    train: Sequence[Record], held_out: Sequence[Record], encoder: Encoder, facts: ModelFacts,
    *, sample: int = SAMPLE_RECORDS,
) -> PreflightReport:  # fmt: skip
    """Check records and model. Leakage and label statistics look at every record, what needs tokens at about
    `sample` training records, evenly spaced; the notes say of how many."""
    problems = [*_leakage(train, held_out), *_model_problems(facts)]
    some = train[:: max(1, -(-len(train) // sample))]
    costs = token_costs.measure(some, encoder, share=facts.shares_prompt)
    return PreflightReport(tuple(problems), (*_label_notes(train), *_token_notes(costs)))


def render(report: PreflightReport) -> RenderableType:
    """The report for a terminal: problems in red, then a line a note."""
    lines = [Text.assemble((f"{p.code}  ", "bold red"), p.message) for p in report.problems]
    width = max((len(note.code) for note in report.notes), default=0)
    lines += [Text.assemble((note.code.ljust(width) + "  ", "bold"), note.message) for note in report.notes]
    return Group(*lines)


def _leakage(train: Sequence[Record], held_out: Sequence[Record]) -> Iterator[Finding]:
    known = {record.conversation() for record in train}
    conversations = {record.conversation(): record for record in held_out if record.conversation() in known}
    trained = {key for record in train for key in _response_keys(record)}
    responses = {key: record for record in held_out for key in _response_keys(record) if key in trained}
    if conversations or responses:
        example = next(iter((conversations or responses).values()))
        yield Finding(
            "leakage",
            f"{len(conversations):,} conversations and {len(responses):,} pairs of prompt and response are in training "
            f"and in evaluation, such as {example.origin.file}:{example.origin.line}; split by conversation",
            len(conversations),
        )


def _response_keys(record: Record) -> list[bytes]:
    """A hash of the prompt with each response."""
    prompt = hashlib.sha256(json.dumps([(m.role, m.content) for m in record.prompt]).encode())
    keys = []
    for response in record.responses:
        both = prompt.copy()
        both.update(json.dumps(response).encode())
        keys.append(both.digest()[:16])
    return keys


def _model_problems(facts: ModelFacts) -> Iterator[Finding]:
    if facts.pools_by_pad and facts.pad_token_id in facts.eos_token_ids:
        yield Finding(
            "pad_eos_clash",
            f"pad and end-of-sequence are both token {facts.pad_token_id}: padded rows would be read one token early; "
            "set another pad_token_id in the base's config.json",
            facts.pad_token_id,
        )
    if facts.outputs != 1:
        yield Finding("head_count", f"the head gives {facts.outputs} scores, pairs train 1", facts.outputs)


def _label_notes(records: Sequence[Record]) -> Iterator[Finding]:
    """Statistics of labels and texts over all comparisons."""
    wins, seen, ties, identical, duplicates = LongerWins(), set[tuple[object, ...]](), 0, 0, 0
    for record in records:
        lengths, keys = [len(text) for text in record.responses], _response_keys(record)
        for c in record.comparisons:
            wins.add(c, lengths)
            ties += c.outcome == "tie"
            identical += keys[c.first] == keys[c.second]
            judgement = (keys[c.first], keys[c.second], c.outcome, c.votes, c.margin, c.annotators)
            duplicates += judgement in seen
            seen.add(judgement)
    total = sum(len(record.comparisons) for record in records)
    yield Finding("comparisons", f"{total:,} in {len(records):,} records", total)
    yield Finding("ties", _of(ties, total, "have no winner"), _share(ties, total))
    yield Finding("identical_pairs", _of(identical, total, "compare a text with itself"), _share(identical, total))
    yield Finding("duplicates", _of(duplicates, total, "repeat another"), _share(duplicates, total))
    yield Finding("longer_wins_characters", str(wins), wins.share)


def _token_notes(costs: token_costs.TokenCosts) -> Iterator[Finding]:
    """What the tokens say: lengths, what does not fit, what packing and sharing save."""
    lengths, too_long, total = costs.lengths, costs.unencodable["too_long"], costs.attempted
    over = costs.truncated + too_long
    yield Finding("sample", f"{costs.records:,} training records were encoded for what follows", costs.records)
    yield Finding("lengths", f"{lengths or 'not computable'} tokens of prompt and response",
                  lengths.longest if lengths else None)  # fmt: skip
    what = f"exceed {costs.max_length:,} tokens: {costs.truncated:,} with their prompt cut, {too_long:,} unusable"
    yield Finding("over_length", _of(over, total, what), _share(over, total))
    for code, count in sorted(costs.unencodable.items()):
        if code != "too_long":
            yield Finding(code, _of(count, total, "cannot be encoded"), _share(count, total))
    yield Finding("longer_wins_tokens", str(costs.wins), costs.wins.share)
    wasted, shared = costs.padded - costs.tokens, costs.tokens - costs.shared
    what = f"tokens would be padding, in batches of {token_costs.PADDED_RECORDS} records"
    yield Finding("padding_saved", _of(wasted, costs.padded, what), _share(wasted, costs.padded))
    what = "tokens are prompts that another response has too"
    yield Finding("sharing_saved", _of(shared, costs.tokens, what), _share(shared, costs.tokens))


def _of(count: int, total: int, what: str) -> str:
    """`12 of 340 (3.5%) have no winner`"""
    share = _share(count, total)
    return f"{count:,} of {total:,} ({'not computable' if share is None else f'{share:.1%}'}) {what}"


def _share(count: int, total: int) -> float | None:
    return count / total if total else None
