"""Sampling responses to prompts, block by block, and taking up where an earlier run stopped.

A block is `batch_size` consecutive samples of one prompt. It is always computed whole, by the same calls in the same
shape, whatever part of it a killed run has already written and whichever shard it falls to: so a sample does not
depend on the history of the file that it stands in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import entry_points
from typing import Any

from .._bulk import Done, Tally, in_order
from .._extras import install
from .._jsonl import Row
from ..errors import BadRequest, ConfigurationError
from ..types import ItemError
from .samples import Generated, Policy, PromptRow, Sampling, sample_key, sample_line

LOCAL_GROUP = "plaudit.local_policies"


Block = tuple[PromptRow, int, tuple[str, ...]]
"""Consecutive samples of one prompt: from which index on, and their keys."""


def generate(
    rows: Iterable[PromptRow], policy: Policy, sampling: Sampling, n: int, have: set[str], tally: Tally
) -> Iterator[Done]:
    """The samples that `have` lacks, in order, with their lines, counted.

    A prompt that the policy refuses gives lines that say so. Raises BadRequest if it has refused before it has
    answered anything: then it is the settings that are wrong, more likely than the prompt.
    """
    settings = settings_of(policy, sampling)

    def sample(block: Block) -> list[Generated] | BadRequest:
        try:
            return policy.sample(block[0].prompt, block[2])
        except BadRequest as error:
            return error

    for (row, first, keys), made in in_order(
        _blocks(rows, settings, sampling.batch_size, n, have), sample, policy.ahead
    ):
        if isinstance(made, BadRequest):
            if tally.rows == tally.failed:
                raise made
            made = [Generated(None, failure={"code": made.code or "refused", "message": made.reason})] * len(keys)
        for index, (key, one) in enumerate(zip(keys, made, strict=True), start=first):
            if key not in have:
                line = sample_line(row, index, key, settings, one)
                error = ItemError(one.failure["code"], one.failure["message"]) if one.failure else None
                tally.rows += 1
                tally.failed += one.response is None
                yield Done(Row(row.line, len(line), key, {}), line, error)


def settings_of(policy: Policy, sampling: Sampling) -> dict[str, Any]:
    """What a sample depends on, beside its prompt and its index."""
    return {"policy": policy.name, **asdict(sampling)}


def open_local(path: str, sampling: Sampling) -> Policy:
    """A policy in this process, behind an entry point of `plaudit.local_policies`. Raises ConfigurationError."""
    found = list(entry_points(group=LOCAL_GROUP))
    if not found:
        raise ConfigurationError(f"no local policy can run here: {install('model')}, or pass --endpoint")
    policy: Policy = found[0].load()(path, sampling)
    return policy


def _blocks(rows: Iterable[PromptRow], settings: dict[str, Any], size: int, n: int, have: set[str]) -> Iterator[Block]:
    """The blocks in which samples are missing."""
    for row in rows:
        keys = tuple(sample_key(row.prompt, settings, index) for index in range(n))
        for first in range(0, n, size):
            if not have.issuperset(keys[first : first + size]):
                yield row, first, keys[first : first + size]
