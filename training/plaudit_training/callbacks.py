"""Where the numbers of a run go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

A callback is anything with `log` and `close`. None of them can stop a run: one that fails is named in a
warning and left out from then on.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from plaudit.errors import ConfigurationError
from plaudit_model.run_folder import FILE_NAME

LOG = logging.getLogger("plaudit.training")


class Callback(Protocol):
    """Receives the numbers of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name, after optimiser step `step`."""

    def close(self) -> None:
        """No more numbers will come."""


class TensorBoard:
    """Event files under `<out>/tensorboard`; what an interrupted run wrote past `step` is marked as void."""

    def __init__(self, out: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run named after the output directory; resuming goes on in the same run."""

    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        import wandb

        begun = (out / FILE_NAME).stat().st_mtime_ns  # tells it from another run of that name, elsewhere or before
        identity = f"{out.name}-{begun:x}"
        self._run: Any = wandb.init(project="plaudit", name=out.name, id=identity, resume="allow", config=dict(config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """An MLflow run named after the output directory."""

    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.start_run(run_name=out.name)
        mlflow.log_params(dict(config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class Callbacks:
    """Several callbacks as one that does not raise."""

    def __init__(self, members: Sequence[Callback]) -> None:
        self._members = list(members)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for member in list(self._members):
            try:
                member.log(step, values)
            except Exception as error:  # a tracker must not cost a training run
                LOG.warning("%s failed and is left out from here: %s", type(member).__name__, error)
                self._members.remove(member)

    def close(self) -> None:
        for member in self._members:
            try:
                member.close()
            except Exception as error:
                LOG.warning("%s did not close: %s", type(member).__name__, error)


def check(names: Sequence[str]) -> None:
    """Raise ConfigurationError for a tracker that is not installed; tensorboard, the default, is left out then."""
    for name in names:
        if name != "tensorboard" and not _installed(name):
            raise ConfigurationError(f"report_to names {name}, which is not installed: pip install {name}")


def make(names: Sequence[str], out: Path, config: Mapping[str, Any], step: int) -> Callbacks:
    """The callbacks of `report_to`, for a run that stands at `step`. One that is not installed or does not start is
    named in a warning and left out."""
    return Callbacks(list(_started(names, out, config, step)))


def _started(names: Sequence[str], out: Path, config: Mapping[str, Any], step: int) -> Iterator[Callback]:
    for name in names:
        if not _installed(name):
            LOG.warning("report_to names %s, which is not installed and is left out: pip install %s", name, name)
            continue
        try:
            yield _make(name, out, config, step)
        except Exception as error:  # a tracker must not cost a training run
            LOG.warning("%s could not be started and is left out: %s", name, error)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _make(name: str, out: Path, config: Mapping[str, Any], step: int) -> Callback:
    if name == "tensorboard":
        return TensorBoard(out, step)
    return WandB(out, config) if name == "wandb" else MLflow(out, config)
