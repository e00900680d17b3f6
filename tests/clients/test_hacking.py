"""Signs of reward hacking: values in, a verdict out; and the callback that ends a training."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from plaudit import errors
from plaudit.adapters.hacking import HackingLimits, RewardHackingMonitor, Verdict
from plaudit.adapters.trl import HackingCallback

QUIET: dict[str, Any] = {"reward": 0.0, "std": 1.0, "length": 100.0, "kl": 0.1}


def monitor(**limits: Any) -> RewardHackingMonitor:
    """One whose baseline is known."""
    watching = RewardHackingMonitor(HackingLimits(**{"baseline": 4, "patience": 2, **limits}))
    for _ in range(4):
        assert watching.observe(**QUIET) == Verdict()
    return watching


@pytest.mark.parametrize(("name", "high"), [("std", 2.1), ("length", 201.0)])
def test_a_sign_that_lasts_while_the_reward_rises_stops(name: str, high: float) -> None:
    watching = monitor()
    rising = {**QUIET, "reward": 1.0, name: high}
    first, second = watching.observe(**rising), watching.observe(**rising)
    assert not first.stop and second.stop
    assert first.signs == (f"{name} {high:.4g} is above {2 * QUIET[name]:.4g} (at first {QUIET[name]:.4g})",)


@pytest.mark.parametrize("name", ["std", "length"])
def test_a_sign_without_a_rising_reward_is_none(name: str) -> None:
    watching = monitor()
    for _ in range(9):
        assert watching.observe(**{**QUIET, "reward": -1.0, name: 1e6}) == Verdict()


def test_a_streak_that_breaks_starts_anew() -> None:
    watching = monitor()
    high = {**QUIET, "reward": 1.0, "std": 9.0}
    for _ in range(5):
        assert not watching.observe(**high).stop
        assert not watching.observe(**{**QUIET, "reward": 1.0}).stop


def test_kl_is_absolute_and_needs_no_baseline() -> None:
    watching = RewardHackingMonitor(HackingLimits(kl=5.0, patience=1))
    assert not watching.observe(kl=5.0).stop and watching.observe(kl=5.1).stop
    assert RewardHackingMonitor(HackingLimits(patience=1)).observe(kl=1e9) == Verdict()


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_what_was_not_measured_neither_adds_nor_ends(missing: float | None) -> None:
    watching = monitor()
    high = {**QUIET, "reward": 1.0, "std": 9.0}
    assert not watching.observe(**high).stop
    assert not watching.observe(**{**high, "std": missing}).stop
    assert watching.observe(**high).stop


def test_an_ensemble_that_agrees_at_first_has_no_scale() -> None:
    watching = RewardHackingMonitor(HackingLimits(baseline=1, patience=1))
    watching.observe(reward=0.0, std=0.0)
    assert watching.observe(reward=1.0, std=1e-9) == Verdict()


def test_a_sign_that_is_left_out_never_stops() -> None:
    watching = monitor(std=None, length=None)
    for _ in range(9):
        assert watching.observe(reward=9.0, std=1e6, length=1e6, kl=1e6) == Verdict()


@pytest.mark.parametrize("wrong", [{"kl": 0.0}, {"std": -1.0}, {"length": math.nan}, {"baseline": 0}, {"patience": 0}])
def test_limits_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigurationError):
        HackingLimits(**wrong)


def test_the_callback_reads_the_trainers_log_and_ends_it() -> None:
    callback = HackingCallback(monitor(), name="helpful")
    control = SimpleNamespace(should_training_stop=False)
    callback.on_train_begin(None, None, control, model=None)  # every event of a trainer is heard, most are nothing
    for step in range(2):
        assert control.should_training_stop is False
        logs = {"reward": 1.0, "helpful/std": 9.0, "completions/mean_length": 100.0, "kl": 0.1}
        callback.on_log(None, SimpleNamespace(global_step=step), control, logs=logs, model=None)
        callback.on_log(None, None, control, logs={"train_runtime": 1.0})
    assert control.should_training_stop is True and callback.verdict.signs
    with pytest.raises(AttributeError):
        _ = callback.should_log
