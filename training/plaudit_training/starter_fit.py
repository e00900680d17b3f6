"""Fit the starter reward model from scratch: `plaudit train starter`.

About three million parameters on synthetic preferences whose better response is known by computation. It is a
model to try the product with, and says so: its label is "synthetic".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from plaudit._trees import changed

from .config import RunConfig

# About 400,000 training tokens: two minutes on two CPU cores. A model this small from random weights wants a
# rate three orders above that of a tuned one, and small steps to have enough of them.
SETTINGS: dict[str, Any] = {
    "data.train": ["starter"],
    "data.starter_records": 2900,
    "optim.learning_rate": 1e-3,
    "optim.batch_pairs": 32,
    "optim.token_budget": 4096,
    "label": "synthetic",
}


def fit(
    directory: Path | None,
    changes: Mapping[str, Any],
    console: Console,
    *,
    if_missing: bool = False,
    resume: bool = False,
    dry_run: bool = False,
) -> None:
    """Fit the model into `directory`, by default where `starter` is looked for. The run itself is kept beside it,
    in `<directory>-run`; without `resume` an earlier one is deleted. The weights are a function of the seed. With
    `if_missing`, a valid model is left alone. A `dry_run` deletes and writes nothing.

    Raises what `train_run` raises.
    """
    from plaudit_model import contract, starter
    from plaudit_model.run_folder import RunExists, settle

    from .prepare import SCRATCH
    from .run import OUTPUTS, train_run

    directory = (directory or starter.directory()).resolve()
    if if_missing and _is_valid(directory):
        console.print(f"the starter model is in {directory}", soft_wrap=True)
        return
    out = directory.with_name(f"{directory.name}-run")
    config = changed(RunConfig(), {**SETTINGS, "model.base": SCRATCH, **changes})
    if resume:
        config = settle(config, out, resume=True, outputs=OUTPUTS)
    if (directory / contract.FILE_NAME).exists() and not _is_starter(directory):
        raise RunExists(f"{directory} holds another model than a starter, which would be replaced: name another --out")
    doing = "would be fitted" if dry_run else "is fitted"
    console.print(f"the starter model {doing} into {directory}: about two minutes", soft_wrap=True)
    train_run(config, out, console, model=directory, dry_run=dry_run, fresh=not resume)


def as_base(config: RunConfig, console: Console, *, dry_run: bool) -> RunConfig:
    """The configuration of a run on top of the starter model, which is fitted if it is missing. A dry run says
    that it would be, and looks with an untrained one of the same shape. Raises what `train_run` raises."""
    from plaudit_model import starter

    from .prepare import SCRATCH, check_inputs

    directory = starter.directory()
    if not _is_valid(directory):
        check_inputs(config)
        if dry_run:
            what = f"the starter model would first be fitted into {directory}, about two minutes"
            console.print(f"{what}; an untrained one stands in for it here", soft_wrap=True)
            return changed(config, {"model.base": SCRATCH})
    fit(directory, {}, console, if_missing=True)
    console.print("\nyour own run, which starts from it", style="bold")
    return config


def _is_starter(directory: Path) -> bool:
    """Whether the model there, be it damaged, says that it was made from the starter's shape alone."""
    from plaudit_model import contract
    from plaudit_model.errors import ModelError

    from .prepare import SCRATCH

    try:
        return bool(contract.read(directory).lineage.get("base", {}).get("name") == SCRATCH)
    except ModelError:
        return False


def _is_valid(directory: Path) -> bool:
    """Whether a complete reward model is there, every file as its contract says."""
    from plaudit_model import contract, store
    from plaudit_model.errors import ModelError

    try:
        store.check_files(directory, contract.read(directory))
        store.check_weights(directory)
    except (ModelError, OSError):
        return False
    return True
