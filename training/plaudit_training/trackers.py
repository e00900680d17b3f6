"""The trackers of a training run: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plaudit.errors import ConfigurationError
from plaudit_model.progress import Tracker, Trackers
from plaudit_model.run_folder import FILE_NAME

LOG = logging.getLogger("plaudit.training")


def check(names: Sequence[str]) -> None:
    """Raise ConfigurationError for a tracker that is not installed; tensorboard, the default, is left out then."""
    for name in names:
        if name != "tensorboard" and not _installed(name):
            raise ConfigurationError(f"report_to names {name}, which is not installed: pip install {name}")


def make(names: Sequence[str], out: Path, config: Mapping[str, Any], step: int) -> Trackers:
    """The trackers of `report_to`, for a run that stands at `step`. One that is not installed or does not start is
    named in a warning and left out."""
    begin = {"tensorboard": lambda: _tensorboard(out, step), "wandb": lambda: _wandb(out, config),
             "mlflow": lambda: _mlflow(out, config)}  # fmt: skip
    for name in names:
        if not _installed(name):
            LOG.warning("report_to names %s, which is not installed and is left out: pip install %s", name, name)
    return Trackers(filter(_installed, names), lambda name: begin[name]())


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _tensorboard(out: Path, step: int) -> Tracker:
    """Event files under `<out>/tensorboard`; what an interrupted run wrote past `step` is marked as void."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
    return lambda step, values: [writer.add_scalar(name, value, step) for name, value in values.items()], writer.close


def _wandb(out: Path, config: Mapping[str, Any]) -> Tracker:
    """A run of Weights & Biases; resumed, it is the same one."""
    import wandb

    begun = (out / FILE_NAME).stat().st_mtime_ns  # tells it from another run of that name, elsewhere or before
    about = {"project": "plaudit", "name": out.name, "id": f"{out.name}-{begun:x}", "resume": "allow"}
    run: Any = wandb.init(**about, config=dict(config))
    return lambda step, values: run.log(dict(values), step=step), run.finish


def _mlflow(out: Path, config: Mapping[str, Any]) -> Tracker:
    import mlflow

    mlflow.start_run(run_name=out.name)
    mlflow.log_params(dict(config))
    return lambda step, values: mlflow.log_metrics(dict(values), step=step), mlflow.end_run
