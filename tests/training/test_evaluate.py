"""Scores and comparisons of a real tiny model, and the last step: a directory that scores as it was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from plaudit import _trees as trees
from plaudit_model import contract
from plaudit_model.errors import CheckpointError, ItemError
from plaudit_model.records import Comparison, Message, Origin, Record, Votes
from plaudit_model.reward_model import RewardModel
from plaudit_training import finish
from plaudit_training.batches import Example, encode_records
from plaudit_training.config import RunConfig
from plaudit_training.evaluate import evaluate, judge, score, statistics
from plaudit_training.finish import ReloadMismatch
from plaudit_training.state import Progress
from plaudit_training.train import Task

Toy = Callable[[int, int], list[Record]]
ModelDir = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(reward_model_dir: ModelDir) -> RewardModel:
    return RewardModel.load(reward_model_dir("qwen3"), device="cpu")


@pytest.fixture(scope="module")
def examples(model: RewardModel, toy: Toy) -> tuple[Example, ...]:
    return encode_records(toy(30, 5), model.encoder).examples


def example(model: RewardModel, *comparisons: Comparison, prompt: str = "red") -> Example:
    record = Record("r", (Message("user", prompt),), ("a", "b b b", "c"), comparisons, Origin("file.jsonl", 7))
    (found,) = encode_records([record], model.encoder).examples
    return found


def test_scores_are_those_of_the_model_by_record(model: RewardModel, examples: tuple[Example, ...]) -> None:
    scores = score(model, examples, token_budget=300)
    assert [len(values) for values in scores] == [len(e.items) for e in examples]
    one = examples[7]
    alone = [model.score_encoded([item])[0, 0] for item in one.items]
    assert scores[7].tolist() == [float(value) for value in alone], "exact: alone or among others"


def test_an_evaluation_counts_what_the_scores_say(model: RewardModel, examples: tuple[Example, ...]) -> None:
    ticks: list[int] = []
    result = evaluate(model, examples, token_budget=4096, bootstrap=50, tick=ticks.append)
    wins = [
        values[c.first] > values[c.second] if c.outcome == "first" else values[c.second] > values[c.first]
        for e, values in zip(examples, result.scores, strict=True) for c in e.record.comparisons
    ]  # fmt: skip
    assert result.metrics["accuracy"].value == pytest.approx(np.mean(wins))
    assert result.comparisons == result.decided == len(wins)
    assert sum(ticks) == len(examples)
    assert json.loads(json.dumps(result.to_json()))["responses"] == sum(len(e.items) for e in examples)


def test_a_comparison_is_oriented_and_has_its_votes_and_lengths(model: RewardModel) -> None:
    found = example(model, Comparison(0, 1, "second", votes=Votes(1, 3)), Comparison(2, 0, "tie"))
    judged = judge([found], [np.array([1.0, 5.0, -2.0])], "conversation")
    assert judged.delta.tolist() == [4.0, -3.0]
    assert judged.share.tolist() == [0.75, 0.5]
    assert judged.decided.tolist() == [True, False]
    lengths = [len(item.ids) - item.prompt_tokens for item in found.items]
    assert judged.chosen_tokens.tolist() == [lengths[1], lengths[2]]
    assert judged.rejected_tokens.tolist() == [lengths[0], lengths[0]]
    assert lengths[1] > lengths[0]


def test_clusters_are_conversations_or_the_two_responses(model: RewardModel) -> None:
    first = example(model, Comparison(0, 1, "first"), Comparison(1, 2, "first"))
    same, other = example(model, Comparison(0, 1, "first")), example(model, Comparison(0, 1, "first"), prompt="blue")
    scores = [np.arange(3.0)] * 3
    assert judge([first, same, other], scores, "conversation").clusters.tolist() == [[0], [0], [0], [1]]
    assert judge([first, same, other], scores, "response").clusters.tolist() == [[0, 1], [1, 2], [0, 1], [0, 1]]


def test_statistics_are_of_all_responses() -> None:
    found = statistics([np.array([1.0, 2.0]), np.array([6.0])])
    assert found is not None
    assert (found.mean, found.n) == (3.0, 3) and found.std == pytest.approx(np.std([1, 2, 6]))
    assert statistics([]) is None and statistics([np.array([2.0, 2.0])]) is None


def test_a_score_that_is_not_finite_is_an_error_with_its_place(reward_model_dir: ModelDir, toy: Toy) -> None:
    broken = RewardModel.load(reward_model_dir("qwen3"), device="cpu")
    found = encode_records(toy(3, 0), broken.encoder).examples
    with torch.no_grad():
        broken.module.score.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    with pytest.raises(ItemError, match="not finite for the record in toy, line 1"):
        score(broken, found, token_budget=4096)


def task(model: RewardModel, examples: tuple[Example, ...], held_out: tuple[Example, ...]) -> Task:
    changes = {"evaluation.bootstrap": 20, "optim.batch_pairs": 8, "label": "a test"}
    return Task(model, examples, held_out, trees.changed(RunConfig(), changes), "data")


def test_what_is_saved_scores_as_what_was_trained(
    reward_model_dir: ModelDir, examples: tuple[Example, ...], tmp_path: Path
) -> None:
    trained = RewardModel.from_base(reward_model_dir("qwen3"), seed=0, device="cpu")
    finished = finish.finish(task(trained, examples, examples), Progress(step=3), {"base": {}}, tmp_path / "model")
    known = contract.read(tmp_path / "model")
    assert finished.evaluation is not None and known.evaluation == finished.evaluation.to_json()
    assert known.label == "a test" and known.lineage["steps"] == 3
    scores = np.concatenate(finished.evaluation.scores)
    assert known.statistics is not None
    assert (known.statistics.mean, known.statistics.std) == (scores.mean(), scores.std())


def test_without_held_out_records_nothing_is_claimed(
    reward_model_dir: ModelDir, examples: tuple[Example, ...], tmp_path: Path
) -> None:
    trained = RewardModel.from_base(reward_model_dir("qwen3"), seed=0, device="cpu")
    finish.finish(task(trained, examples, ()), Progress(), {}, tmp_path / "model")
    known = contract.read(tmp_path / "model")
    assert known.statistics is None and known.calibration is None and known.evaluation == {}


def test_a_model_that_scores_otherwise_when_loaded_is_refused(
    reward_model_dir: ModelDir, examples: tuple[Example, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = RewardModel.from_base(reward_model_dir("qwen3"), seed=0, device="cpu")
    real = RewardModel.save

    def nudged(self: RewardModel, directory: Path, known: contract.RewardContract, *, as_adapter: bool) -> None:
        with torch.no_grad():
            next(self.module.parameters()).mul_(1.001)
        real(self, directory, known, as_adapter=as_adapter)

    monkeypatch.setattr(RewardModel, "save", nudged)
    with pytest.raises(ReloadMismatch, match="do not use it"):
        finish.finish(task(trained, examples, examples), Progress(), {}, tmp_path / "model")
    assert ReloadMismatch.exit_code == 1


def test_a_changed_weight_file_is_not_loaded(
    reward_model_dir: ModelDir, examples: tuple[Example, ...], tmp_path: Path
) -> None:
    trained = RewardModel.from_base(reward_model_dir("qwen3"), seed=0, device="cpu")
    finish.finish(task(trained, examples[:3], ()), Progress(), {}, tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="sha256 differs"):
        RewardModel.load(tmp_path / "model")


def test_the_temperature_of_an_evaluation_rescales_its_probabilities(
    model: RewardModel, examples: tuple[Example, ...]
) -> None:
    cold, warm = (evaluate(model, examples, token_budget=4096, bootstrap=0, temperature=t) for t in (1.0, 50.0))
    assert cold.metrics["accuracy"] == warm.metrics["accuracy"]
    assert warm.metrics["nll"].value == pytest.approx(np.log(2), abs=0.05)
    assert replace(warm, temperature=1.0).metrics["nll"] != cold.metrics["nll"]
