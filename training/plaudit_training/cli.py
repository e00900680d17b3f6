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

from . import config_toml
from .config import ConfigError, RunConfig, get, help_of

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


def field(flag: str, path: str) -> Any:
    """A command-line option for the field at a dotted path, explained by the field's own sentence."""
    default = get(RunConfig(), path)
    shown = ", ".join(default) if isinstance(default, tuple) else default
    stated = "" if shown in (None, "") else f" [default: {shown}]"
    return typer.Option(flag, help=help_of(path) + stated, show_default=False)


def train(
    data: Annotated[list[str] | None, typer.Argument(help=help_of("data.train"), show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="where to write the run; default runs/<data>-<time>")] = None,
    base: Annotated[str | None, field("--base", "model.base")] = None,
    eval_data: Annotated[list[str] | None, field("--eval", "data.eval")] = None,
    eval_share: Annotated[float | None, field("--eval-share", "data.eval_share")] = None,
    config: Annotated[Path | None, typer.Option(help="a run.toml; options beside it come on top")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out, if there is one")] = False,
    seed: Annotated[int | None, field("--seed", "seed")] = None,
    epochs: Annotated[int | None, field("--epochs", "optim.num_train_epochs")] = None,
    lr: Annotated[float | None, field("--lr", "optim.learning_rate")] = None,
    head_lr: Annotated[float | None, field("--head-lr", "optim.head_learning_rate")] = None,
    batch_pairs: Annotated[int | None, field("--batch-pairs", "optim.batch_pairs")] = None,
    token_budget: Annotated[int | None, field("--token-budget", "optim.token_budget")] = None,
    gradient_checkpointing: Annotated[
        bool | None, field("--gradient-checkpointing", "optim.gradient_checkpointing")
    ] = None,
    max_length: Annotated[int | None, field("--max-length", "model.max_length")] = None,
    dtype: Annotated[str | None, field("--dtype", "model.dtype")] = None,
    device: Annotated[str | None, field("--device", "model.device")] = None,
    lora_r: Annotated[int | None, field("--lora-r", "lora.r")] = None,
    lora_alpha: Annotated[int | None, field("--lora-alpha", "lora.alpha")] = None,
    lora_dropout: Annotated[float | None, field("--lora-dropout", "lora.dropout")] = None,
    lora_target_modules: Annotated[list[str] | None, field("--lora-target-modules", "lora.target_modules")] = None,
    use_rslora: Annotated[bool | None, field("--use-rslora", "lora.use_rslora")] = None,
    lora_save: Annotated[str | None, field("--lora-save", "lora.save")] = None,
    eval_every: Annotated[int | None, field("--eval-every", "evaluation.every")] = None,
    patience: Annotated[int | None, field("--patience", "evaluation.patience")] = None,
    report_to: Annotated[list[str] | None, field("--report-to", "report_to")] = None,
    allow: Annotated[list[str] | None, field("--allow", "data.allow")] = None,
    format: Annotated[str | None, field("--format", "data.format")] = None,
    columns: Annotated[str | None, typer.Option(help="ours=theirs,...; " + help_of("data.columns"))] = None,
    labels: Annotated[str | None, typer.Option(help="theirs=ours,...; " + help_of("data.labels"))] = None,
    strict_ids: Annotated[str | None, field("--strict-ids", "data.strict_ids")] = None,
    eval_strict_ids: Annotated[str | None, field("--eval-strict-ids", "data.eval_strict_ids")] = None,
    ties: Annotated[str | None, field("--ties", "data.ties")] = None,
    max_bad_rows: Annotated[int | None, field("--max-bad-rows", "data.max_bad_rows")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="any other key of run.toml: KEY=VALUE")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="read, check and show; train nothing")] = False,
    if_missing: Annotated[bool, typer.Option("--if-missing", help="with `starter`: only if it is not there")] = False,
) -> None:
    """Fit a reward model to preference data.

    `plaudit train pairs.jsonl` is a whole run: the bundled starter model as base, Bradley-Terry with centring,
    one epoch of AdamW, 5% of the conversations held out for the evaluation at the end. `plaudit train starter`
    fits the starter model itself, from scratch. `--lora-r 16` trains adapters and the head, and leaves the base as
    it is: `plaudit train pairs.jsonl --base Qwen/Qwen3-8B --lora-r 16 --lora-save adapter`. How a run went is drawn in
    `report.html` in --out: loss, accuracy, calibration, margins, length bias.
    """
    changes = _changes(locals()) | _settings(settings or [])
    is_starter = data == [STARTER] and base is None and config is None
    if if_missing and not is_starter:
        raise ConfigError("--if-missing is for `plaudit train starter` alone")
    if is_starter:
        from . import starter_fit

        starter_fit.fit(out, changes, _console(), if_missing=if_missing, resume=resume, dry_run=dry_run)
        return
    _train(config, out, changes, resume=resume, dry_run=dry_run)


def evaluate(
    model: Annotated[str, typer.Argument(help="directory or Hub id of a reward model, or `starter`")],
    data: Annotated[list[str], typer.Argument(help="preference files to evaluate on")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout, nothing else there")] = False,
    cluster: Annotated[str, typer.Option(help=help_of("evaluation.cluster"))] = "conversation",
    bootstrap: Annotated[int, typer.Option(help=help_of("evaluation.bootstrap"), min=0)] = 1000,
    seed: Annotated[int, typer.Option(help="of the resampling")] = 0,
    token_budget: Annotated[int, typer.Option(help=help_of("optim.token_budget"), min=1)] = 8192,
    device: Annotated[str, typer.Option(help=help_of("model.device"))] = "auto",
    format: Annotated[str, typer.Option(help=help_of("data.format"))] = "auto",
    columns: Annotated[str, typer.Option(help="ours=theirs,...; " + help_of("data.columns"))] = "",
    labels: Annotated[str, typer.Option(help="theirs=ours,...; " + help_of("data.labels"))] = "",
    strict_ids: Annotated[Path | None, typer.Option(help="file of ids, one a line: only rows with these")] = None,
    ties: Annotated[str, typer.Option(help=help_of("data.ties"))] = "half",
    max_bad_rows: Annotated[int, typer.Option(help=help_of("data.max_bad_rows"), min=0)] = 0,
    quarantine: Annotated[Path | None, typer.Option(help="file that lists bad rows")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with charts, too")] = None,
) -> None:
    """Evaluate a reward model on preference data: accuracy, calibration, length bias, with 95% intervals."""
    if cluster not in ("conversation", "response"):
        raise ConfigError(f"--cluster: expected conversation or response, got {cluster!r}")
    from plaudit._row_files import whole_file
    from plaudit.cli_score import refuse_same

    from .page import of_quality
    from .quality import measure, print_quality
    from .read_options import read_options

    options = read_options(
        format=format,
        columns=columns,
        labels=labels,
        strict_ids=strict_ids,
        ties=ties,
        max_bad_rows=max_bad_rows,
        quarantine=quarantine,
    )
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
    from . import starter_fit
    from .errors import OptionError
    from .run import settle, train_run

    if resume and out is None:
        raise OptionError("--resume needs --out, the directory of the run to go on with")
    source = out / config_toml.FILE_NAME if out and resume and not file else file
    stored = config_toml.read(source) if source and (file or source.exists()) else RunConfig()
    config = config_toml.override(stored, changes)
    out = out or _default_out(config.data.train)
    config = settle(config, out, resume=resume)
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
    from .read_options import parse_map

    changes = {path: given[name] for name, path in FIELDS.items() if given[name] is not None}
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
            raise ConfigError(f"--set is written KEY=VALUE, got {assignment!r}")
        try:
            changes[path.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            changes[path.strip()] = text
    return changes
