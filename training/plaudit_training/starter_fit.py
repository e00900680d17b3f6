"""Fit the starter reward model from scratch: `plaudit train starter`.

About three million parameters on synthetic preferences whose better response is known by computation. It is a
model to try the product with, and says so: its label is "synthetic".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from . import config_toml
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
    in `<directory>-run`. The weights are a function of the seed. With `if_missing`, a valid model is left alone.

    Raises what `train_run` raises.
    """
    from plaudit_model import starter

    from .prepare import SCRATCH
    from .run import discard, settle, train_run

    directory = directory or starter.directory()
    if if_missing and _is_valid(directory):
        console.print(f"the starter model is in {directory}", soft_wrap=True)
        return
    out = directory.with_name(f"{directory.name}-run")
    if not resume:
        discard(out)
    config = config_toml.override(RunConfig(), {**SETTINGS, "model.base": SCRATCH, **changes})
    console.print(f"fitting the starter model into {directory}: about two minutes", soft_wrap=True)
    train_run(settle(config, out, resume=resume), out, console, model=directory, dry_run=dry_run)


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
