"""`plaudit sft`, `plaudit rl` and `plaudit dpo`. Light to import: everything heavy is inside."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from . import config_toml
from .config import DpoConfig, RlConfig, SftConfig
from .errors import RunExists
from .options import configured, takes

C = TypeVar("C", SftConfig, DpoConfig, RlConfig)

Out = Annotated[Path | None, typer.Option(help="where to write the run; default runs/<verb>-<time>")]
File = Annotated[Path | None, typer.Option(help="a run.toml; options beside it come on top")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with the run in --out, if there is one")]


@takes(SftConfig, argument="data")
def sft(out: Out = None, config: File = None, resume: Resume = False, **given: Any) -> None:
    """Fit a policy to prompts with responses.

    `plaudit sft starter --out runs/sft` fits a small policy from scratch to good and bad answers of the built-in tasks,
    as docs/loops.md measured it (13,000 records, 2 epochs, batches of 16, a rate of 4e-3);
    `plaudit sft chats.jsonl --policy DIRECTORY` tunes any causal language model. Rows have `prompt` and `response` (or
    `completion`), or `messages`; the loss is on the response alone. The policy is in `<out>/policy`.
    """
    _run("sft", SftConfig, out, config, resume, given)


@takes(RlConfig)
def rl(out: Out = None, config: File = None, resume: Resume = False, **given: Any) -> None:
    """Optimise a policy against a served reward model: PPO, GRPO, RLOO or REINFORCE++.

    `plaudit serve starter` in one terminal, then `plaudit rl --policy runs/sft/policy --url http://127.0.0.1:8000
    --algo ppo --out runs/ppo`: 60 steps of 64 responses to the built-in tasks, within a KL of 8, as docs/loops.md
    measured it. Prompts of your own are JSONL rows with `prompt` or `messages`. Several `--url` are an ensemble. A
    killed run goes on with `--resume --out runs/ppo`, bit for bit. With several processes: `accelerate launch` or
    `torchrun` before the command. The policy is in `<out>/policy`.
    """
    _run("rl", RlConfig, out, config, resume, given)


@takes(DpoConfig, argument="data")
def dpo(out: Out = None, config: File = None, resume: Resume = False, **given: Any) -> None:
    """Fit a policy to preference pairs directly, without a reward model.

    `plaudit dpo pairs.jsonl --policy runs/sft/policy --out runs/dpo`. Rows have `prompt`, `chosen` and `rejected`,
    texts or messages. The policy is in `<out>/policy`.
    """
    _run("dpo", DpoConfig, out, config, resume, given)


def _file(config: Path | None, out: Path | None, resume: bool) -> Path | None:
    """The run's own configuration, when it is resumed without another."""
    stored = out / config_toml.FILE_NAME if out and resume and not config else None
    return stored if stored is not None and stored.exists() else config


def _run(
    verb: Literal["sft", "rl", "dpo"], kind: type[C], out: Path | None, config: Path | None, resume: bool,
    given: Mapping[str, Any],
) -> None:  # fmt: skip
    """Say what is derived from the data, and run the verb, unless the run is finished."""
    settled, derived = configured(kind, _file(config, out, resume), given)
    from . import loop, report, verbs

    if resume and out is None:
        raise RunExists("--resume needs --out, the directory of the run to go on with")
    out = out or Path("runs") / f"{verb}-{datetime.now():%Y%m%d-%H%M%S}"
    console = report.Lasting(markup=False, emoji=False, highlight=False)
    if resume and loop.finished(out):
        console.print(f"the run in {out} is finished: {out / 'policy'}", soft_wrap=True)
        return
    settled = loop.settle(settled, out, resume=resume)
    if derived:
        said = ", ".join(f"{path} = {value}" for path, value in derived.items())
        console.print(f"from the data, `starter` (docs/loops.md; what you name goes before): {said}", soft_wrap=True)
    getattr(verbs, verb)(settled, out, console)
