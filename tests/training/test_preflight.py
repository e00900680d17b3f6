"""What stops a run before its first step, and what is only said."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from plaudit_model.contract import RewardContract, Template
from plaudit_model.encode import Encoder
from plaudit_model.records import Comparison, Message, Origin, Outcome, Record
from plaudit_model.template import CHATML
from plaudit_training.errors import DataError, OptionError, PreflightError
from plaudit_training.preflight import ModelFacts, PreflightReport, inspect, render
from plaudit_training.sources import ReadOptions, load
from plaudit_training.split import split_by_conversation
from plaudit_training.token_costs import PADDED_RECORDS

FACTS = ModelFacts(pad_token_id=0, eos_token_ids=(2,), outputs=1, pools_by_pad=True, shares_prompt=True)


@pytest.fixture(scope="module")
def encoder(write_base: Callable[[str], Path]) -> Encoder:
    contract = RewardContract("Qwen3", Template.of("chat", CHATML), max_length=64, pooling="last")
    return Encoder.open(write_base("qwen3"), contract)


def record(prompt: str, *responses: str, outcome: Outcome = "first") -> Record:
    return Record(prompt, (Message("user", prompt),), responses, (Comparison(0, 1, outcome),), Origin("data.jsonl", 4))


def values(report: PreflightReport) -> dict[str, float | None]:
    return {note.code: note.value for note in report.notes}


def test_a_conversation_on_both_sides_is_leakage(encoder: Encoder) -> None:
    train, held_out = [record("What is it?", "x", "y")], [record("  WHAT is\nit?", "u", "v"), record("Else?", "x", "y")]
    report = inspect(train, held_out, encoder, FACTS)
    assert [(problem.code, problem.value) for problem in report.problems] == [("leakage", 1)]
    with pytest.raises(PreflightError, match=r"leakage: 1 conversations and 0 pairs .* such as data\.jsonl:4"):
        report.raise_for_problems(frozenset())
    report.raise_for_problems(frozenset({"leakage"}))
    assert issubclass(PreflightError, DataError) and PreflightError.exit_code == 65


def test_the_same_prompt_and_response_on_both_sides_is_counted(encoder: Encoder) -> None:
    report = inspect([record("p", "x", "y")], [record("p", "x", "z")], encoder, FACTS)
    assert "1 conversations and 1 pairs of prompt and response" in report.problems[0].message


def test_sides_without_a_common_conversation_pass(encoder: Encoder) -> None:
    report = inspect([record("p", "x", "y")], [record("q", "x", "y")], encoder, FACTS)
    assert report.problems == ()
    report.raise_for_problems(frozenset())


@pytest.mark.parametrize(
    ("facts", "codes"),
    [
        (replace(FACTS, pad_token_id=2), ["pad_eos_clash"]),
        (replace(FACTS, pad_token_id=9, eos_token_ids=(2, 9)), ["pad_eos_clash"]),
        (replace(FACTS, pad_token_id=2, pools_by_pad=False), []),
        (replace(FACTS, pad_token_id=None), []),
        (replace(FACTS, outputs=2), ["head_count"]),
        (replace(FACTS, outputs=2, pad_token_id=2), ["pad_eos_clash", "head_count"]),
    ],
)
def test_models_that_would_train_the_wrong_thing(encoder: Encoder, facts: ModelFacts, codes: list[str]) -> None:
    report = inspect([record("p", "x", "y")], [], encoder, facts)
    assert [problem.code for problem in report.problems] == codes
    report.raise_for_problems(frozenset(codes))
    for code in codes:
        with pytest.raises(PreflightError, match=f"^{code}: .*--allow {code}"):
            report.raise_for_problems(frozenset(codes) - {code})


def test_a_name_that_is_no_problems_is_not_allowed(encoder: Encoder) -> None:
    report = inspect([record("p", "x", "y")], [], encoder, FACTS)
    with pytest.raises(OptionError, match="expected one of leakage, pad_eos_clash, head_count, got 'leaks'"):
        report.raise_for_problems(frozenset({"leaks"}))


def test_labels_are_counted(encoder: Encoder) -> None:
    train = [
        record("a", "longer one", "short"), record("b", "short", "longer one"), record("c", "even longer", "short"),
        record("d", "same", "size"), record("e", "longer one", "short", outcome="second"),
        record("f", "longer one", "short", outcome="tie"), record("g", "same", "same"),
        record("a", "longer one", "short"),
    ]  # fmt: skip
    found = values(inspect(train, [], encoder, FACTS))
    assert found["comparisons"] == 8 and found["ties"] == 1 / 8
    assert found["identical_pairs"] == 1 / 8 and found["duplicates"] == 1 / 8
    assert found["longer_wins_characters"] == 3 / 5


def test_tokens_are_counted_as_training_will_meet_them(encoder: Encoder) -> None:
    def length(prompt: str, response: str) -> int:
        return len(encoder.encode(prompt, response).ids)

    pairs = [("a short prompt?", "yes", "no, not at all"), ("a somewhat longer prompt, is it?", "it is", "it is not")]
    lengths = [length(prompt, response) for prompt, *responses in pairs for response in responses]
    train = [record(*pair) for pair in pairs]
    found = values(inspect(train, [], encoder, FACTS))
    assert found["lengths"] == max(lengths) and found["sample"] == 2 and found["over_length"] == 0
    assert found["padding_saved"] == pytest.approx(1 - sum(lengths) / (4 * max(lengths)))
    assert 0.3 < (found["sharing_saved"] or 0) < 0.5
    assert values(inspect(train, [], encoder, replace(FACTS, shares_prompt=False)))["sharing_saved"] == 0


def test_what_does_not_fit_is_counted(encoder: Encoder) -> None:
    train = [record("a prompt", "x", "y"), record("word " * 70, "x", "y"), record("a prompt", "word " * 70, "y"),
             record("a prompt", "\ud800", "y")]  # fmt: skip
    report = inspect(train, [], encoder, FACTS)
    found = values(report)
    assert found["over_length"] == 3 / 8 and found["invalid_unicode"] == 1 / 8
    said = next(note.message for note in report.notes if note.code == "over_length")
    assert "3 of 8 (37.5%) exceed 64 tokens: 2 with their prompt cut, 1 unusable" in said
    # Lengths are those before the cut.
    assert found["lengths"] is not None and found["lengths"] > 64


def test_what_cannot_be_computed_is_not_zero(encoder: Encoder) -> None:
    found = values(inspect([record("p", "ab", "cd", outcome="tie")], [], encoder, FACTS))
    assert found["longer_wins_characters"] is None and found["longer_wins_tokens"] is None
    assert values(inspect([], [], encoder, FACTS))["lengths"] is None


def test_a_sample_is_spread_over_the_data(encoder: Encoder) -> None:
    train = [record(f"prompt {i}", "x", "y") for i in range(50)]
    report = inspect(train, [], encoder, FACTS, sample=20)
    assert values(report)["sample"] == 17 and values(report)["comparisons"] == 50


def test_padding_is_that_of_batches_in_the_order_of_the_data(encoder: Encoder) -> None:
    short, long = [record("p", "x", "y")] * PADDED_RECORDS, [record("p", "word " * 9, "word " * 9)] * PADDED_RECORDS
    assert values(inspect(short + long, [], encoder, FACTS))["padding_saved"] == 0
    mixed = values(inspect([r for pair in zip(short, long, strict=True) for r in pair], [], encoder, FACTS))
    assert (mixed["padding_saved"] or 0) > 0.2


def test_the_report_is_printed(encoder: Encoder) -> None:
    report = inspect([record("p", "x", "y")], [record("p", "x", "y")], encoder, replace(FACTS, outputs=3))
    console = Console(width=200, file=io.StringIO())
    console.print(render(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]  # it is the StringIO
    assert "leakage  1 conversations" in text and "head_count  the head gives 3 scores" in text
    assert "longer_wins_tokens" in text
    assert [problem["code"] for problem in report.to_json()["problems"]] == ["leakage", "head_count"]


def test_real_data_split_by_conversation_passes(shared_data: Path, encoder: Encoder) -> None:
    records, _ = load([str(shared_data / "hh_rlhf" / "harmless-base" / "half_a.jsonl.gz")], ReadOptions())
    train, held_out = split_by_conversation(records, 0.1, 0)
    report = inspect(train, held_out, encoder, FACTS, sample=100)
    assert report.problems == () and values(report)["duplicates"] == 0
    halves = inspect(records[:600], records[600:], encoder, FACTS, sample=1)
    assert [problem.code for problem in halves.problems] == ["leakage"]
