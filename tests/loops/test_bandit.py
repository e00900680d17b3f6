"""A bandit: one letter is the whole response, and every algorithm must find what is known to be best."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from plaudit import _trees as trees
from plaudit_loops import verbs
from plaudit_loops.config import RlConfig
from plaudit_loops.policy import load_policy

PROMPTS = ("a b", "c", "d e f", "g h")
PAYS = {"a": 0.0, "b": 0.2, "c": 1.0}


def configuration(policy: Path, prompts: Path, algo: str, **changes: Any) -> RlConfig:
    values = {
        "model.policy": str(policy), "rollout.prompts": [str(prompts)], "algorithm.algo": algo, "steps": 24,
        "rollout.max_new_tokens": 1, "rollout.prompts_per_step": 8, "rollout.group_size": 8, "kl.kl_coef": 0.0,
        "reward.missing_eos_penalty": 0.0, "optim.learning_rate": 3e-3, "optim.micro_batch": 128,
        "optim.min_lr_ratio": 1.0, "algorithm.minibatches": 1, "run.report_to": [], "rollout.rollout_batch": 128,
        "algorithm.value_warmup_steps": 2, "algorithm.ppo_epochs": 1,
    } | changes  # fmt: skip
    return trees.changed(RlConfig(), values)


def chances(directory: Path, prompt: str = "a b") -> dict[str, float]:
    policy = load_policy(directory, device="cpu", autocast=False)
    ids = torch.tensor([policy.encode_prompt(prompt)])
    with torch.no_grad():
        probabilities = policy.module(input_ids=ids).logits[0, -1].softmax(-1)
    return {policy.tokenizer.convert_ids_to_tokens(i): float(p) for i, p in enumerate(probabilities)}


@pytest.mark.parametrize("algo", ["ppo", "grpo", "rloo", "reinforce++"])
def test_every_algorithm_finds_the_arm_that_pays(
    algo: str, tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    config = configuration(tiny_policy_dir, prompts, algo, **{"steps": 32, "optim.learning_rate": 6e-3})
    verbs.rl(config, tmp_path / "out", quiet, computed(lambda text: PAYS.get(text, 0.0)))
    assert chances(tmp_path / "out/policy")["c"] > 0.9
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["objective/kl"] == pytest.approx(0, abs=1e-6), "the policy begins at its reference"
    assert lines[-1]["objective/scores"] > 0.9 and lines[-1]["objective/kl"] > 0.5


@pytest.mark.parametrize("placed", [{"kl.kl_in": "reward"}, {"kl.kl_in": "loss", "kl.kl_estimator": "k2"}])
def test_with_a_penalty_the_optimum_is_the_tilted_reference(
    placed: dict[str, str], tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    """The maximum of E[r] - beta KL is pi proportional to ref e^(r / beta), and RLOO's gradient is unbiased."""
    beta = 0.5
    config = configuration(
        tiny_policy_dir, prompts, "rloo", **{"kl.kl_coef": beta, "steps": 40, "optim.min_lr_ratio": 0.0, **placed}
    )
    verbs.rl(config, tmp_path / "out", quiet, computed(lambda text: PAYS.get(text, 0.0)))
    policy = load_policy(tiny_policy_dir, device="cpu", autocast=False, seed=config.run.seed)
    policy.save(tmp_path / "reference")
    before, after = chances(tmp_path / "reference"), chances(tmp_path / "out/policy")
    tilted = {arm: p * math.exp(PAYS.get(arm, 0.0) / beta) for arm, p in before.items()}
    total = sum(tilted.values())
    for arm, p in tilted.items():
        assert after[arm] == pytest.approx(p / total, abs=0.05), arm


def test_the_run_stops_within_its_kl_budget(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    config = configuration(tiny_policy_dir, prompts, "rloo", **{"kl.kl_budget": 0.3})
    verbs.rl(config, tmp_path / "out", quiet, computed(lambda text: PAYS.get(text, 0.0)))
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert "exceeds the budget of 0.3" in report["stopped"] and report["steps"] < config.steps
    policy = load_policy(tiny_policy_dir, device="cpu", autocast=False, seed=config.run.seed)
    policy.save(tmp_path / "reference")
    divergences = []
    for prompt in PROMPTS:
        p, q = chances(tmp_path / "out/policy", prompt), chances(tmp_path / "reference", prompt)
        divergences.append(sum(p[a] * math.log(p[a] / q[a]) for a in p))
    assert 0.1 < sum(divergences) / len(PROMPTS) < 0.4, "the policy that is kept is the last one within"


def test_the_coefficient_follows_the_target(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    options = {"kl.kl_target": 0.05, "kl.kl_horizon": 500, "kl.kl_coef": 0.01, "steps": 20}
    config = configuration(tiny_policy_dir, prompts, "rloo", **options)
    verbs.rl(config, tmp_path / "out", quiet, computed(lambda text: PAYS.get(text, 0.0)))
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    moves = [(line["objective/kl"], b["objective/kl_coef"] - line["objective/kl_coef"])
             for line, b in zip(lines, lines[1:], strict=False)]  # fmt: skip
    assert all((kl > 0.05) == (change > 0) for kl, change in moves)
    assert {change > 0 for _, change in moves} == {True, False}
