"""Kappa by hand, and the gate as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plaudit.judge.agreement import cohen_kappa, kappa_of

Judge = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("counts", "kappa"),
    [
        ({"aa": 20, "ab": 5, "ba": 10, "bb": 15}, 0.4),  # observed .7, expected .5
        ({"aa": 45, "ab": 15, "ba": 25, "bb": 15}, 0.06 / 0.46),  # Cohen's paradox: 60% agreement, kappa .13
        ({"ab": 5, "ba": 5}, -1.0),
        ({"aa": 3, "bb": 3, "tt": 3}, 1.0),
        ({"aa": 2, "bb": 2, "tt": 2, "ab": 1, "bt": 1, "ta": 1}, 0.5),  # observed 2/3, expected 1/3
        ({"aa": 7}, None),
        ({}, None),
    ],
)
def test_kappa_is_what_it_is_by_hand(counts: dict[str, int], kappa: float | None) -> None:
    ratings = [(pair[0], pair[1]) for pair, count in counts.items() for _ in range(count)]
    found = cohen_kappa(ratings)
    assert found is None if kappa is None else found == pytest.approx(kappa, abs=1e-12)


def test_the_interval_holds_kappa_and_narrows() -> None:
    sample: list[list[tuple[str, str]]] = (
        [[("a", "a")]] * 20 + [[("a", "b")]] * 5 + [[("b", "a")]] * 10 + [[("b", "b")]] * 15
    )
    small, large = (kappa_of(sample * times, resamples=400, seed=0) for times in (1, 9))
    for found in (small, large):
        assert found.low is not None and found.high is not None and found.low < 0.4 < found.high
    assert small.high - small.low > 2 * (large.high - large.low)  # type: ignore[operator]
    assert small == kappa_of(sample, resamples=400, seed=0)
    assert small.confusion["b"] == {"a": 10, "b": 15, "tie": 0} and small.agreement == 0.7


def write(counts: dict[str, int], *, left: int = 0) -> None:
    """Files of labels and of people's labels."""
    labels: list[dict[str, Any]] = []
    people: list[dict[str, Any]] = []
    pairs = [pair for pair, count in counts.items() for _ in range(count)] + ["-a"] * left
    for number, pair in enumerate(pairs):
        content = {"prompt": f"q {number}", "response_a": "x", "response_b": "y"}
        label = None if pair[0] == "-" else pair[0]
        labels.append({"key": str(number), **content, "label": label, "queued": [], "opinions": []})
        people.append({**content, "label": pair[1]})
    people += [{"prompt": "elsewhere", "response_a": "x", "response_b": "y", "label": None}]
    for name, rows in (("labels.jsonl", labels), ("human.jsonl", people)):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_gate_opens_only_above_its_kappa_and_with_enough_comparisons(judge: Judge) -> None:
    write({"aa": 20, "ab": 5, "ba": 10, "bb": 15}, left=7)
    arguments = ("gate", "labels.jsonl", "human.jsonl", "--json", "--resamples", "50")
    code, out, _ = judge(*arguments, "--min-kappa", "0.39")
    found = json.loads(out)
    assert code == 0 and found["kappa"] == pytest.approx(0.4) and found["comparisons"] == 50
    assert found["left_to_people"] == 7 and found["without_a_human_label"] == 1  # 7 that nobody would train on
    code, _, err = judge(*arguments, "--min-kappa", "0.41")
    assert code == 1 and "not passed: kappa is below --min-kappa" in err
    code, _, err = judge(*arguments, "--min-kappa", "0.39", "--min-comparisons", "51")
    assert code == 1 and "not passed: fewer comparisons than --min-comparisons" in err
    assert judge(*arguments[:3])[0] == 1  # 0.6 by default
    write({"aa": 40})
    code, out, err = judge("gate", "labels.jsonl", "human.jsonl")
    assert code == 1 and "kappa: not computable" in out and "confusion.a.a: 40" in out
    assert "not passed: one label alone" in err
    Path("human.jsonl").write_text('{"prompt": "q", "label": "A better"}\n')
    code, _, err = judge(*arguments)
    assert code == 65 and "line 1" in err
