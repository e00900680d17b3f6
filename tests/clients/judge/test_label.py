"""`plaudit judge label` against a server that speaks the OpenAI protocol."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import WireServer

_spec = spec_from_file_location("judge_script", Path(__file__).with_name("conftest.py"))
assert _spec is not None and _spec.loader is not None
_script = module_from_spec(_spec)
_spec.loader.exec_module(_script)
choice, said = _script.choice, _script.said

Judge = Callable[..., tuple[int, str, str]]
Rows = Callable[[str], list[dict[str, Any]]]
Pairs = Callable[..., str]


def options(server: WireServer, *more: str) -> tuple[str, ...]:
    made = ("--constitution", "constitution.toml", "--endpoint", server.url + "/v1", "--model", "judge-7b")
    return (*made, "--out", "labels.jsonl", *more)


def test_labels_say_who_gave_them_and_why(endpoint: WireServer, judge: Judge, pairs: Pairs, rows: Rows) -> None:
    code, out, err = judge("label", pairs(8, round=2), *options(endpoint, "--audit", "0", "--json"))
    made = rows("labels.jsonl")
    assert code == 0, err
    assert [row["label"] for row in made] == ["a", "b"] * 4 and [row["id"] for row in made] == [
        f"p{i}" for i in range(8)
    ]
    assert {row["confidence"] for row in made} == {1.0} and {row["source"] for row in made} == {"ai"}
    first = made[0]
    assert first["annotator"] == "judge-7b" and first["guideline_version"] == "2026-03" and first["round"] == 2
    assert first["rationale"] == "It says more." and first["principles"] == ["helpful"]
    assert first["confidence_from"] == "agreement" and first["consistent"] is True and first["queued"] == []
    assert len(first["settings"]["constitution"]) == 64 and first["settings"]["model"] == "judge-7b"
    assert first["tokens"] == [200, 40] and first["cost"] == pytest.approx((200 * 2 + 40 * 10) / 1e6)
    found = json.loads(out)
    assert found["labels"] == {"a": 4, "b": 4} and found["cost"] == pytest.approx(8 * 0.0008)
    assert found["first_place_share"] == 0.5 and found["consistent_share"] == 1.0
    assert len(endpoint.seen) == 16 and Path("labels.queue.jsonl").read_bytes() == b""
    body = endpoint.seen[0].body
    assert body is not None and body["top_logprobs"] == 20 and "weight 3" in body["messages"][1]["content"]


def test_a_judge_that_always_takes_the_first_gives_no_label(
    endpoint: WireServer, judge: Judge, pairs: Pairs, rows: Rows
) -> None:
    endpoint.judges = lambda prompt, a, b: choice(said("A"))  # type: ignore[attr-defined]
    code, out, _ = judge("label", pairs(6), *options(endpoint, "--json"))
    made = rows("labels.jsonl")
    assert code == 0 and {(row["label"], row["verdict"], row["confidence"]) for row in made} == {(None, "tie", 0.0)}
    found = json.loads(out)
    assert found["first_place_share"] == 1.0 and found["consistent_share"] == 0.0
    assert found["queued"]["low_confidence"] == 6
    asked = rows("labels.queue.jsonl")
    assert len(asked) == 6 and all(row["label"] is None for row in asked)
    assert not any({"verdict", "rationale", "confidence", "opinions"} & row.keys() for row in asked)  # people are blind


def test_a_constant_advantage_of_one_place_cancels_in_log_probabilities(
    endpoint: WireServer, judge: Judge, pairs: Pairs, rows: Rows
) -> None:
    """Odds of the better response 3 to 1, odds of the first place 9 to 1: the judge says A in both orders."""

    def biased(_prompt: str, a: str, b: str) -> dict[str, Any]:
        odds = 9 * (3 if len(a) > len(b) else 1 / 3)
        return choice(said("A"), {" A": 0.9 * odds / (1 + odds), " B": 0.9 / (1 + odds), " the": 0.1})

    endpoint.judges = biased  # type: ignore[attr-defined]
    assert judge("label", pairs(4), *options(endpoint, "--audit", "0"))[0] == 0
    made = rows("labels.jsonl")
    assert [row["label"] for row in made] == ["a", "b", "a", "b"]
    assert all(row["confidence"] == pytest.approx(0.75, abs=1e-4) for row in made)
    assert {row["confidence_from"] for row in made} == {"logprobs"} and not any(row["consistent"] for row in made)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (choice("I like A."), "does not end with"),
        (choice(said("A") + "\nOr maybe B."), "does not end with"),
        (choice(said("A or B")), "does not end with"),
        (choice("Verdict: A"), "no line `Principles:`"),
        (choice("<think>Principles: helpful\nVerdict: A"), "does not end with"),
        ({**choice(said("A")), "finish_reason": "length"}, "was cut"),
        ({"index": 0, "finish_reason": "stop", "message": {"content": None}}, "holds no text"),
    ],
)
def test_what_cannot_be_read_is_an_error_and_no_label(
    endpoint: WireServer, judge: Judge, pairs: Pairs, rows: Rows, answer: dict[str, Any], reason: str
) -> None:
    endpoint.judges = lambda prompt, a, b: answer if prompt == "q 1" else choice(said("tie"))  # type: ignore[attr-defined]
    code, out, _ = judge("label", pairs(2), *options(endpoint, "--json", "--audit", "0"))
    fine, bad = rows("labels.jsonl")
    assert code == 1 and fine["label"] == "tie" and "error" not in fine
    assert bad["label"] is bad["verdict"] is bad["confidence"] is None
    assert bad["error"]["code"] == "unreadable_verdict" and reason in bad["error"]["message"]
    assert bad["queued"] == ["no_verdict"] and json.loads(out)["errors"] == {"unreadable_verdict": 1}
    assert [row["id"] for row in rows("labels.queue.jsonl")] == ["p1"]


def test_safety_and_an_audited_share_go_to_people(endpoint: WireServer, judge: Judge, pairs: Pairs, rows: Rows) -> None:
    def longer(prompt: str, a: str, b: str) -> dict[str, Any]:
        return choice(said("A" if len(a) > len(b) else "B", "**Harmless**" if prompt == "q 3" else "none"))

    endpoint.judges = longer  # type: ignore[attr-defined]
    assert judge("label", pairs(200), *options(endpoint, "--audit", "0.2"))[0] == 0
    made = rows("labels.jsonl")
    assert made[3]["label"] is None and made[3]["verdict"] == "b" and "safety" in made[3]["queued"]
    audited = [row for row in made if "audit" in row["queued"]]
    assert 20 <= len(audited) <= 60 and all(row["label"] for row in audited if row is not made[3])
    assert {row["key"] for row in rows("labels.queue.jsonl")} == {row["key"] for row in made if row["queued"]}


def test_several_samples_give_a_confidence(endpoint: WireServer, judge: Judge, pairs: Pairs, rows: Rows) -> None:
    script = iter("AABABBBB")  # three of four for the first response, in both orders
    endpoint.judges = lambda prompt, a, b: choice(said(next(script)))  # type: ignore[attr-defined]
    more = ("--samples", "4", "--temperature", "1", "--audit", "0", "--no-logprobs")
    assert judge("label", pairs(1), *options(endpoint, *more))[0] == 0
    (row,) = rows("labels.jsonl")
    assert row["label"] == "a" and row["confidence"] == pytest.approx((3 / 4 + 4 / 4) / 2) and len(row["opinions"]) == 8
    body = endpoint.seen[0].body
    assert body is not None and "logprobs" not in body and body["n"] == 4


def test_a_cut_file_is_completed_alike_and_nothing_is_asked_twice(
    endpoint: WireServer, judge: Judge, pairs: Pairs
) -> None:
    arguments = ("label", pairs(6), *options(endpoint, "--audit", "0.5", "--concurrency", "1"))
    assert judge(*arguments)[0] == 0
    whole, queue = Path("labels.jsonl").read_bytes(), Path("labels.queue.jsonl").read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == 10]
    for cut in (ends[2] + 5, ends[2], ends[3] - 1):
        Path("labels.jsonl").write_bytes(whole[:cut])
        before = len(endpoint.seen)
        code, _, err = judge(*arguments)
        assert code == 0 and "3 of 6 rows are from an earlier run" in err
        assert Path("labels.jsonl").read_bytes() == whole and Path("labels.queue.jsonl").read_bytes() == queue
        assert len(endpoint.seen) - before == 2 * 3  # the torn one, and the two behind it


def test_labels_that_people_wrote_into_the_queue_survive(endpoint: WireServer, judge: Judge, pairs: Pairs) -> None:
    arguments = options(endpoint, "--audit", "1")
    assert judge("label", pairs(2), *arguments)[0] == 0
    filled = Path("labels.queue.jsonl").read_text().replace('"label":null', '"label":"tie"').rstrip("\n")
    Path("labels.queue.jsonl").write_text(filled)  # an editor that leaves no line break at the end
    assert judge("label", pairs(3), *arguments)[0] == 0
    lines = Path("labels.queue.jsonl").read_text().splitlines()
    assert "\n".join(lines[:2]) == filled and len(lines) == 3


def test_other_settings_or_rules_need_another_file(endpoint: WireServer, judge: Judge, pairs: Pairs) -> None:
    assert judge("label", pairs(2), *options(endpoint))[0] == 0
    code, _, err = judge("label", pairs(2), *options(endpoint, "--max-tokens", "9"))
    assert code == 65 and "other settings" in err
    text = Path("constitution.toml").read_text()
    Path("constitution.toml").write_text(text.replace("prompt = 2.0", "prompt = 3.0"))
    assert judge("label", pairs(2), *options(endpoint))[0] == 0  # a price is no rule
    Path("constitution.toml").write_text(text.replace("does no harm", "does harm"))
    assert judge("label", pairs(2), *options(endpoint))[0] == 65


@pytest.mark.parametrize("other", [("--min-confidence", "0.9"), ("--audit", "0.5")])
def test_one_file_has_one_rule_of_what_goes_to_people(
    endpoint: WireServer, judge: Judge, pairs: Pairs, rows: Rows, other: tuple[str, str]
) -> None:
    assert judge("label", pairs(2), *options(endpoint))[0] == 0
    assert rows("labels.jsonl")[0]["settings"]["routing"] == {"least": 0.7, "audit": 0.05}
    before = Path("labels.jsonl").read_bytes(), len(endpoint.seen)
    code, _, err = judge("label", pairs(3), *options(endpoint, *other))
    assert code == 65 and "'least': 0.7, 'audit': 0.05" in err and "another --out" in err
    assert (Path("labels.jsonl").read_bytes(), len(endpoint.seen)) == before
    assert judge("label", pairs(3), *options(endpoint))[0] == 0 and len(rows("labels.jsonl")) == 3


def test_rows_that_do_not_tell_their_rule_stay_where_this_one_would_have_made_them(
    endpoint: WireServer, judge: Judge, pairs: Pairs, rows: Rows
) -> None:
    """As an older version wrote them."""

    def unsure(_prompt: str, a: str, b: str) -> dict[str, Any]:
        better, other = "AB" if len(a) > len(b) else "BA"
        return choice(said(better), {f" {better}": 0.6, f" {other}": 0.4})

    endpoint.judges = unsure  # type: ignore[attr-defined]
    assert judge("label", pairs(3), *options(endpoint, "--audit", "0", "--min-confidence", "0.4"))[0] == 0
    made = rows("labels.jsonl")
    assert all(0.4 < row["confidence"] < 0.7 and not row["queued"] for row in made)
    for row in made:
        del row["settings"]["routing"]
    Path("labels.jsonl").write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in made))
    for more in (("--audit", "0"), ("--audit", "1", "--min-confidence", "0.4")):
        code, _, err = judge("label", pairs(4), *options(endpoint, *more))
        assert code == 65 and "not told" in err
    assert judge("label", pairs(4), *options(endpoint, "--audit", "0", "--min-confidence", "0.3"))[0] == 0
    assert ["routing" in row["settings"] for row in rows("labels.jsonl")] == [False, False, False, True]


def test_a_judge_that_falls_silent_is_asked_again(endpoint: WireServer, judge: Judge, pairs: Pairs) -> None:
    endpoint.fail({"delay": 30.0})
    assert judge("label", pairs(1), *options(endpoint, "--timeout", "0", "--attempt-timeout", "0.3"))[0] == 0
    assert len(endpoint.seen) >= 3  # a good answer may come too late as well


def test_a_server_that_fails_for_a_while_costs_nothing_but_time(
    endpoint: WireServer, judge: Judge, pairs: Pairs, rows: Rows
) -> None:
    endpoint.fail({"status": 503, "body": {}}, {"kind": "reset"}, {"status": 429, "body": {}})
    assert judge("label", pairs(4), *options(endpoint))[0] == 0
    assert all(row["verdict"] for row in rows("labels.jsonl")) and len(endpoint.seen) == 11


def test_a_server_that_is_gone_stops_the_run_without_a_row(judge: Judge, pairs: Pairs, endpoint: WireServer) -> None:
    endpoint.fail(*[{"status": 503, "body": {}}] * 99)
    code, _, err = judge("label", pairs(4), *options(endpoint, "--timeout", "0.3"))
    assert code == 69 and Path("labels.jsonl").read_bytes() == b"", err


def test_a_refused_comparison_is_an_error_unless_it_is_the_first(
    endpoint: WireServer, judge: Judge, pairs: Pairs, rows: Rows
) -> None:
    pairs(2)
    text = Path("pairs.jsonl").read_text()
    Path("pairs.jsonl").write_text(text.replace("q 1", "LONG"))
    assert judge("label", "pairs.jsonl", *options(endpoint))[0] == 1
    assert rows("labels.jsonl")[1]["error"] == {"code": "context_length_exceeded", "message": "too many tokens"}
    Path("pairs.jsonl").write_text(text.replace("q 0", "LONG"))
    code, _, err = judge("label", "pairs.jsonl", *options(endpoint)[:-2], "--out", "other.jsonl")
    assert code == 65 and "too many tokens" in err


def test_killed_at_any_moment_it_goes_on(endpoint: WireServer, judge: Judge, pairs: Pairs, rows: Rows) -> None:
    endpoint.hold = 0.01
    arguments = ("label", pairs(12), *options(endpoint, "--audit", "1", "--concurrency", "2"))
    program = "from plaudit.judge.cli import app; app(standalone_mode=False)"
    for moment in (3, 8):
        process = subprocess.Popen([sys.executable, "-P", "-c", program, *arguments], stdout=subprocess.DEVNULL)
        while len(endpoint.seen) < 2 * moment and process.poll() is None:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert judge(*arguments)[0] == 0
    assert sorted(row["id"] for row in rows("labels.jsonl")) == sorted(f"p{i}" for i in range(12))
    assert sorted(row["id"] for row in rows("labels.queue.jsonl")) == sorted(f"p{i}" for i in range(12))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ('guideline_version = "2026-03"', "guideline_version"),
        ("weight = 3", "weight"),
        ('id = "harmless"', "id"),
        ("safety = true", "safety"),
    ],
)
def test_a_bad_constitution_is_refused(
    endpoint: WireServer, judge: Judge, pairs: Pairs, change: str, reason: str
) -> None:
    path = Path("constitution.toml")
    path.write_text(path.read_text().replace(change, change.split("=")[0] + "= -1"))
    code, _, err = judge("label", pairs(1), *options(endpoint))
    assert code == 78 and reason in err and not endpoint.seen
    path.write_text('guideline_version = "1"\ntemplate = "{prompt}"\n[[principles]]\nid = "x"\ntext = "y"\n')
    code, _, err = judge("label", pairs(1), *options(endpoint))
    assert code == 78 and "lacks the place" in err


def test_rows_without_a_pair_are_refused_before_anything_is_asked(endpoint: WireServer, judge: Judge) -> None:
    good = {"prompt": "p", "chosen": [{"role": "assistant", "content": "x"}], "rejected": "y"}
    for bad, reason in (
        ({"prompt": "p"}, "no 'chosen'"),
        ({**good, "chosen": 3}, "must be a text"),
        ([], "not a JSON"),
    ):
        Path("pairs.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        code, _, err = judge("label", "pairs.jsonl", *options(endpoint))
        assert code == 65 and "line 2" in err and reason in err and not endpoint.seen
