"""The checks find every way in which an answer can be wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from checks import ItemsFailed, Ledger, Place, WrongAnswer, checked_scores, identity

WHO = ("m", "r1", "torch-fp32-exact")
PLACES: list[Place] = [(0, 0), (0, 1), (1, None)]


def answer(scores: list[Any], places: list[Place]) -> dict[str, Any]:
    results = [
        {"index": i, "item_index": item, "response_index": response, "score": score, "tokens": 3, "cached": False}
        for i, (score, (item, response)) in enumerate(zip(scores, places, strict=True))
    ]
    return {"request_id": "x", "model": "m", "revision": "r1", "numerics": WHO[2], "scores": scores, "results": results}


def test_a_right_answer_gives_its_scores_in_order() -> None:
    assert checked_scores(answer([0.5, -1, 2.0], PLACES), PLACES) == [0.5, -1.0, 2.0]


def test_a_single_item_has_its_score_at_the_top_too() -> None:
    body = answer([0.5], [(0, None)])
    assert checked_scores({**body, "score": 0.5}, [(0, None)]) == [0.5]
    with pytest.raises(WrongAnswer, match="top-level"):
        checked_scores({**body, "score": 0.25}, [(0, None)])


def edit(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(body: dict[str, Any]) -> None:
        *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
        target: Any = body
        for parent in parents:
            target = target[parent]
        target[last] = value

    return apply


def swap(body: dict[str, Any]) -> None:
    body["scores"][:2] = body["scores"][1::-1]
    body["results"][:2] = body["results"][1::-1]


@pytest.mark.parametrize(("spoil", "reason"), [
    (edit("scores", [0.5, -1.0]), "2 scores and 3 results for 3 items"),
    (edit("results", []), "3 scores and 0 results"),
    (edit("scores", None), "no lists"),
    (edit("scores.1", 7.0), "disagree"),
    (edit("results.1.index", 2), "out of order"),
    (edit("results.1.response_index", 0), "another item"),
    (edit("results.2.item_index", 0), "another item"),
    (edit("results.0", 5), "not a JSON object"),
    (edit("results.0.error", {"code": "too_long"}), "neither a score nor an error, or both"),
    (swap, "out of order"),
])  # fmt: skip
def test_a_wrong_answer_is_found(spoil: Callable[[dict[str, Any]], None], reason: str) -> None:
    body = copy.deepcopy(answer([0.5, -1.0, 2.0], PLACES))
    spoil(body)
    with pytest.raises(WrongAnswer, match=reason):
        checked_scores(body, PLACES)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1.0", None])
def test_a_score_must_be_a_finite_number(value: Any) -> None:
    with pytest.raises(WrongAnswer):
        checked_scores(answer([value], [(0, None)]), [(0, None)])


@pytest.mark.parametrize("body", [None, [], "ok", 3, {}])
def test_anything_else_is_wrong(body: Any) -> None:
    with pytest.raises(WrongAnswer):
        checked_scores(body, [(0, None)])


def test_items_that_failed_are_not_wrong_answers() -> None:
    body = answer([0.5, None, 2.0], PLACES)
    body["results"][1]["error"] = {"code": "deadline_exceeded", "message": "too late"}
    with pytest.raises(ItemsFailed, match="1 items failed: deadline_exceeded"):
        checked_scores(body, PLACES)


def test_an_answer_says_who_gave_it() -> None:
    body = answer([0.5], [(0, None)])
    assert identity(body) == WHO
    for name in ("model", "revision", "numerics"):
        with pytest.raises(WrongAnswer, match="missing"):
            identity({**body, name: None})


def test_the_same_item_must_get_the_same_bits() -> None:
    ledger = Ledger(tolerance=0.0)
    ledger.check(WHO, "pool 1", [0.1, 0.2, 0.3])
    ledger.check(WHO, "pool 1", [0.2], start=1)
    ledger.check(WHO, "pool 2", [0.9])
    assert len(ledger) == 4
    with pytest.raises(WrongAnswer, match="two scores"):
        ledger.check(WHO, "pool 1", [0.2 + 2**-54 * 2], start=1)


def test_a_float32_score_survives_json() -> None:
    ledger = Ledger(tolerance=0.0)
    score = 0.30000001192092896
    ledger.check(WHO, "pool 1", [score])
    ledger.check(WHO, "pool 1", [json.loads(json.dumps(score))])


def test_a_tolerance_is_kept() -> None:
    ledger = Ledger(tolerance=0.01)
    ledger.check(WHO, "pool 1", [0.5])
    ledger.check(WHO, "pool 1", [0.505])
    with pytest.raises(WrongAnswer):
        ledger.check(WHO, "pool 1", [0.52])


def test_another_revision_may_score_differently() -> None:
    ledger = Ledger(tolerance=0.0)
    ledger.check(WHO, "pool 1", [0.5])
    ledger.check(("m", "r2", WHO[2]), "pool 1", [0.7])


def test_one_score_for_every_item_is_found_whichever_way_they_were_sent() -> None:
    for sent in ([("a", [0.5] * 4, 0)], [(key, [0.5], 0) for key in "abcd"], [("a", [0.5], j) for j in range(4)]):
        ledger = Ledger(tolerance=0.0)
        for key, scores, start in sent[:-1]:
            ledger.look(WHO, key, scores, start)
        with pytest.raises(WrongAnswer, match="4 different items in a row, one score"):
            ledger.look(WHO, *sent[-1])
        with pytest.raises(WrongAnswer, match="5 different items"):
            ledger.look(WHO, "e", [0.5])


def test_an_item_that_comes_again_and_scores_that_meet_by_chance_are_no_constant() -> None:
    ledger = Ledger(tolerance=0.0)
    for key in "aaaaaabcd":
        ledger.look(WHO, key, [0.5 if key in "abc" else 0.75])
    ledger.look(WHO, "e", [0.5, 0.5, 0.5, 0.25, 0.5])
    for revision in "1234":
        ledger.look(("m", revision, WHO[2]), "a", [0.5])
