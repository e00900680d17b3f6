"""`plaudit data`: look at preference files before training on them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from plaudit._options import takes

from .read_options import READ, ReadOptions, read_options

if TYPE_CHECKING:
    from plaudit_model.records import Comparison, Record

    from .read_report import ReadReport
    from .summary import Summary

app = typer.Typer(no_args_is_help=True)

_console = Console()
_EXAMPLE_CHARACTERS = 160

Paths = Annotated[list[str], typer.Argument(
    help="Files (.jsonl, .json, .csv, .tsv, each also .gz), or the word `starter`.", show_default=False)]  # fmt: skip
QuarantineOption = Annotated[Path, typer.Option(help="Where bad rows are listed, if there are any.")]
QuarantineTextOption = Annotated[bool, typer.Option(
    "--quarantine-text", help="List the text of bad rows too, not only place, reason and hash.")]  # fmt: skip


@app.callback()
def data() -> None:
    """Look at preference data before training on it."""


@app.command()
@takes(ReadOptions, READ)
def inspect(
    paths: Paths,
    quarantine: QuarantineOption = Path("quarantine.jsonl"),
    quarantine_text: QuarantineTextOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    **given: Any,
) -> None:
    """Read files as training would and say what became of every row. Exit code 65 if too many rows are bad, or all."""
    from .errors import BadRows, DataError
    from .sources import ReadReport, nothing_used, read
    from .summary import Summary

    options = read_options(quarantine=quarantine, quarantine_text=quarantine_text, **given)
    report, summary = ReadReport(), Summary()
    failure: DataError | None = None
    try:
        for record in read(paths, options, report):
            summary.add(record)
    except BadRows as error:
        failure = error
    if not summary.records:
        failure = failure or nothing_used(report)
    _show(report, summary, as_json)
    if failure:
        raise failure


def _show(report: ReadReport, summary: Summary, as_json: bool) -> None:
    if as_json:
        first = asdict(summary.first) if summary.first else None
        typer.echo(json.dumps({**report.to_json(), "summary": summary.to_json(), "first": first}))
        return
    for file in report.files:
        how = "by its columns" if file.detected else "as named"
        told = f"format {file.format} ({how})" if file.format else "no row to tell the format by"
        _console.print(Text(f"{file.file}: {told}, {file.rows:,} rows"))
    _console.print(Text(report.conservation(), style="bold"))
    for sentence in (*report.sentences(), *summary.sentences()):
        _console.print(Text(f"- {sentence}"))
    if summary.first:
        _show_record(summary.first)


def _show_record(record: Record) -> None:
    """How the first row was understood."""
    from rich.table import Table

    title = Text(f"first record: {record.id}", style="table.title")
    table = Table(title=title, show_header=False, title_justify="left")
    for message in record.prompt:
        table.add_row(f"prompt ({message.role})", Text(_shortened(message.content)))
    for index, response in enumerate(record.responses):
        table.add_row(f"response {index}", Text(_shortened(response)))
    for comparison in record.comparisons:
        table.add_row("label", Text(_label(comparison)))
    _console.print(table)


def _label(comparison: Comparison) -> str:
    first, second = comparison.first, comparison.second
    better = {"first": f"response {first} is better", "second": f"response {second} is better", "tie": "a tie"}
    said = [f"{first} against {second}: {better[comparison.outcome]}"]
    if votes := comparison.votes:
        said.append(f"votes {votes.first} to {votes.second}, {votes.tie} for a tie")
    if comparison.margin is not None:
        said.append(f"margin {comparison.margin:g}")
    return "; ".join(said)


def _shortened(text: str) -> str:
    return text if len(text) <= _EXAMPLE_CHARACTERS else f"{text[:_EXAMPLE_CHARACTERS]}... ({len(text):,} characters)"
