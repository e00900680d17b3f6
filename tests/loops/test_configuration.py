"""Configurations: as TOML, as options, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from plaudit import _trees as trees
from plaudit.errors import ConfigurationError
from plaudit_loops import cli
from plaudit_loops.cli import configured
from plaudit_loops.config import DpoConfig, RlConfig, SftConfig, learning_rate, resolved


@pytest.mark.parametrize("kind", [SftConfig, DpoConfig, RlConfig])
def test_what_is_written_is_read_back(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    odd = trees.changed(kind(), {"model.policy": 'a "quoted"\\ path\x7f', "run.report_to": [], "optim.adam_beta1": 0.5})
    path.write_text(trees.toml(odd))
    assert trees.read(path, kind) == odd != kind()


@pytest.mark.parametrize("kind", [SftConfig, DpoConfig, RlConfig])
def test_every_field_has_a_name_of_its_own_and_a_sentence(kind: Any) -> None:
    names = [path.rpartition(".")[2] for path, *_ in trees.leaves(kind)]
    assert len(names) == len(set(names))
    assert all(field.metadata["help"] for _, field, _ in trees.leaves(kind))


@pytest.mark.parametrize(("verb", "kind"), [(cli.sft, SftConfig), (cli.rl, RlConfig), (cli.dpo, DpoConfig)])
def test_help_names_every_option(verb: Any, kind: Any) -> None:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(verb)
    said = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["--help"])
    assert said.exit_code == 0
    for path, *_ in trees.leaves(kind):
        name = path.rpartition(".")[2]
        assert "--" + name.replace("_", "-") in said.output or f"{name}..." in said.output, name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rollout.prompt": ["x"]}, "unknown key rollout.prompt; known keys: steps"),
        ({"steps": 0}, "steps must lie in 1..inf, got 0"),
        ({"steps": True}, "steps: expected an integer, got True"),
        ({"algorithm.algo": "sac"}, "algorithm.algo: expected one of ppo, grpo, rloo, reinforce"),
        ({"kl.kl_coef": "much"}, "kl.kl_coef: expected a finite number"),
        ({"run.report_to": "tensorboard"}, "run.report_to: expected a list"),
        ({"kl.kl_in": "reward", "kl.kl_estimator": "k3"}, "kl.kl_estimator in the reward must be k1"),
        ({"algorithm.algo": "grpo", "kl.kl_estimator": "k1"}, "kl.kl_estimator in the loss must be k2 or k3"),
        ({"algorithm.algo": "rloo", "rollout.group_size": 1}, "rollout.group_size must be at least 2"),
        ({"kl.kl_target": 6.0, "kl.kl_coef": 0.0}, "kl.kl_target adapts kl.kl_coef by a factor, and that is 0"),
        ({"algorithm.minibatches": 64}, "fewer than algorithm.minibatches"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        resolved(trees.changed(RlConfig(), values))


def test_what_depends_on_the_algorithm_is_filled_in_and_what_is_given_stays() -> None:
    grpo = trees.flatten(resolved(trees.changed(RlConfig(), {"algorithm.algo": "grpo", "kl.kl_coef": 0.0})))
    assert grpo["rollout.group_size"] == 8 and grpo["kl.kl_in"] == "loss" and grpo["kl.kl_estimator"] == "k3"
    assert grpo["kl.kl_coef"] == 0.0 and grpo["algorithm.loss_aggregation"] == "sequence"
    ppo = trees.flatten(resolved(RlConfig()))
    assert ppo["rollout.group_size"] == 1 and ppo["algorithm.ppo_epochs"] == 4 and ppo["kl.kl_coef"] == 0.05


def test_the_starter_tasks_bring_the_recipe_that_was_measured() -> None:
    sft, derived = configured(SftConfig, None, {"data": ["starter"]})
    assert derived == {"starter_records": 13_000, "epochs": 2, "batch_size": 16}
    assert (sft.starter_records, sft.epochs, sft.batch_size) == (13_000, 2, 16)
    assert learning_rate("sft", 1_000_000) == 4e-3
    rl, derived = configured(RlConfig, None, {"algo": "grpo"})
    assert rl.kl.kl_budget == derived["kl.kl_budget"] == 8.0 and rl.steps == 60
    assert (rl.rollout.prompts_per_step, rl.rollout.group_size, rl.kl.kl_in) == (16, 4, "reward")


def test_what_is_named_goes_before_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("epochs = 1\n")
    sft, derived = configured(SftConfig, path, {"data": ["starter"], "batch_size": 32})
    assert (sft.epochs, sft.batch_size, sft.starter_records) == (1, 32, 13_000)
    assert derived == {"starter_records": 13_000}
    assert configured(RlConfig, None, {"kl_budget": 0.0})[0].kl.kl_budget == 0.0


def test_other_data_brings_no_recipe() -> None:
    assert configured(SftConfig, None, {"data": ["chats.jsonl"]}) == (SftConfig(data=("chats.jsonl",)), {})
    assert configured(RlConfig, None, {"prompts": ["p.jsonl"]})[1] == {}
    assert configured(DpoConfig, None, {"data": ["pairs.jsonl"]})[1] == {}
