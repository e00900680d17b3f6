"""`plaudit sft`, `plaudit rl` and `plaudit dpo`. Light to import: everything heavy is inside."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from datetime import datetime
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from plaudit import _trees as trees
from plaudit._options import own_names, takes
from plaudit_model.run_folder import settle, stored

from .config import DpoConfig, RlConfig, SftConfig, recipe

C = TypeVar("C", SftConfig, DpoConfig, RlConfig)

Out = Annotated[Path | None, typer.Option(help="where to write the run; default runs/<verb>-<time>")]
File = Annotated[Path | None, typer.Option(help="a run.toml; options beside it come on top")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with the run in --out, if there is one")]


@takes(SftConfig, own_names(SftConfig), argument="data")
def sft(out: Out = None, config: File = None, resume: Resume = False, **given: Any) -> None:
    """Fit a policy to prompts with responses.

    `plaudit sft starter --out runs/sft` fits a small policy from scratch to good and bad answers of the built-in tasks,
    as docs/loops.md measured it (13,000 records, 2 epochs, batches of 16, a rate of 4e-3);
    `plaudit sft chats.jsonl --policy DIRECTORY` tunes any causal language model. Rows have `prompt` and `response` (or
    `completion`), or `messages`; the loss is on the response alone. The policy is in `<out>/policy`.
    """
    _run("sft", SftConfig, out, config, resume, given)


@takes(RlConfig, own_names(RlConfig))
def rl(out: Out = None, config: File = None, resume: Resume = False, **given: Any) -> None:
    """Optimise a policy against a served reward model: PPO, GRPO, RLOO or REINFORCE++.

    `plaudit serve starter` in one terminal, then `plaudit rl --policy runs/sft/policy --url http://127.0.0.1:8000
    --algo ppo --out runs/ppo`: 60 steps of 64 responses to the built-in tasks, within a KL of 8, as docs/loops.md
    measured it. Prompts of your own are JSONL rows with `prompt` or `messages`. Several `--url` are an ensemble. A
    killed run goes on with `--resume --out runs/ppo`, bit for bit. With several processes: `accelerate launch` or
    `torchrun` before the command. The policy is in `<out>/policy`.
    """
    _run("rl", RlConfig, out, config, resume, given)


@takes(DpoConfig, own_names(DpoConfig), argument="data")
def dpo(out: Out = None, config: File = None, resume: Resume = False, **given: Any) -> None:
    """Fit a policy to preference pairs directly, without a reward model.

    `plaudit dpo pairs.jsonl --policy runs/sft/policy --out runs/dpo`. Rows have `prompt`, `chosen` and `rejected`,
    texts or messages. The policy is in `<out>/policy`.
    """
    _run("dpo", DpoConfig, out, config, resume, given)


def configured(kind: type[C], file: Path | None, given: Mapping[str, Any]) -> tuple[C, dict[str, Any]]:
    """What the command line gives over what `file` names over the recipe of the data over the defaults; and, by dotted
    path, what is of the recipe. Raises ConfigurationError."""
    paths = own_names(kind)
    values = {paths[name]: value for name, value in given.items() if value not in (None, [])}
    config = trees.changed(trees.read(file, kind) if file else kind(), values)
    tables = tomllib.loads(file.read_text(encoding="utf-8")) if file else {}
    named = values.keys() | {path for path in paths.values() if _value(tables, path) != {}}
    derived = {path: value for path, value in recipe(config).items() if path not in named}
    return trees.changed(config, derived), derived


def _value(tables: Mapping[str, Any], path: str) -> Any:
    found: Any = reduce(lambda place, key: place.get(key, {}), path.split("."), tables)
    return found


def _run(
    verb: Literal["sft", "rl", "dpo"], kind: type[C], out: Path | None, config: Path | None, resume: bool,
    given: Mapping[str, Any],
) -> None:  # fmt: skip
    """Say what is derived from the data, and run the verb, unless the run is finished."""
    settled, derived = configured(kind, stored(out, resume=resume, file=config), given)
    from rich.console import Console

    from plaudit_model.progress import outlive_log

    from . import loop, verbs

    out = out or Path("runs") / f"{verb}-{datetime.now():%Y%m%d-%H%M%S}"
    outlive_log()
    console = Console(markup=False, emoji=False, highlight=False)
    if resume and loop.finished(out):
        console.print(f"the run in {out} is finished: {out / 'policy'}", soft_wrap=True)
        return
    settled = settle(settled, out, resume=resume)
    if derived:
        said = ", ".join(f"{path} = {value}" for path, value in derived.items())
        console.print(f"from the data, `starter` (docs/loops.md; what you name goes before): {said}", soft_wrap=True)
    getattr(verbs, verb)(settled, out, console)
