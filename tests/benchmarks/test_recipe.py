"""What `plaudit sft starter` and `plaudit rl` do by themselves is what benchmarks/policies.py measured."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from plaudit._trees import flatten
from plaudit_loops import config as configs
from plaudit_loops.config import AlgorithmConfig, RlConfig, SftConfig

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def benchmark(name: str) -> Any:
    sys.path.append(str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def policies() -> Any:
    return benchmark("policies")


@pytest.fixture(scope="module")
def benchmark_loops() -> Any:
    return benchmark("loops")


def options(words: list[str]) -> dict[str, str]:
    pairs = zip(words[::2], words[1::2], strict=True)
    return {name.removeprefix("--").replace("-", "_"): value for name, value in pairs}


@pytest.mark.parametrize(
    ("verb", "config", "name"), [("sft", SftConfig(data=("starter",)), "SFT"), ("rl", RlConfig(), "RL")]
)
def test_the_recipe_is_the_one_that_was_measured(policies: Any, verb: Any, config: Any, name: str) -> None:
    measured = options(getattr(policies, name))
    assert float(measured.pop("learning_rate")) == configs.learning_rate(verb, 1_097_856)
    every = flatten(config) | configs.recipe(config)
    found = {path.rpartition(".")[2]: value for path, value in every.items()}
    for option in measured.keys() - {"micro_batch", "sample_every", "samples"}:  # memory, and what is kept
        assert type(found[option])(measured[option]) == found[option], option


def test_every_algorithm_has_the_groups_and_the_penalty_that_were_measured(benchmark_loops: Any) -> None:
    for algo, group in benchmark_loops.GROUPS.items():
        config = RlConfig(algorithm=AlgorithmConfig(algo=algo))
        recipe = configs.recipe(config)
        assert (recipe["rollout.group_size"], recipe["rollout.prompts_per_step"]) == (group, 64 // group), algo
        assert recipe["kl.kl_in"] == "reward"
