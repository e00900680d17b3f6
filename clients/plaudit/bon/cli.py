"""`plaudit bon`: best-of-n and rejection sampling over files."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .. import _bulk
from .._items import encode
from .._jsonl import open_input, open_output
from .._row_files import sole_writer, whole_file
from .._scorers import open_scorer
from ..cli_score import (
    AttemptOption,
    JsonOption,
    ModelOption,
    OverlongOption,
    TimeoutOption,
    UrlOption,
    finish,
    progress,
    refuse_same,
)
from . import generate as generation
from . import report as reports
from . import samples
from . import select as selection
from .endpoint import EndpointPolicy
from .formats import DATASET_INFO, Format, Task
from .rules import RuleOptions, VoteWeight
from .score import by_prompt, one_item, sample_rows
from .scored import Steps, read_scored

RuleName = Literal["best", "topk", "threshold", "raft", "rso", "uncertainty", "majority", "weighted"]

app = typer.Typer(no_args_is_help=True)

OutOption = Annotated[Path, typer.Option(help="JSONL file, continued if it is there.")]
NewOption = Annotated[Path, typer.Option(help="The file to write; replaced when it is complete.")]
ScoredArgument = Annotated[str, typer.Argument(metavar="SCORED", help="JSONL file of scored samples (.gz too), or -.")]
StepsOption = Annotated[Steps | None, typer.Option(help="Take the score from the list `steps`, put together so.")]
SeedOption = Annotated[int, typer.Option(help="Of everything that is random.")]


@app.callback()
def bon() -> None:
    """Sample, score and select responses from files: best-of-n and rejection sampling.

    plaudit bon generate prompts.jsonl --out samples.jsonl --n 16 --endpoint http://localhost:8001 --model my-policy

    plaudit bon score samples.jsonl --out scored.jsonl --url http://localhost:8000

    plaudit bon report scored.jsonl --html report.html

    plaudit bon select scored.jsonl --out pairs.jsonl --rule best --format dpo
    """


@app.command()
def generate(
    source: Annotated[str, typer.Argument(metavar="PROMPTS", help="JSONL file (.gz too), or -.")],
    out: OutOption,
    n: Annotated[int, typer.Option(min=1, help="Samples of each prompt; raise it later to add more.")] = 16,
    policy: Annotated[str | None, typer.Option(help="A causal language model to run here: directory, Hub id.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Or an OpenAI-compatible URL; key: OPENAI_API_KEY.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name at the endpoint.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token (only with --n 1).")] = 1.0,
    top_p: Annotated[float, typer.Option(min=1e-6, max=1, help="Only the likeliest tokens with this mass.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Responses are cut there.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in one forward or request; part of their key.")] = 16,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is: no chat template.")] = False,
    prompt_field: Annotated[str, typer.Option(help="The field with the prompt, text or messages.")] = "prompt",
    shard: Annotated[str, typer.Option(help="I/M: part I (from 0) of M, for `plaudit bon merge`.")] = "0/1",
    timeout: TimeoutOption = 600.0,
    attempt_timeout: AttemptOption = 0.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight at once.")] = 16,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Sample n responses to each prompt, one line each. Run it again to take up where it stopped.

    With --policy, a sample is the same whether the run was killed, sharded or neither. Failed samples stay in the
    file as rows without a response. Exit code 1 if there are any.
    """
    refuse_same(source, str(out))
    part, _, parts = shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise typer.BadParameter(f"--shard is I/M with I below M, got {shard}")
    if n > 1 and temperature == 0:
        raise typer.BadParameter("at --temperature 0 all samples of a prompt are equal: use --n 1")
    with open_input(source) as lines:
        rows, repeated = samples.read_prompts(lines, prompt_field, (int(part), int(parts)), raw=raw)
    how = samples.Sampling(temperature, top_p, max_new_tokens, seed, batch_size, raw)
    sampler: samples.Policy
    if policy is not None and endpoint is None and model is None:
        sampler = generation.open_local(policy, how)
    elif endpoint is not None and model is not None and policy is None:
        limits = {"timeout": timeout, "attempt_timeout": attempt_timeout}
        sampler = EndpointPolicy(endpoint, model, how, **limits, concurrency=concurrency)
    else:
        raise typer.BadParameter("give either --policy, or --endpoint with --model")
    with closing(sampler), sole_writer(out):
        have, failed = samples.take_up(out, generation.settings_of(sampler, how))
        tally = _bulk.Tally(len(have), failed, len(have))
        with open_output(str(out)) as write, progress(tally, len(rows) * n) as advance:
            for done in generation.generate(rows, sampler, how, n, have, tally):
                write(done.line)
                advance(done)
    if repeated:
        typer.echo(f"{repeated} repeated prompts left out", err=True)
    finish(tally, as_json, to_stdout=True)


@app.command()
def score(
    source: Annotated[str, typer.Argument(metavar="SAMPLES", help="JSONL file of samples (.gz too), or -.")],
    out: OutOption,
    url: UrlOption = None,
    model: ModelOption = None,
    revision: Annotated[str | None, typer.Option(help="Accept scores of this revision only.")] = None,
    overlong: OverlongOption = "error",
    prefix: Annotated[str, typer.Option(help="Before the names of the added fields: gold_, rm2_.")] = "",
    timeout: TimeoutOption = 600.0,
    attempt_timeout: AttemptOption = 0.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts in flight at once.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Score samples, those of one prompt in one request. Run it again to take up where it stopped.

    One file holds the scores of one revision in one numerics: the run stops as soon as another answers. Score the
    output again with another --prefix for the scores of another model. A sample that cannot be scored has an error
    and no number. Exit code 1 if there are any.
    """
    refuse_same(source, str(out))
    total = None
    if source != "-":
        with open_input(source) as lines:
            total = sum(1 for row in sample_rows(lines, prefix))  # every row is read before the first is scored
    with open_input(source) as lines, sole_writer(out):
        tally, rows = _bulk.take_up(out, sample_rows(lines, prefix), overlong=overlong, prefix=prefix)
        limits = {"timeout": timeout, "attempt_timeout": attempt_timeout}
        options: dict[str, Any] = {**limits, "revision": revision, "overlong": overlong, "priority": "batch"}
        with (
            open_scorer(url, model, concurrency=concurrency, **options) as scorer,
            open_output(str(out)) as write,
            progress(tally, total) as advance,
        ):
            tally.admit(scorer.identity)
            written: dict[str, Any] = {"overlong": overlong, "prefix": prefix}
            for done in _bulk.score_batches(by_prompt(rows), scorer, tally, items=one_item, **written):
                write(done.line)
                advance(done)
    finish(tally, as_json, to_stdout=True)


@app.command()
def merge(
    sources: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, help="Files of samples, scored or not.")
    ],
    out: NewOption,
) -> None:
    """Put shards together, in the order that one run without shards has; copies are left out and counted. Exit code 1
    if prompts have no sample, or fewer than others: a shard was forgotten, or is not finished."""
    for source in sources:
        refuse_same(str(source), str(out))
    with whole_file(out) as write:
        rows, copies, missing = samples.merge(sources, write)
    typer.echo(f"{rows} samples, {copies} copies left out", err=True)
    if missing:
        typer.echo(f"{', '.join(missing)}: is a shard forgotten, or not finished? Run it again, then merge", err=True)
        raise typer.Exit(1)


@app.command()
def select(
    source: ScoredArgument,
    out: NewOption,
    rule: Annotated[RuleName, typer.Option(help="Which responses are chosen.")] = "best",
    format: Annotated[Format, typer.Option(help="TRL's sft, dpo or kto, or another trainer's.")] = "sft",
    task: Annotated[Task | None, typer.Option(help="What openrlhf or llamafactory is to train; sft.")] = None,
    columns: Annotated[list[str], typer.Option("--score", help="The score; several for uncertainty.")] = ["score"],  # noqa: B006
    steps: StepsOption = None,
    k: Annotated[int, typer.Option(help="topk, rso: responses to a prompt.")] = 4,
    threshold: Annotated[float, typer.Option(help="threshold: the lowest score.")] = 0.0,
    fraction: Annotated[float, typer.Option(help="raft: the best part of all responses.")] = 0.2,
    beta: Annotated[float, typer.Option(help="rso: low takes the best, high takes any.")] = 0.5,
    penalty: Annotated[float, typer.Option(help="uncertainty: mean - penalty x deviation.")] = 0.5,
    answer_regex: Annotated[str | None, typer.Option(help="majority, weighted: the answer is its last match.")] = None,
    vote_weight: Annotated[VoteWeight, typer.Option(help="weighted: of logits, or of probabilities.")] = "sigmoid",
    rejected: Annotated[selection.Rejected, typer.Option(help="dpo, kto: which others are rejected.")] = "worst",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Choose responses and write what a trainer reads, and OUT.report.json with every count and reason.

    plaudit bon select scored.jsonl --out sft.jsonl --rule raft --fraction 0.1

    plaudit bon select scored.jsonl --out kto.jsonl --rule majority --answer-regex '#### (.*)' --format kto
    """
    refuse_same(source, str(out))
    wanted: Task = format if format in ("sft", "dpo", "kto") and task is None else task or "sft"
    numbers = RuleOptions(k, threshold, fraction, beta, penalty, vote_weight)
    options = selection.SelectOptions(
        rule, format, wanted, tuple(columns), steps, numbers, answer_regex, rejected, seed
    )
    with open_input(source) as lines:
        reading = read_scored(lines, columns, steps, needed=rule != "majority")
    counts: Counter[str] = Counter(prompts=len(reading.groups), samples=sum(len(g.samples) for g in reading.groups))
    with whole_file(out) as write:
        for row in selection.select(reading, options, counts):
            write(encode(row) + b"\n")
            counts["rows written"] += 1
    about = {"source": source, "options": asdict(options), "counts": counts, "scorers": reading.scorers}
    if format == "llamafactory":
        about["dataset_info"] = {out.stem: {"file_name": out.name, "formatting": "sharegpt", **DATASET_INFO[wanted]}}
    with whole_file(out.with_name(out.name + ".report.json")) as write:
        write(json.dumps(about, indent=2, allow_nan=False).encode() + b"\n")
    typer.echo(json.dumps(about) if as_json else "\n".join(f"{name}: {count}" for name, count in counts.items()))
    if not counts["rows written"]:
        raise typer.Exit(1)


@app.command()
def report(
    source: ScoredArgument,
    column: Annotated[str, typer.Option("--score", help="The score by which the best is chosen.")] = "score",
    gold: Annotated[str | None, typer.Option(help="The column with the score that counts.")] = None,
    steps: StepsOption = None,
    n_max: Annotated[int | None, typer.Option(min=1, help="The largest n; else what 90% of the prompts have.")] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap over prompts.")] = 1000,
    html: Annotated[Path | None, typer.Option(help="Write a page with a chart, too.")] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Say what the best of n is worth at every n, and what it costs: KL (an upper bound), diversity, length, refusals.

    The expected best of n is unbiased, from all samples of a prompt. With --gold, it is the gold score of what the
    score chooses: where that bends down, the score is over-optimised.
    """
    columns = [column, *([gold] if gold else [])]
    with open_input(source) as opened:
        reading = read_scored(opened, columns, steps)
    found = reports.build(reading, columns, n_max=n_max, resamples=resamples, seed=seed)
    if html is not None:
        refuse_same(source, str(html))
        with whole_file(html) as write:
            write(reports.page(found, source).encode())
    typer.echo(json.dumps(found, indent=2, allow_nan=False) if as_json else "\n".join(reports.lines(found)))
