"""`plaudit bon select`: what is chosen, what is written, and what is said about the rest."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest

from plaudit import cli
from plaudit.bon.cli import RuleName
from plaudit.bon.rules import RULES

if TYPE_CHECKING:
    from conftest import WireServer

Bon = Callable[..., tuple[int, str, str]]
Write = Callable[..., str]
Read = Callable[[str], list[dict[str, Any]]]
SCORES = [[0.5, 2.0, 1.0], [None, -1.0, -3.0], [None, None, None]]


@pytest.fixture
def scored(write: Write, samples: Callable[..., list[dict[str, Any]]], bon: Bon) -> str:
    return write("scored.jsonl", samples(3, 3, lambda p, i: SCORES[p][i]))


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def user(p: int) -> list[dict[str, str]]:
    return [turn("user", f"prompt {p}")]


def said(p: int, i: int) -> list[dict[str, str]]:
    return [turn("assistant", f"answer {i} to {p}")]


def gpt(p: int, i: int) -> dict[str, str]:
    return {"from": "gpt", "value": f"answer {i} to {p}"}


WRITTEN: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("sft", "sft"): [{"prompt": user(p), "completion": said(p, 1)} for p in (0, 1)],
    ("dpo", "dpo"): [
        {"prompt": user(0), "chosen": said(0, 1), "rejected": said(0, 0)},
        {"prompt": user(1), "chosen": said(1, 1), "rejected": said(1, 2)},
    ],
    ("kto", "kto"): [
        {"prompt": user(p), "completion": said(p, i), "label": label}
        for p, i, label in ((0, 1, True), (0, 0, False), (1, 1, True), (1, 2, False))
    ],
    ("openrlhf", "sft"): [
        {"input": user(0), "output": said(0, 1), "reward": 2.0},
        {"input": user(1), "output": said(1, 1), "reward": -1.0},
    ],
    ("openrlhf", "dpo"): [
        {"prompt": user(0), "chosen": said(0, 1), "chosen_reward": 2.0, "rejected": said(0, 0), "rejected_reward": 0.5},
        {
            "prompt": user(1),
            "chosen": said(1, 1),
            "chosen_reward": -1.0,
            "rejected": said(1, 2),
            "rejected_reward": -3.0,
        },
    ],
    ("openrlhf", "kto"): [
        {"output": user(p) + said(p, i), "label": label}
        for p, i, label in ((0, 1, True), (0, 0, False), (1, 1, True), (1, 2, False))
    ],
    ("llamafactory", "sft"): [{"messages": user(p) + said(p, 1)} for p in (0, 1)],
    ("llamafactory", "dpo"): [
        {"conversations": [{"from": "human", "value": f"prompt {p}"}], "chosen": gpt(p, 1), "rejected": gpt(p, worst)}
        for p, worst in ((0, 0), (1, 2))
    ],
    ("llamafactory", "kto"): [
        {"messages": user(p) + said(p, i), "label": label}
        for p, i, label in ((0, 1, True), (0, 0, False), (1, 1, True), (1, 2, False))
    ],
}


@pytest.mark.parametrize(("format", "task"), WRITTEN)
def test_the_rows_of_each_trainer(format: str, task: str, scored: str, bon: Bon, read: Read) -> None:
    code, _, err = bon("select", scored, "--out", "out.jsonl", "--format", format, "--task", task)
    assert (code, err) == (0, "") and read("out.jsonl") == WRITTEN[format, task]
    report = json.loads(Path("out.jsonl.report.json").read_text(), parse_constant=pytest.fail)
    assert report["counts"]["prompts with a choice"] == 2 and report["counts"]["samples left out: too_long"] == 4
    assert report["counts"]["prompts without a choice: no candidate"] == 1
    assert report["counts"]["rows written"] == len(WRITTEN[format, task])


@pytest.mark.parametrize("name", ["dpo_en_demo", "kto_en_demo"])
def test_llamafactory_rows_have_the_fields_of_its_own_files(
    name: str, shared_data: Path, scored: str, bon: Bon, read: Read
) -> None:
    with gzip.open(shared_data / "llamafactory_demo" / f"{name}.jsonl.gz") as file:
        real = json.loads(file.readline())
    task = name[:3]
    assert bon("select", scored, "--out", f"{task}.jsonl", "--format", "llamafactory", "--task", task)[0] == 0
    ours = read(f"{task}.jsonl")[0]
    assert shape(ours) == shape(real)
    entry = json.loads(Path(f"{task}.jsonl.report.json").read_text())["dataset_info"][task]
    columns, tags = entry["columns"], entry.get("tags", {"role_tag": "from"})
    assert entry["formatting"] == "sharegpt" and entry["file_name"] == f"{task}.jsonl"
    assert set(columns.values()) == set(real) and tags["role_tag"] in real[columns["messages"]][0]
    assert entry.get("ranking", False) is (task == "dpo")


def shape(value: Any) -> Any:
    """Field names and types, the first element for a list."""
    if isinstance(value, dict):
        return {key: shape(own) for key, own in sorted(value.items())}
    return [shape(value[0])] if isinstance(value, list) else type(value).__name__


@pytest.mark.parametrize(("rejected", "expected"), [("worst", [0]), ("second", [2]), ("all", [2, 0]), ("random", [0])])
def test_what_a_chosen_response_is_paired_with(
    rejected: str, expected: list[int], scored: str, bon: Bon, read: Read
) -> None:
    bon("select", scored, "--out", "out.jsonl", "--format", "dpo", "--rejected", rejected)
    assert [row["rejected"] for row in read("out.jsonl") if row["prompt"] == user(0)] == [said(0, i) for i in expected]


def test_a_random_choice_belongs_to_its_prompt(write: Write, samples: Any, bon: Bon, read: Read) -> None:
    """Another order, other prompts beside it: the same choice. Another seed: another one."""
    rows = samples(30, 6, lambda p, i: float(i))
    options = ("--rule", "rso", "--k", "2", "--beta", "3", "--format", "sft")
    chosen = {}
    for name, own in {"all": rows, "backwards": rows[::-1], "half": rows[:90]}.items():
        write(f"{name}.jsonl", own)
        assert bon("select", f"{name}.jsonl", "--out", f"{name}.out", *options)[0] == 0
        chosen[name] = {json.dumps(row) for row in read(f"{name}.out")}
    assert chosen["all"] == chosen["backwards"] > chosen["half"]
    bon("select", "all.jsonl", "--out", "seed.out", *options, "--seed", "1")
    assert {json.dumps(row) for row in read("seed.out")} != chosen["all"]


def test_rso_pairs_the_accepted_among_themselves(write: Write, samples: Any, bon: Bon, read: Read) -> None:
    write("s.jsonl", samples(1, 4, lambda p, i: float(i)))
    bon("select", "s.jsonl", "--out", "o.jsonl", "--rule", "rso", "--k", "4", "--beta", "1e9", "--format", "dpo")
    rows = read("o.jsonl")
    texts = {row[side][0]["content"] for row in rows for side in ("chosen", "rejected")}
    assert len(rows) == 2 and len(texts) == 4
    assert all(row["chosen"][0]["content"] > row["rejected"][0]["content"] for row in rows)


def test_equal_texts_and_equal_scores_teach_nothing(write: Write, samples: Any, bon: Bon, read: Read) -> None:
    rows = samples(2, 3, lambda p, i: 1.0)
    for row in rows[:3]:
        row["response"] = "same"
    write("s.jsonl", rows)
    assert bon("select", "s.jsonl", "--out", "o.jsonl", "--format", "dpo")[0] == 1
    counts = json.loads(Path("o.jsonl.report.json").read_text())["counts"]
    assert counts["samples left out: same text as another"] == 2 and counts["pairs left out: equal values"] == 1
    assert counts["prompts without a pair: nothing to reject"] == 1 and read("o.jsonl") == []
    bon("select", "s.jsonl", "--out", "o.jsonl", "--rule", "topk", "--k", "3")
    assert [row["completion"][0]["content"] for row in read("o.jsonl")] == [
        "same",
        *(f"answer {i} to 1" for i in range(3)),
    ]


ANSWERS = ["so #### 4", "then #### 5", "I see #### 5 ", "no idea", "#### 4 or rather #### 5", "##### "]


@pytest.mark.parametrize(("rule", "expected"), [("majority", 2), ("weighted", 0)])
def test_votes(rule: str, expected: int, write: Write, samples: Any, bon: Bon, read: Read) -> None:
    scores = [4.0, -3.0, -2.0, 9.0, -3.0, 9.0]  # one sure vote for 4 outweighs three unsure ones for 5
    rows = samples(1, 6, lambda p, i: scores[i])
    for row, text in zip(rows, ANSWERS, strict=True):
        row["response"] = text
    write("s.jsonl", rows)
    vote = ("--rule", rule, "--answer-regex", r"#### ?(\d*)", "--format", "dpo")
    assert bon("select", "s.jsonl", "--out", "o.jsonl", *vote)[0] == 0
    row = read("o.jsonl")[0]
    assert row["chosen"] == [turn("assistant", ANSWERS[expected])]
    assert row["rejected"] == [turn("assistant", {2: ANSWERS[0], 0: ANSWERS[1]}[expected])] or rule == "weighted"
    counts = json.loads(Path("o.jsonl.report.json").read_text())["counts"]
    assert counts["samples left out: no answer in it"] == 2


def test_a_majority_needs_no_scores(write: Write, samples: Any, bon: Bon, read: Read) -> None:
    rows = samples(1, 3)
    for row, text in zip(rows, ("7", "8", "8"), strict=True):
        row["response"] = text
    write("s.jsonl", rows)
    assert bon("select", "s.jsonl", "--out", "o.jsonl", "--rule", "majority", "--answer-regex", r"\d")[0] == 0
    assert read("o.jsonl")[0]["completion"] == [turn("assistant", "8")]
    code, _, err = bon("select", "s.jsonl", "--out", "o.jsonl")
    assert code == 65 and "no row has the column 'score'" in err


def test_raft_and_threshold_over_prompts(write: Write, samples: Any, bon: Bon, read: Read) -> None:
    write("s.jsonl", samples(2, 5, lambda p, i: float(10 * p + i)))
    bon("select", "s.jsonl", "--out", "o.jsonl", "--rule", "raft", "--fraction", "0.3")
    assert [row["completion"] for row in read("o.jsonl")] == [said(1, 4), said(1, 3), said(1, 2)]
    bon("select", "s.jsonl", "--out", "o.jsonl", "--rule", "threshold", "--threshold", "13.5", "--format", "kto",
        "--rejected", "all")  # fmt: skip
    assert [(row["completion"], row["label"]) for row in read("o.jsonl")] == [
        (said(1, 4), True), *((said(1, i), False) for i in (3, 2, 1, 0)),
    ]  # fmt: skip


def test_several_reward_models(write: Write, samples: Any, bon: Bon, read: Read) -> None:
    rows = samples(1, 2)
    for row, (a, b) in zip(rows, ((1.0, 3.0), (1.9, 1.9)), strict=True):
        row |= {"a_score": a, "b_score": b}
    write("s.jsonl", rows)
    several = ("--rule", "uncertainty", "--score", "a_score", "--score", "b_score")
    for penalty, expected in (("0", 0), ("0.5", 1)):  # 2 - 0.5 is less than 1.9
        assert bon("select", "s.jsonl", "--out", "o.jsonl", *several, "--penalty", penalty)[0] == 0
        assert read("o.jsonl")[0]["completion"] == said(0, expected)
    assert bon("select", "s.jsonl", "--out", "o.jsonl", "--score", "a_score", "--score", "b_score")[0] == 78
    assert bon("select", "s.jsonl", "--out", "o.jsonl", "--rule", "uncertainty")[0] == 78


@pytest.mark.parametrize(("how", "expected"), [("min", 1), ("product", 2), ("last", 0), ("mean", 2)])
def test_the_scores_of_steps(how: str, expected: int, write: Write, samples: Any, bon: Bon, read: Read) -> None:
    rows = samples(1, 3)
    steps: list[Any] = [[0.1, 0.9], [0.5, 0.55], [{"score": 1.0}, {"score": 0.4}]]
    for row, own in zip(rows, steps, strict=True):
        row["steps"] = own
    write("s.jsonl", rows)
    assert bon("select", "s.jsonl", "--out", "o.jsonl", "--steps", how)[0] == 0
    assert read("o.jsonl")[0]["completion"] == said(0, expected)


def test_a_raw_prompt_stays_text(write: Write, samples: Any, bon: Bon, read: Read) -> None:
    rows = samples(1, 2, lambda p, i: float(i))
    write("raw.jsonl", [{**row, "sampling": {"raw": True}} for row in rows])
    assert bon("select", "raw.jsonl", "--out", "o.jsonl", "--format", "dpo")[0] == 0
    assert read("o.jsonl") == [{"prompt": "prompt 0", "chosen": "answer 1 to 0", "rejected": "answer 0 to 0"}]
    assert bon("select", "raw.jsonl", "--out", "o.jsonl", "--format", "llamafactory")[0] == 78


def test_a_conversation_is_written_whole(write: Write, bon: Bon, read: Read) -> None:
    prompt = [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "And?")]
    write("s.jsonl", [{"prompt": prompt, "response": str(i), "score": i} for i in range(2)])
    bon("select", "s.jsonl", "--out", "o.jsonl", "--format", "llamafactory", "--task", "dpo")
    row = read("o.jsonl")[0]
    assert [one["from"] for one in row["conversations"]] == ["system", "human", "gpt", "human"]
    assert row["chosen"] == {"from": "gpt", "value": "1"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": "high"}, "line 2: a finite number is needed, got 'high'"),
        ({"score": True}, "line 2: a finite number is needed, got True"),
        ({"prompt": 3}, "line 2: 'prompt' must be a text or a list of messages"),
        ({"key": "twice"}, "line 2: repeats the key twice"),
        ({"sampling": ["raw"]}, "line 2: has a sampling that is no object"),
        ({"plaudit": {"revision": "r2"}}, "line 2: 'score' is a score of {'revision': 'r2'}"),
    ],
)
def test_rows_that_cannot_be_trusted(change: dict[str, Any], said: str, write: Write, bon: Bon) -> None:
    first = {"key": "twice", "prompt": "p", "response": "a", "score": 1.0, "plaudit": {"revision": "r1"}}
    second = {**first, "key": "other", "response": "b", **change}
    code, _, err = bon("select", write("s.jsonl", [first, second]), "--out", "o.jsonl")
    assert code == 65 and said in err and not Path("o.jsonl").exists()


def test_nan_is_refused_and_options_are_checked(write: Write, bon: Bon, scored: str) -> None:
    Path("nan.jsonl").write_text('{"prompt": "p", "response": "r", "score": NaN}\n')
    assert bon("select", "nan.jsonl", "--out", "o.jsonl")[0] == 65
    assert bon("select", scored, "--out", "o.jsonl", "--format", "sft", "--task", "dpo")[0] == 78
    assert bon("select", scored, "--out", "o.jsonl", "--rule", "majority")[0] == 78
    assert bon("select", scored, "--out", "o.jsonl", "--rule", "majority", "--answer-regex", "(")[0] == 78
    assert bon("select", scored, "--out", "o.jsonl", "--rule", "rso", "--beta", "0")[0] == 78
    assert bon("select", "missing.jsonl", "--out", "o.jsonl")[0] == 65
    assert bon("select", scored, "--out", "o.jsonl", "--penalty", "inf")[0] == 78
    assert bon("select", scored, "--out", "no/such/folder/o.jsonl")[0] == 65
    before = Path(scored).read_bytes()
    for verb in ("select", "score", "generate", "merge"):
        server = ("--url", "http://x") if verb == "score" else ("--policy", "x") if verb == "generate" else ()
        code, _, err = bon(verb, scored, "--out", f"./{scored}", *server)
        assert code == 65 and "is the input; choose another --out" in err and Path(scored).read_bytes() == before


def test_a_row_with_several_responses_is_as_many_samples(
    server: WireServer, write: Write, bon: Bon, read: Read
) -> None:
    """As `plaudit score` writes them, and as RLHFlow's `get_rewards.py` does, with `rewards`."""
    prompts = [user(p) for p in range(2)]
    rows = [{"prompt": prompt, "responses": ["short", "POISON", "a longer answer"]} for prompt in prompts]
    entries = {"score": EntryPoint("score", "plaudit.cli_score:score", cli.GROUP)}
    command = ("score", write("rows.jsonl", rows), "--out", "scored.jsonl", "--url", server.url)
    assert cli.run(command, entries) == 1, "one response of each has no score"
    scored = read("scored.jsonl")
    code, out, _ = bon("select", "scored.jsonl", "--out", "o.jsonl", "--rule", "best", "--format", "dpo")
    assert code == 0 and "samples: 6" in out and "samples left out: too_long: 2" in out
    best = [
        max((score, text) for score, text in zip(r["scores"], r["responses"], strict=True) if score) for r in scored
    ]
    assert [row["chosen"][0]["content"] for row in read("o.jsonl")] == [text for _, text in best]
    rewards = [{**row, "rewards": [0.5, 2, -1.5]} for row in rows]
    code, _, _ = bon("select", write("r.jsonl", rewards), "--out", "p.jsonl", "--score", "rewards", "--format", "dpo")
    assert code == 0
    assert {(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in read("p.jsonl")} == {
        ("POISON", "a longer answer")
    }
    for change in ({"rewards": [1, 2]}, {"rewards": 3}, {"responses": "abc"}):
        code, _, err = bon(
            "select", write("r.jsonl", [{**rewards[0], **change}]), "--out", "q.jsonl", "--score", "rewards"
        )
        assert code == 65 and "line 1" in err
    code, _, err = bon("score", "rows.jsonl", "--out", "n.jsonl", "--url", server.url)
    assert code == 1 and "`plaudit score` takes several" in err


def test_every_rule_can_be_asked_for() -> None:
    assert set(get_args(RuleName)) == set(RULES)


def test_samples_that_share_an_index_all_vote(write: Write, bon: Bon, read: Read) -> None:
    """Two settings have sampled the same prompt: each of their samples counts."""
    write("s.jsonl", [{"prompt": "p", "index": i, "response": text} for text, i in (("7", 0), ("8", 0), ("8", 1))])
    assert bon("select", "s.jsonl", "--out", "o.jsonl", "--rule", "majority", "--answer-regex", r"\d")[0] == 0
    assert read("o.jsonl")[0]["completion"] == [turn("assistant", "8")]
