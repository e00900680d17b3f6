"""`plaudit score`, `plaudit rank` and `plaudit compare`: scores from the command line, with or without a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._settings import Overlong

if TYPE_CHECKING:
    from ._bulk import Done, Tally
    from ._jsonl import Row
    from .types import Ranking

REPORTED = 20
"""So many failed rows are named one by one; the others are counted."""

UrlOption = Annotated[
    str | None, typer.Option(help="The server. Without it: --model, if that is a directory, else PLAUDIT_URL.")
]
ModelOption = Annotated[
    str | None, typer.Option(help="With a server: the model to ask for. Without: a model directory to load here.")
]
TimeoutOption = Annotated[float, typer.Option(min=0, help="Seconds for one call, retries included; 0: no limit.")]
AttemptOption = Annotated[float, typer.Option(min=0, help="Seconds for one attempt of it; 0: automatic.")]
OverlongOption = Annotated[Overlong, typer.Option(help="What becomes of an item that is too long.")]
PromptOption = Annotated[str | None, typer.Option(help="The prompt: the text of one user message.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def wait(
    url: Annotated[str | None, typer.Option(help="The server, or several with commas; without it PLAUDIT_URL.")] = None,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds; 0: no limit.")] = 300.0,
) -> None:
    """Return when a server is ready to score. Exit code 69 if it is not in time."""
    from ._client import Client

    with Client(url) as client:
        client.wait_until_ready(timeout or None)


def score(
    source: Annotated[str, typer.Argument(metavar="IN", help="JSONL file (.gz too), or - for standard input.")],
    out: Annotated[str, typer.Option(help="JSONL file, continued if it is there; - for standard output.")] = "-",
    url: UrlOption = None,
    model: ModelOption = None,
    revision: Annotated[str | None, typer.Option(help="Accept scores of this revision only.")] = None,
    overlong: OverlongOption = "error",
    timeout: TimeoutOption = 600.0,
    attempt_timeout: AttemptOption = 0.0,
    batch: Annotated[int, typer.Option(min=1, help="Responses in one call.")] = 512,
    concurrency: Annotated[int, typer.Option(min=1, help="Calls in flight at once.")] = 4,
    prefix: Annotated[str, typer.Option(help="Put before the names of the fields that are added.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Score the rows of a JSONL file. Run it again to take up where it stopped.

    A row holds one item: prompt and response, prompt and responses, messages, text, or input_ids; its other fields
    are kept. Each row comes out with `score` and, if it has none, `error` (`scores` and `errors` for responses), in
    the order of the input. Exit code 1 if a row failed.
    """
    from ._bulk import Tally, batches, score_batches, take_up
    from ._jsonl import STANDARD, open_input, open_output, read_rows
    from ._row_files import sole_writer
    from ._scorers import open_scorer

    place = Path(out)
    continued = out != STANDARD and (place.is_file() or not place.exists())  # neither a device nor a pipe
    with open_input(source) as lines, sole_writer(place) if continued else nullcontext():
        rows = read_rows(lines, prefix)
        tally = Tally()
        if continued:
            refuse_same(source, out)
            tally, rows = take_up(place, rows, overlong=overlong, prefix=prefix)
        options: dict[str, Any] = {"timeout": timeout, "attempt_timeout": attempt_timeout, "overlong": overlong}
        with (
            open_scorer(url, model, revision=revision, concurrency=concurrency, priority="batch", **options) as scorer,
            open_output(out) as write,
            progress(tally) as advance,
        ):
            tally.admit(scorer.identity)
            for done in score_batches(batches(rows, batch), scorer, tally, overlong=overlong, prefix=prefix):
                write(done.line)
                advance(done)
    finish(tally, as_json, to_stdout=out != STANDARD)


def refuse_same(source: str, out: str) -> None:
    """Raise InvalidInput if they are one file."""
    from ._jsonl import STANDARD
    from .errors import InvalidInput

    if source != STANDARD and Path(source).exists() and Path(out).exists() and Path(source).samefile(out):
        raise InvalidInput(f"{out} is the input; choose another --out")


def rank(
    responses: Annotated[list[str] | None, typer.Argument(help="The responses to --prompt.")] = None,
    prompt: PromptOption = None,
    file: Annotated[
        str | None, typer.Option(help="JSON file with prompt and responses, or - for standard input.")
    ] = None,
    top_n: Annotated[int | None, typer.Option(min=1, help="Show only so many.")] = None,
    url: UrlOption = None,
    model: ModelOption = None,
    overlong: OverlongOption = "error",
    timeout: TimeoutOption = 600.0,
    attempt_timeout: AttemptOption = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Sort the responses to one prompt, best first. Exit code 1 if one of them has no score."""
    from ._core import ranking
    from ._scorers import open_scorer

    given = {"prompt": prompt, "responses": responses or []}
    item: dict[str, Any] = given if file is None else _read_item(file)
    if item["prompt"] is None or not item["responses"]:
        raise typer.BadParameter("nothing to rank: give --prompt and responses, or --file")
    with open_scorer(url, model, timeout=timeout, attempt_timeout=attempt_timeout, overlong=overlong) as scorer:
        result = ranking(scorer.score_items([item]), top_n)
    typer.echo(json.dumps(asdict(result)) if as_json else _ranked(result, item["responses"]))
    for failed in result.failed:
        assert failed.error is not None
        typer.echo(f"response {failed.index}: {failed.error.code}: {failed.error.message}", err=True)
    if result.failed:
        raise typer.Exit(1)


def compare(
    response_a: Annotated[str, typer.Argument(help="Response A.")],
    response_b: Annotated[str, typer.Argument(help="Response B.")],
    prompt: Annotated[str, typer.Option(help="The prompt: the text of one user message.", show_default=False)],
    url: UrlOption = None,
    model: ModelOption = None,
    overlong: OverlongOption = "error",
    timeout: TimeoutOption = 600.0,
    attempt_timeout: AttemptOption = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Say which of two responses is better, and how sure the model is."""
    from ._scorers import open_scorer

    with open_scorer(url, model, timeout=timeout, attempt_timeout=attempt_timeout, overlong=overlong) as scorer:
        result = scorer.compare(prompt, response_a, response_b)
    if as_json:
        typer.echo(json.dumps(asdict(result)))
        return
    better = "A is better" if result.margin > 0 else "B is better" if result.margin < 0 else "neither is better"
    typer.echo(f"{better}: score(A) - score(B) = {result.margin:+.6g}, P(A better) = {result.probability:.4f}")


@contextmanager
def progress(tally: Tally, total: int | None = None) -> Iterator[Any]:
    """A callable that is told of every finished row: counts on a terminal, with a bar where the total is known, and
    names the first failed rows."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    text = TextColumn("{task.completed} rows, {task.fields[failed]} failed")
    columns = (SpinnerColumn(), text, TimeElapsedColumn(), *([BarColumn(), TimeRemainingColumn()] if total else []))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("score", total=total, completed=tally.earlier, failed=tally.failed)
        named = 0

        def advance(done: Done) -> None:
            nonlocal named
            bar.update(task, advance=1, failed=tally.failed)
            if done.error is not None and named < REPORTED:
                named += 1
                console.print(f"line {done.row.line}: {done.error.code}: {done.error.message}")

        yield advance


def finish(tally: Tally, as_json: bool, *, to_stdout: bool) -> None:
    """The summary: JSON on standard output if that is free, else a sentence for people. Exit code 1 if a row failed."""
    if as_json:
        typer.echo(json.dumps(asdict(tally)), err=not to_stdout)
    else:
        by = f" by {tally.identity.model}@{tally.identity.revision}" if tally.identity else ""
        typer.echo(f"{tally.rows} rows, {tally.failed} failed, {tally.earlier} from an earlier run{by}", err=True)
    if tally.failed:
        raise typer.Exit(1)


def _read_item(file: str) -> dict[str, Any]:
    """The one row of a JSON file. Raises InvalidInput unless it is a prompt with responses."""
    from ._jsonl import open_input, read_rows, readable
    from .errors import InvalidInput

    with open_input(file) as source:
        row: Row | None = next(read_rows([b"".join(readable(source))]), None)
    if row is None or row.item is None or "responses" not in row.item:
        reason = row.problem.message if row and row.problem else "it has no 'responses'"
        raise InvalidInput(f"{file}: a JSON object with prompt and responses is needed: {reason}")
    return dict(row.item)


def _ranked(result: Ranking, responses: list[str]) -> str:
    lines = (
        f"{place:>3}  {float(scored):>12.6g}  [{scored.index}] {' '.join(responses[scored.index].split())[:200]}"
        for place, scored in enumerate(result.results, start=1)
    )
    return "\n".join(lines)
