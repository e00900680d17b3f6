"""Prompts: deterministic, different, and disjoint between the two seed ranges."""

from __future__ import annotations

from random import Random
from typing import get_args

import pytest

from plaudit_model.starter import HELD_OUT_SEEDS, Kind, candidates, is_held_out, tasks
from plaudit_model.starter import tasks as draw


def test_the_same_arguments_give_the_same_tasks() -> None:
    assert tasks(60, 5) == tasks(60, 5)
    assert tasks(60, 5)[:20] == tasks(20, 5)
    assert tasks(60, 5) != tasks(60, 6)


def test_the_kinds_take_turns() -> None:
    kinds = [task.kind for task in tasks(12, 0)]
    assert kinds == list(get_args(Kind)) * 2


def test_prompts_do_not_repeat() -> None:
    prompts = [task.prompt for task in tasks(3000, 1)]
    assert len(set(prompts)) == len(prompts)


def test_held_out_seeds_share_no_prompt_with_the_others() -> None:
    train = {task.prompt for seed in range(3) for task in tasks(1000, seed)}
    held_out = {task.prompt for seed in range(3) for task in tasks(600, HELD_OUT_SEEDS + seed)}
    assert not train & held_out
    assert all(map(is_held_out, held_out)) and not any(map(is_held_out, train))


def test_more_prompts_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="used up after"):
        draw(50_000, HELD_OUT_SEEDS)


def test_candidates_are_different_and_deterministic() -> None:
    for task in tasks(60, 2):
        answers = candidates(task, Random(7))
        assert answers == candidates(task, Random(7))
        assert len(set(answers)) == len(answers) >= 2


def test_every_prompt_is_one_line_of_text() -> None:
    for task in tasks(600, 4):
        assert task.prompt == task.prompt.strip()
        assert "\n" not in task.prompt and "{" not in task.prompt
