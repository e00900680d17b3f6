"""What a run says: a progress line for people, trackers through accelerate."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from rich.console import Console

from plaudit import ConfigurationError
from plaudit_model.progress import ProgressLine

LOG = logging.getLogger("plaudit.loops")

_SHOWN = ("loss", "objective/scores", "objective/kl", "objective/entropy", "val/length", "accuracy")


class Trackers:
    """TensorBoard, Weights & Biases, MLflow and what else accelerate knows. None of them can stop a run: one that fails
    is named in a warning and left out from then on."""

    def __init__(self, names: Sequence[str], out: Path, config: Mapping[str, Any], step: int) -> None:
        self._members: list[Any] = []
        for name in names:
            try:
                options: dict[str, Any] = {"purge_step": step + 1} if name == "tensorboard" else {}
                if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory:
                    options["logging_dir"] = str(out)
                tracker = LOGGER_TYPE_TO_CLASS[name](name if "logging_dir" in options else out.name, **options)
                tracker.start()
                if name != "tensorboard":  # which would make a run of its own for them
                    tracker.store_init_configuration({k: str(v) for k, v in config.items()})
                self._members.append(tracker)
            except Exception as error:  # a tracker must not cost a training run
                LOG.warning("%s could not be started and is left out: %s", name, error)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for member in list(self._members):
            try:
                member.log(dict(values), step=step)
            except Exception as error:
                LOG.warning("%s failed and is left out from here: %s", member.name, error)
                self._members.remove(member)

    def close(self) -> None:
        for member in self._members:
            try:
                member.finish()
            except Exception as error:
                LOG.warning("%s did not close: %s", member.name, error)


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigurationError for a tracker that does not exist or, but for the default one, is not installed."""
    there = {tracker.value for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigurationError(
                f"report_to: unknown tracker {name!r}; known: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )
        if name not in there and name != "tensorboard":
            raise ConfigurationError(f"report_to names {name}, which is not installed: pip install {name}")


class Display(ProgressLine):
    """The numbers that matter, step by step."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of a step that is done."""
        self.show(step, "  ".join(f"{n.rpartition('/')[2]} {values[n]:.3f}" for n in _SHOWN if n in values))


class Lasting(Console):
    """A console that may go before the run does: a log on a full disk, or a reader that has left (of which rich makes a
    SystemExit), is nothing to end a run for."""

    def print(self, *what: Any, **how: Any) -> None:
        """Print it, or not."""
        with suppress(OSError, SystemExit):
            super().print(*what, **how)
