"""`plaudit judge`: labels from a chat model under a constitution, and whether they can be trusted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import _bulk
from .._endpoint import Endpoint
from .._jsonl import open_input, open_output
from .._row_files import sole_writer
from ..bon.report import lines as report_lines
from ..cli_score import AttemptOption, JsonOption, TimeoutOption, progress, refuse_same
from . import agreement
from . import label as labelling
from .constitution import read_constitution

app = typer.Typer(no_args_is_help=True)

LabelsArgument = Annotated[str, typer.Argument(metavar="LABELS", help="JSONL file of `plaudit judge label`, or -.")]


@app.callback()
def judge() -> None:
    """Label comparisons with a chat model under a written constitution, and check it against people.

    plaudit judge label pairs.jsonl --constitution constitution.toml --endpoint http://localhost:8001 --model judge
    --out labels.jsonl

    plaudit judge gate labels.jsonl labels.queue.jsonl --min-kappa 0.6

    plaudit train labels.jsonl --out runs/first
    """


@app.command()
def label(
    source: Annotated[str, typer.Argument(metavar="PAIRS", help="JSONL file (.gz too), or -.")],
    constitution: Annotated[
        Path,
        typer.Option(
            help="TOML: guideline_version, [[principles]] with id, text, weight, "
            "safety; template; [price] prompt, completion."
        ),
    ],
    endpoint: Annotated[str, typer.Option(help="OpenAI-compatible URL; key: OPENAI_API_KEY.")],
    model: Annotated[str, typer.Option(help="The model's name at the endpoint.")],
    out: Annotated[Path, typer.Option(help="JSONL file, continued if it is there.")],
    queue: Annotated[Path | None, typer.Option(help="What people are asked.", show_default="OUT.queue.jsonl")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers in each order.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="Of the judge; above 0 for several samples.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Answers are cut there, and then say nothing.")] = 1024,
    logprobs: Annotated[bool, typer.Option(help="Ask for them; some endpoints refuse.")] = True,
    min_confidence: Annotated[float, typer.Option(min=0, max=1, help="Below it people decide.")] = 0.7,
    audit: Annotated[float, typer.Option(min=0, max=1, help="Share that people label too, chosen by key.")] = 0.05,
    timeout: TimeoutOption = 600.0,
    attempt_timeout: AttemptOption = 0.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Comparisons in flight at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Sent to the endpoint, one made from it for each request.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Label comparisons, each in both orders. Run it again to take up where it stopped.

    A row is a prompt with response_a and response_b, or with chosen and rejected. Labels of low confidence, those on
    which a safety principle bears and unreadable answers have `label` null and stand in the queue; an audited share
    stands there too. Exit code 1 if an answer could not be read.
    """
    asked = _other_file(source, out, queue or out.with_suffix(".queue.jsonl"))
    if samples > 1 and temperature == 0:
        raise typer.BadParameter("at --temperature 0 all samples are equal: use --samples 1, or a temperature above 0")
    how = labelling.Asking(model, samples, temperature, max_tokens, logprobs, seed)
    rules = read_constitution(constitution)
    total = None
    if source != "-":
        with open_input(source) as lines:
            total = sum(1 for _ in labelling.read_pairs(lines))  # every row is read before the first is judged
    limits = {"timeout": timeout, "attempt_timeout": attempt_timeout}
    with closing(Endpoint(endpoint, concurrency=concurrency, **limits)) as opened:
        judge = labelling.Judge(opened, rules, how)
        with open_input(source) as lines, sole_writer(out), sole_writer(asked):
            routing = labelling.Routing(min_confidence, audit)
            have, failed = labelling.earlier_rows(out, judge.settings, routing)
            waiting, _ = labelling.earlier_rows(asked)
            tally = _bulk.Tally(len(have), failed, len(have))
            pairs = _new(labelling.read_pairs(lines), judge, set(have))
            with open_output(str(out)) as write, open_output(str(asked)) as ask, progress(tally, total) as advance:
                for done, row in labelling.label(pairs, judge, routing, tally, concurrency):
                    if row["queued"] and row["key"] not in waiting:
                        ask(labelling.queue_line(row))
                    write(done.line)
                    advance(done)
    report(str(out), as_json)
    if tally.earlier:
        typer.echo(f"{tally.earlier} of {tally.rows} rows are from an earlier run", err=True)
    if tally.failed:
        raise typer.Exit(1)


def _other_file(source: str, out: Path, queue: Path) -> Path:
    """The queue, if no two of the three are the same file."""
    for written in (out, queue):
        refuse_same(source, str(written))
    if out.absolute() == queue.absolute():
        raise typer.BadParameter("--queue must be another file than --out")
    return queue


@app.command()
def gate(
    source: LabelsArgument,
    human: Annotated[
        str,
        typer.Argument(
            metavar="HUMAN",
            help="JSONL file with prompt, response_a, response_b and "
            "people's `label`: a, b or tie; the filled-in queue.",
        ),
    ],
    min_kappa: Annotated[float, typer.Option(min=-1, max=1, help="Exit 1 below.")] = 0.6,
    min_comparisons: Annotated[int, typer.Option(min=1, help="Exit 1 with fewer: they would prove nothing.")] = 30,
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap over comparisons.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare the judge's labels with people's: Cohen's kappa, with a 95% interval. Exit code 1 if it is too low.

    Only labels that a trainer would use count: not those that were left to people.
    """
    with open_input(source) as lines:
        rows = labelling.read_labels(lines)
    with open_input(human) as lines:
        people, unlabelled = agreement.read_people(lines)
    comparisons, left = agreement.matched(rows, people)
    found = agreement.kappa_of(comparisons, resamples=resamples, seed=seed)
    passed = found.kappa is not None and found.kappa >= min_kappa and found.comparisons >= min_comparisons
    about = {**asdict(found), "min_kappa": min_kappa, "min_comparisons": min_comparisons, "passed": passed}
    _show({**about, "left_to_people": left, "without_a_human_label": unlabelled}, as_json)
    if not passed:
        why = "kappa is below --min-kappa" if found.kappa is not None else "one label alone: chance explains it all"
        few = found.comparisons < min_comparisons
        typer.echo(f"not passed: {'fewer comparisons than --min-comparisons' if few else why}", err=True)
        raise typer.Exit(1)


@app.command()
def report(source: LabelsArgument, as_json: JsonOption = False) -> None:
    """Say what a file of labels holds: counts, position bias, agreement of the two orders, tokens and cost."""
    with open_input(source) as lines:
        _show(agreement.report(labelling.read_labels(lines)), as_json)


def _new(pairs: Iterator[labelling.Pair], judge: labelling.Judge, have: set[str]) -> Iterator[labelling.Pair]:
    """The pairs that have no row yet, each once."""
    for pair in pairs:
        if (key := judge.key(pair)) not in have:
            have.add(key)
            yield pair


def _show(found: Mapping[str, Any], as_json: bool) -> None:
    typer.echo(json.dumps(found, allow_nan=False) if as_json else "\n".join(report_lines(found)))
