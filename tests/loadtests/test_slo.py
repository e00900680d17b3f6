"""Profiles are read strictly, and a missed objective is never overlooked."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from slo import Measured, ProfileError, Slo, read_profile, violations

LOADTESTS = Path(__file__).resolve().parents[2] / "loadtests"
GOOD = Measured("storm", requests=100, failures=0, wrong=0, items=100, p20_ms=5, p50_ms=8, p80_ms=12, p99_ms=40)
SLO = Slo(items_per_second=5.0, error_rate=0.01, p99_ms={"storm": 50})


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((LOADTESTS / "profiles").glob("*.toml")), ids=lambda path: path.stem)
def test_the_profiles_that_come_along_can_be_read(path: Path) -> None:
    profile = read_profile(path)
    assert profile.name == path.stem
    assert profile.traffic.tolerance == 0.0


def test_a_profile_has_defaults_for_all_but_the_rate(tmp_path: Path) -> None:
    profile = read_profile(write(tmp_path, "[slo]\nitems_per_second = 3.0\n[batch]\nitems = 4096\n"))
    assert profile.items_per_request("storm") == 1
    assert profile.items_per_request("batch") == 4096
    assert profile.items_per_request("best_of_n") == profile.best_of_n.responses


@pytest.mark.parametrize(("text", "reason"), [
    ("[slo]\nitems_per_second = 1.0\nwrong = 3\n", "unknown key 'wrong'"),
    ("[slo]\nitems_per_second = 1.0\n[storms]\n", r"unknown section \[storms\]"),
    ("[slo]\nitems_per_second = 1.0\np99_ms = { burst = 3 }\n", "no shape 'burst'"),
    ("[storm]\nsamples = 2\n", "items_per_second"),
    ("[slo]\nitems_per_second = 1.0\n[traffic]\nrepeat_share = 2\n", "repeat_share"),
    ("[slo\n", "mine.toml"),
])  # fmt: skip
def test_a_profile_with_a_mistake_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ProfileError, match=reason):
        read_profile(write(tmp_path, text))


def test_a_profile_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="none.toml"):
        read_profile(tmp_path / "none.toml")


def test_a_run_within_its_objectives_passes() -> None:
    assert violations(SLO, [GOOD], seconds=10.0) == []


@pytest.mark.parametrize(("change", "seconds", "reason"), [
    ({"wrong": 1, "failures": 1}, 10.0, "storm: 1 wrong answers"),
    ({"failures": 2}, 10.0, "error rate 0.0200 above 0.0100"),
    ({}, 40.0, "2.5 items/s below 5.0"),
    ({"p99_ms": 51.0}, 10.0, "storm: p99 51 ms above 50 ms"),
])  # fmt: skip
def test_each_objective_can_be_missed(change: dict[str, float], seconds: float, reason: str) -> None:
    assert violations(SLO, [dataclasses.replace(GOOD, **change)], seconds) == [reason]  # type: ignore[arg-type]


def test_the_rate_is_that_of_all_shapes_together() -> None:
    batch = dataclasses.replace(GOOD, shape="batch", requests=1, items=300)
    assert violations(Slo(items_per_second=40.0), [GOOD, batch], seconds=10.0) == []


@pytest.mark.parametrize("requests", [0, 3])
def test_a_shape_that_got_no_answer_misses_its_objective(requests: int) -> None:
    silent = dataclasses.replace(GOOD, shape="batch", requests=requests, failures=requests, items=0, p99_ms=0.0)
    missed = violations(Slo(5.0, error_rate=1.0, p99_ms={"batch": 50.0}), [GOOD, silent], seconds=10.0)
    assert missed == ["batch: no answer, so no p99 to hold against 50 ms"]
    assert violations(Slo(5.0, error_rate=1.0, p99_ms={"storm": 50.0}), [GOOD, silent], seconds=10.0) == []


@pytest.mark.parametrize(("measured", "seconds"), [
    ([], 10.0), ([dataclasses.replace(GOOD, requests=0)], 10.0), ([GOOD], 0.0),
])  # fmt: skip
def test_a_run_that_measured_nothing_fails(measured: list[Measured], seconds: float) -> None:
    assert violations(Slo(0.0), measured, seconds) == ["nothing was measured"]


def run_locust(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "locust", *options]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        command, cwd=LOADTESTS, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_locust_finds_the_three_shapes() -> None:
    done = run_locust("--list")
    assert done.returncode == 0, done.stderr
    assert {"StormUser", "BatchUser", "BestOfNUser"} <= set(done.stdout.split())


def test_an_unusable_profile_stops_locust_before_the_load() -> None:
    done = run_locust("--headless", "--host", "http://127.0.0.1:9", "--load", "profiles/none.toml", "--run-time", "1s")
    assert done.returncode == 78
    assert "error: profiles/none.toml" in done.stderr
