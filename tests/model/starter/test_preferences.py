"""The records: the preferred response is the better one, and neither length nor position gives it away."""

from __future__ import annotations

from collections import defaultdict

import pytest

from plaudit_model.records import Comparison, Record
from plaudit_model.starter import HELD_OUT_SEEDS, Task, preference_records, quality, tasks

N = 900
RECORDS = preference_records(N, 0)
TASKS = tasks(N, 0)


def won(record: Record, comparison: Comparison) -> tuple[str, str]:
    first, second = record.responses[comparison.first], record.responses[comparison.second]
    return (first, second) if comparison.outcome == "first" else (second, first)


def pairs() -> list[tuple[Task, str, str]]:
    return [(t, *won(r, c)) for t, r in zip(TASKS, RECORDS, strict=True) for c in r.comparisons]


def test_records_are_deterministic() -> None:
    assert preference_records(30, 9) == preference_records(30, 9)
    assert preference_records(30, 9) != preference_records(30, 10)


def test_the_preferred_response_is_clearly_better() -> None:
    for task, better, worse in pairs():
        assert quality(task, better) >= quality(task, worse) + 0.15


def test_every_clear_difference_is_compared() -> None:
    for task, record in zip(TASKS, RECORDS, strict=True):
        values = [quality(task, response) for response in record.responses]
        clear = sum(abs(a - b) >= 0.15 for i, a in enumerate(values) for b in values[:i])
        assert len(record.comparisons) == clear >= 1


def test_shape_of_a_record() -> None:
    for line, (task, record) in enumerate(zip(TASKS, RECORDS, strict=True), 1):
        assert record.tags == (task.kind,)
        assert record.origin.line == line
        assert [(m.role, m.content) for m in record.prompt] == [("user", task.prompt)]
        assert 2 <= len(set(record.responses)) == len(record.responses) <= 4
        assert all(c.source == "synthetic" and c.outcome != "tie" for c in record.comparisons)


def test_ids_are_unique_across_seeds() -> None:
    ids = [record.id for seed in (0, 1, HELD_OUT_SEEDS) for record in preference_records(30, seed)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("kind", ["all", "arithmetic", "conversion", "format", "length", "refusal", "knowledge"])
def test_length_does_not_give_the_answer_away(kind: str) -> None:
    longer = [float(len(b) > len(w)) if len(b) != len(w) else 0.5 for t, b, w in pairs() if kind in ("all", t.kind)]
    assert 0.4 <= sum(longer) / len(longer) <= 0.6


def test_position_does_not_give_the_answer_away() -> None:
    outcomes = [comparison.outcome for record in RECORDS for comparison in record.comparisons]
    assert 0.45 <= outcomes.count("first") / len(outcomes) <= 0.55


def test_a_courtesy_does_not_give_the_answer_away() -> None:
    wins: dict[str, list[int]] = defaultdict(list)
    for task, better, worse in pairs():
        if task.kind in ("arithmetic", "conversion", "knowledge"):
            wins["polite"].append(better.startswith(("Sure", "Of course", "Happy")))
            wins["polite in vain"].append(worse.startswith(("Sure", "Of course", "Happy")))
    assert abs(sum(wins["polite"]) - sum(wins["polite in vain"])) < 0.05 * len(wins["polite"])


def test_splitting_by_conversation_keeps_the_seed_ranges_apart() -> None:
    train = {record.conversation() for record in preference_records(600, 1)}
    held_out = {record.conversation() for record in preference_records(300, HELD_OUT_SEEDS)}
    assert not train & held_out
