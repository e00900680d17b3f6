"""Offline scoring in the wire's shapes, `plaudit info` and `plaudit verify`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from plaudit_model import cli, contract
from plaudit_model.errors import CheckpointError
from plaudit_model.local import open_scorer
from plaudit_model.reward_model import RewardModel

ModelDir = Callable[[str], Path]

app = typer.Typer()
app.command("info")(cli.info)
app.command("verify")(cli.verify)
run = CliRunner().invoke


def test_every_shape_is_scored_and_a_bad_item_harms_no_neighbour(reward_model_dir: ModelDir) -> None:
    scorer = open_scorer(reward_model_dir("qwen3"))
    ids = scorer.model.encoder.encode("Hi", "Hello").ids.tolist()
    results = scorer.score_items(
        [
            {"prompt": "Hi", "response": "Hello"},
            {"prompt": "Hi", "responses": ["Hello", "\ud800", ""]},
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
            {"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"},
            {"input_ids": ids},
            {"prompt": "Hi", "text": "two shapes"},
        ]
    )
    scores = [r["score"] for r in results]
    same = [scores[i] for i in (0, 1, 4, 5, 6)]
    assert len(set(same)) == 1 and same[0] is not None
    assert scores[3] is not None
    assert [r["error"]["code"] for r in results if "error" in r] == ["invalid_unicode", "invalid_messages"]
    assert [(r["item_index"], r["response_index"]) for r in results[:4]] == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert [r["index"] for r in results] == list(range(8))


@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_verify_agrees_with_plain_transformers(reward_model_dir: ModelDir, family: str) -> None:
    result = run(app, ["verify", str(reward_model_dir(family)), "--json", "--limit", "24"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["holds"] and report["n"] == 24 and report["flips"] == 0


def test_verify_fails_on_a_model_that_does_not_score_as_it_says(
    reward_model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = RewardModel.score_encoded
    monkeypatch.setattr(RewardModel, "score_encoded", lambda self, items: right(self, items) * 1.00006)
    result = run(app, ["verify", str(reward_model_dir("qwen3"))])
    assert result.exit_code == 1 and "DISAGREE" in result.output


def test_verify_reads_items_from_a_file(reward_model_dir: ModelDir, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"prompt": "Hi", "responses": ["Hello", "No"]}\n\n{"prompt": "Hi", "response": "Yes"}\n')
    result = run(app, ["verify", str(reward_model_dir("qwen3")), "--data", str(path), "--json"])
    assert json.loads(result.stdout)["n"] == 3


def test_info_shows_the_contract(reward_model_dir: ModelDir) -> None:
    shown = json.loads(run(app, ["info", str(reward_model_dir("qwen3")), "--json"]).stdout)
    assert shown["architecture"] == "Qwen3ForSequenceClassification" and shown["revision"]
    for_people = run(app, ["info", str(reward_model_dir("qwen3"))]).stdout
    assert "Qwen3ForSequenceClassification" in for_people and "--json" in for_people
    assert shown["template"]["sha256"][:12] in for_people and shown["template"]["sha256"] not in for_people


def test_info_sums_up_what_training_left(reward_model_dir: ModelDir) -> None:
    known = contract.read(reward_model_dir("qwen3"))
    trained = replace(
        known, statistics=contract.Statistics(0.25, 1.5, 40),
        lineage={"base": {"name": "some-base", "revision": "abc"}, "data": {"records": 90, "eval_records": 10}},
        evaluation={"accuracy": {"value": 0.8, "low": 0.7, "high": 0.9, "n": 10}},
    )  # fmt: skip
    said = cli.summary(trained)
    assert said["accuracy"] == "0.8000 [0.7000, 0.9000], 10 comparisons" and said["records"].startswith("90 trained")
    assert said["base"] == "some-base, revision abc" and said["scores"].startswith("mean 0.25")
    odd = cli.summary(replace(known, lineage={"base": "x", "data": 3}, evaluation={"accuracy": {"value": None}}))
    assert not {"accuracy", "records", "base"} & set(odd)


def test_info_says_that_a_file_is_not_the_one_listed(reward_model_dir: ModelDir, tmp_path: Path) -> None:
    shutil.copytree(reward_model_dir("qwen3"), tmp_path / "m")
    with (tmp_path / "m" / "model.safetensors").open("r+b") as weights:
        weights.seek(-4, 2)
        weights.write(b"bits")
    with pytest.raises(CheckpointError, match="sha256 differs"):
        app(["info", str(tmp_path / "m")], standalone_mode=False)
