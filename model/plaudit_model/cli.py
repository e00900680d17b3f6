"""`plaudit info` and `plaudit verify`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import contract as contracts

if TYPE_CHECKING:
    from .contract import RewardContract
    from .oracle import Agreement
    from .records import Conversation
    from .reward_model import RewardModel

_console = Console()
_notes = Console(stderr=True)

ModelArgument = Annotated[str, typer.Argument(help="A directory, a Hub id, or the word `starter`.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def info(
    model: ModelArgument = "starter",
    as_json: JsonOption = False,
    save_contract: Annotated[
        bool, typer.Option("--save-contract", help="Write the inferred contract as reward.json beside the weights.")
    ] = False,
    pin_date: Annotated[
        str, typer.Option(help="With --save-contract: the date that a date-writing chat template is fixed to.")
    ] = "",
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of reward.json and stop.")] = False,
) -> None:
    """Show what a model's contract says: how text becomes a score. Exit code 78 if a file is not the one it lists."""
    if schema:
        _console.print_json(json.dumps(contracts.json_schema()))
        return
    from .infer import check_base, resolve
    from .store import check_files

    directory = resolve(model)
    contract = _contract(directory, pin_date)
    if save_contract:
        contracts.write(contract, directory)
        _notes.print(f"wrote {directory / contracts.FILE_NAME}")
    _show_contract(directory, contract, as_json)
    if (directory / contracts.FILE_NAME).is_file():
        check_files(directory, contract)
        check_base(directory, contract)


def _show_contract(directory: Path, contract: RewardContract, as_json: bool) -> None:
    if as_json:
        _console.print_json(json.dumps({"revision": contract.revision(), **contracts.to_json(contract)}))
        return
    table = Table(title=Text(f"{directory}  ·  revision {contract.revision()}"), show_header=False)
    table.caption = "all of it, hashes and lineage too: --json"
    for name, value in summary(contract).items():
        table.add_row(name, Text(value))
    _console.print(table)


def summary(contract: RewardContract) -> dict[str, str]:
    """What people ask of a contract first. Of lineage and evaluation, which are free, what `plaudit train` writes."""
    known = contract.lineage.get("base"), contract.lineage.get("data"), contract.evaluation.get("accuracy")
    base, data, result = (facts if isinstance(facts, dict) else {} for facts in known)
    rates = [f"{result[name]:.4f}" for name in ("value", "low", "high") if isinstance(result.get(name), float)]
    template, serving, s = contract.template, contract.serving, contract.statistics
    weights = [f"{name} {e.sha256[:12]}" for name, e in contract.files.items() if "model" in Path(name).stem]
    facts = {
        "label": contract.label,
        "architecture": f"{contract.architecture}, head: {', '.join(contract.head.attributes)}",
        "base": f"{base.get('name')}, revision {base.get('revision') or 'unknown'}" if base else "",
        "records": f"{data.get('records')} trained on, {data.get('eval_records')} held out" if data else "",
        "accuracy": f"{rates[0]} [{', '.join(rates[1:])}], {result.get('n')} comparisons" if rates else "",
        "scores": f"mean {s.mean:.4g}, standard deviation {s.std:.4g}, {s.n} responses" if s else "",
        "template": f"{template.kind}, sha256 {template.sha256[:12]}; at most {contract.max_length:,} tokens",
        "serving": f"{serving.backend}, {serving.dtype}, {serving.mode}",
        "files": f"{len(contract.files)}: {', '.join(weights)}",
    }
    return {name: value for name, value in facts.items() if value}


def verify(
    model: ModelArgument,
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL with items to score; default: 64 of the starter tasks.", exists=True, dir_okay=False),
    ] = None,
    limit: Annotated[int, typer.Option(min=2, help="Use at most this many responses.")] = 1000,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, fp8 or int8; default: the contract's.")] = None,
    mode: Annotated[str | None, typer.Option(help="exact or fast; default: the contract's.")] = None,
    against: Annotated[
        str | None, typer.Option(help="URL of a running plaudit server to compare with, instead of transformers.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="On success record dtype and mode in the contract.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare our scores with plain fp32 transformers, one item at a time. Exit code 1 if they disagree."""
    import numpy as np

    from .oracle import PlainModel, agreement
    from .reward_model import RewardModel

    ours = RewardModel.load(model, dtype=dtype, mode=mode)
    texts = read_conversations(data, limit)
    if len(texts) < 2:
        raise typer.BadParameter("at least two responses are needed to compare scores", param_hint="--data")
    scores = ours.score_encoded([ours.encoder.encode(prompt, response) for prompt, response in texts])[:, 0]
    reference = _served(against, ours, texts) if against else PlainModel(ours.directory).score(texts)[:, 0]
    result = agreement(scores, np.asarray(reference, dtype=np.float32), ours.dtype)
    if write and result.holds:
        serving = replace(ours.contract.serving, dtype=ours.dtype, mode=ours.mode)  # type: ignore[arg-type]
        contracts.write(replace(ours.contract, serving=serving), ours.directory)
    show_agreement(result, ours.numerics, against or "transformers, eager fp32, one by one", as_json)
    if not result.holds:
        raise typer.Exit(1)


def _contract(directory: Path, pin_date: str) -> Any:
    from . import template as templates
    from .contract import Template
    from .infer import contract_for, infer_contract

    if not pin_date:
        return contract_for(directory)
    known = (directory / contracts.FILE_NAME).is_file()
    contract = contracts.read(directory) if known else infer_contract(directory)
    source = templates.pin_date(contract.template.source, pin_date)
    return replace(contract, template=Template.of(contract.template.kind, source))


def read_conversations(data: Path | None, limit: int) -> list[Conversation]:
    """The items of a JSONL file, one for each response, or some of the starter tasks. Raises ItemError."""
    from plaudit._row_files import json_rows, located

    from .items import conversation, flatten

    if data is None:
        from .starter import preference_records

        records = preference_records(32, seed=7)
        return [(r.prompt, response) for r in records for response in r.responses][: min(limit, 64)]
    with located(str(data)), data.open("rb") as lines:
        return [conversation(item) for _, _, row in json_rows(lines) for item in flatten(row)][:limit]


def _served(url: str, ours: RewardModel, conversations: list[Conversation]) -> list[float]:
    """The server's scores; what it serves is said if that is not `ours`."""
    from plaudit import Client

    items = [{"prompt": [asdict(m) for m in prompt], "response": response} for prompt, response in conversations]
    with Client(url) as client:
        theirs, mine = client.info().identity, (ours.contract.revision(), ours.numerics)
        if (theirs.revision, theirs.numerics) != mine:
            served = f"{theirs.model}@{theirs.revision} ({theirs.numerics})"
            typer.echo(f"the server serves {served}, this is {mine[0]} ({mine[1]})", err=True)
        return [float(result) for result in client.score_items(items)]


def show_agreement(result: Agreement, numerics: str, reference: str, as_json: bool) -> None:
    """Print a comparison as a table or as one JSON object."""
    if as_json:
        _console.print_json(json.dumps({"numerics": numerics, "holds": result.holds, **asdict(result)}))
        return
    verdict = "[green]agree[/]" if result.holds else "[red]DISAGREE[/]"
    table = Table(title=f"{numerics}  against  {reference}: {verdict}", show_header=False)
    table.add_row("items", str(result.n))
    table.add_row("max |difference|", f"{result.max_difference:.3g} (tolerance {result.tolerance:.3g})")
    table.add_row("sd of the scores", f"{result.std:.4g}")
    table.add_row("Kendall tau", f"{result.kendall_tau:.6f}")
    table.add_row("order flips", f"{result.flips} of {result.far_pairs} pairs farther apart than twice the tolerance")
    _console.print(table)
