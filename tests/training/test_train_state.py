"""The small parts of a run: generators, signals, logs, trackers."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from plaudit.errors import ConfigurationError
from plaudit_model.interrupt import Interrupted, StopRequest
from plaudit_model.json_lines import JsonLines
from plaudit_training import trackers
from plaudit_training.state import generators, restore_generators


def draw() -> list[float]:
    return [torch.rand(1).item(), torch.randn(1).item()]


def test_generators_go_on_where_they_were() -> None:
    states = generators()
    first = draw()
    assert draw() != first
    restore_generators(states)
    assert draw() == first


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_shell_and_the_kernel_may_both_say_that_the_terminal_is_closed(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=number.name):
            stop.check()
        assert signal.getsignal(signal.SIGTERM) != stop._note, "somebody who insists is heard"
    signal.signal(number, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        stop.check()
    assert signal.signal(number, before) == signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=number.name):
            stop.check()
        assert signal.getsignal(number) == before, "a second signal acts as it always did"
    assert signal.getsignal(number) == before
    assert Interrupted.exit_code == 75


def test_without_anything_to_save_a_signal_strikes_at_once() -> None:
    with StopRequest() as stop:
        stop.patient = False
        with pytest.raises(Interrupted, match="outside the training loop"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_log_is_cut_where_the_checkpoint_says(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, 0)
    log.write({"step": 1})
    kept = log.position()
    log.write({"step": 2})
    log.close()
    log = JsonLines(path, kept)
    log.write({"step": 20})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 20]


def test_a_log_that_lost_lines_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    JsonLines(tmp_path / "metrics.jsonl", 100).close()
    assert "shorter than the checkpoint says" in caplog.text


def test_a_disk_that_is_full_costs_lines_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, 0)
    log.write({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        log.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "lacks a line" in caplog.text
    log.write({"step": 3})
    assert log.position() == path.stat().st_size
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


def test_a_tracker_that_is_not_installed_is_an_error_and_tensorboard_is_not() -> None:
    trackers.check(("tensorboard",))
    with pytest.raises(ConfigurationError, match="pip install mlflow"):
        trackers.check(("tensorboard", "mlflow"))


class Recorder(types.ModuleType):
    """Stands for wandb or mlflow, which are not dependencies: it notes what is called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        self.calls: list[str] = []
        self.options: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Recorder:
            self.calls.append(name)
            self.options.append(kwargs)
            return self

        return call


@pytest.mark.parametrize(
    ("name", "calls"),
    [("wandb", ["init", "log", "finish"]), ("mlflow", ["start_run", "log_params", "log_metrics", "end_run"])],
)
def test_trackers_are_told_the_configuration_and_the_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, calls: list[str]
) -> None:
    recorder = Recorder(name)
    monkeypatch.setitem(sys.modules, name, recorder)
    (tmp_path / "run.toml").touch()
    told = trackers.make((name,), tmp_path, {"seed": 0}, 0)
    told.log(1, {"train/loss": 0.5})
    told.close()
    assert recorder.calls == calls


def test_a_resumed_run_is_the_same_to_wandb_and_another_of_its_name_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recorder = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    runs = [tmp_path / place / "first" for place in "ab"]
    for number, out in enumerate(runs):
        out.mkdir(parents=True)
        (out / "run.toml").touch()
        os.utime(out / "run.toml", (number, number))
    for out in (*runs, runs[0]):
        trackers.make(("wandb",), out, {}, 0)
    one, other, again = (options["id"] for options in recorder.options)
    assert one == again != other and one.startswith("first-")
