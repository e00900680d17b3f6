"""What a run says: a progress line for people, trackers through accelerate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from plaudit import ConfigurationError
from plaudit_model.progress import ProgressLine, Tracker, Trackers

_SHOWN = ("loss", "objective/scores", "objective/kl", "objective/entropy", "val/length", "accuracy")


def trackers(names: Sequence[str], out: Path, config: Mapping[str, Any], step: int) -> Trackers:
    """TensorBoard, Weights & Biases, MLflow and what else accelerate knows, for a run that stands at `step`."""

    def begin(name: str) -> Tracker:
        options: dict[str, Any] = {"purge_step": step + 1} if name == "tensorboard" else {}
        if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory:
            options["logging_dir"] = str(out)
        tracker: Any = LOGGER_TYPE_TO_CLASS[name](name if "logging_dir" in options else out.name, **options)
        tracker.start()
        if name != "tensorboard":  # which would make a run of its own for them
            tracker.store_init_configuration({k: str(v) for k, v in config.items()})
        return lambda step, values: tracker.log(dict(values), step=step), tracker.finish

    return Trackers(names, begin)


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
