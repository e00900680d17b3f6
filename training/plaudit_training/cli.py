"""`plaudit train` and `plaudit eval`. Light to import: everything heavy is inside."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from plaudit import _trees as trees
from plaudit._options import takes
from plaudit.errors import ConfigurationError

from .config import HELP, RunConfig
from .read_options import READ, ReadOptions, parse_map, read_options

STARTER = "starter"

# The parameters of `train` that are fields of the configuration.
FIELDS = {
    "data": "data.train", "base": "model.base", "eval_data": "data.eval", "eval_share": "data.eval_share",
    "seed": "seed", "epochs": "optim.num_train_epochs", "lr": "optim.learning_rate",
    "head_lr": "optim.head_learning_rate", "batch_pairs": "optim.batch_pairs", "token_budget": "optim.token_budget",
    "gradient_checkpointing": "optim.gradient_checkpointing",
    "max_length": "model.max_length", "dtype": "model.dtype", "device": "model.device",
    "lora_r": "lora.r", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules", "use_rslora": "lora.use_rslora", "lora_save": "lora.save",
    "eval_every": "evaluation.every", "patience": "evaluation.patience", "report_to": "report_to",
    "allow": "data.allow", "format": "data.format", "columns": "data.columns", "labels": "data.labels",
    "strict_ids": "data.strict_ids", "eval_strict_ids": "data.eval_strict_ids", "ties": "data.ties",
    "max_bad_rows": "data.max_bad_rows",
}  # fmt: skip
# Options that are not named after their parameter, or have no opposite.
FLAGS = {
    "eval_data": "--eval", "gradient_checkpointing": "--gradient-checkpointing", "use_rslora": "--use-rslora",
}  # fmt: skip


@takes(RunConfig, FIELDS, argument="data", flags=FLAGS)
def train(
    out: Annotated[Path | None, typer.Option(help="where to write the run; default runs/<data>-<time>")] = None,
    config: Annotated[Path | None, typer.Option(help="a run.toml; options beside it come on top")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out, if there is one")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="any other key of run.toml: KEY=VALUE")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="read, check and show; train nothing")] = False,
    if_missing: Annotated[bool, typer.Option("--if-missing", help="with `starter`: only if it is not there")] = False,
    **given: Any,
) -> None:
    """Fit a reward model to preference data.

    `plaudit train pairs.jsonl` is a whole run: the bundled starter model as base, Bradley-Terry with centring,
    one epoch of AdamW, 5% of the conversations held out for the evaluation at the end. `plaudit train starter`
    fits the starter model itself, from scratch. `--lora-r 16` trains adapters and the head, and leaves the base as
    it is: `plaudit train pairs.jsonl --base Qwen/Qwen3-8B --lora-r 16 --lora-save adapter`. How a run went is drawn in
    `report.html` in --out: loss, accuracy, calibration, margins, length bias.
    """
    from plaudit_model.progress import outlive_log

    changes = _changes(given) | _settings(settings or [])
    if not dry_run:
        outlive_log()
    is_starter = given["data"] == [STARTER] and given["base"] is None and config is None
    if if_missing and not is_starter:
        raise ConfigurationError("--if-missing is for `plaudit train starter` alone")
    if is_starter:
        from . import starter_fit

        starter_fit.fit(out, changes, _console(), if_missing=if_missing, resume=resume, dry_run=dry_run)
        return
    _train(config, out, changes, resume=resume, dry_run=dry_run)


@takes(ReadOptions, READ)
def evaluate(
    model: Annotated[str, typer.Argument(help="directory or Hub id of a reward model, or `starter`")],
    data: Annotated[list[str], typer.Argument(help="preference files to evaluate on")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout, nothing else there")] = False,
    cluster: Annotated[str, typer.Option(help=HELP["evaluation.cluster"])] = "conversation",
    bootstrap: Annotated[int, typer.Option(help=HELP["evaluation.bootstrap"], min=0)] = 1000,
    seed: Annotated[int, typer.Option(help="of the resampling")] = 0,
    token_budget: Annotated[int, typer.Option(help=HELP["optim.token_budget"], min=1)] = 8192,
    device: Annotated[str, typer.Option(help=HELP["model.device"])] = "auto",
    quarantine: Annotated[Path | None, typer.Option(help="file that lists bad rows")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with charts, too")] = None,
    **given: Any,
) -> None:
    """Evaluate a reward model on preference data: accuracy, calibration, length bias, with 95% intervals."""
    if cluster not in ("conversation", "response"):
        raise ConfigurationError(f"--cluster: expected conversation or response, got {cluster!r}")
    from plaudit._row_files import whole_file
    from plaudit.cli_score import refuse_same

    from .page import of_quality
    from .quality import measure, print_quality

    options = read_options(quarantine=quarantine, **given)
    with ExitStack() as stack:
        if html:
            for source in data:
                refuse_same(source, str(html))
            write = stack.enter_context(whole_file(html))  # before anything is scored
        quality = measure(
            model,
            data,
            options,
            _console(stderr=True),
            device=device,
            token_budget=token_budget,
            bootstrap=bootstrap,
            cluster="response" if cluster == "response" else "conversation",
            seed=seed,
        )
        if as_json:
            typer.echo(json.dumps(quality.to_json()))
        else:
            print_quality(_console(), quality)
        if html:  # last: what was found is told, whatever becomes of the page
            write(of_quality(quality, bootstrap=bootstrap, seed=seed).encode())


def _train(file: Path | None, out: Path | None, changes: Mapping[str, Any], *, resume: bool, dry_run: bool) -> None:
    from plaudit_model.run_folder import settle, stored

    from . import starter_fit
    from .run import OUTPUTS, train_run

    source = stored(out, resume=resume, file=file)
    config = trees.changed(trees.read(source, RunConfig) if source else RunConfig(), changes)
    out = out or _default_out(config.data.train)
    config = settle(config, out, resume=resume, outputs=OUTPUTS)
    if config.model.base == STARTER:
        config = starter_fit.as_base(config, _console(), dry_run=dry_run)
    train_run(config, out, _console(), dry_run=dry_run)


def _console(*, stderr: bool = False) -> Console:
    """Names of files are text: brackets in them are no markup, numbers no ornament."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def _default_out(data: Sequence[str]) -> Path:
    name = Path(data[0]).name.split(".")[0] if data else "run"
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _changes(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the configuration that the command line gives, by dotted path."""
    changes = {path: given[name] for name, path in FIELDS.items() if given[name] not in (None, [])}
    if targets := changes.get("lora.target_modules"):
        changes["lora.target_modules"] = tuple(part.strip() for text in targets for part in text.split(","))
    for name in ("columns", "labels"):
        if f"data.{name}" in changes:
            changes[f"data.{name}"] = parse_map(changes[f"data.{name}"], name)
    return changes


def _settings(assignments: Sequence[str]) -> dict[str, Any]:
    """`--set optim.adam_beta2=0.999` as changes by dotted path. The value is TOML, or else a plain word."""
    changes: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigurationError(f"--set is written KEY=VALUE, got {assignment!r}")
        try:
            changes[path.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            changes[path.strip()] = text
    return changes
