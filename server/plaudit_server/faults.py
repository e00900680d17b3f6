"""Faults on command, for reliability drills and tests: what a worker does when a certain token comes by.

`PLAUDIT_FAULT` is a list like `exit_on_token:17,nan_on_token:4`. `exit_on_token` ends the process in mid-batch,
as a crash would; `hang_on_token` never returns; `raise_on_token` raises in the forward; `nan_on_token` gives
NaN for the items with that token; `oom_over_tokens:N` runs out of memory over batches of more than N tokens. Unset,
which is the rule, nothing is checked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from plaudit_model.packing import Group

VARIABLE = "PLAUDIT_FAULT"

Kind = Literal["exit_on_token", "hang_on_token", "raise_on_token", "nan_on_token", "oom_over_tokens"]


@dataclass(frozen=True)
class Fault:
    """One fault and the token id, or number of tokens, that sets it off."""

    kind: Kind
    token: int

    @classmethod
    def of(cls, text: str) -> Fault:
        """Raises ValueError if `text` is not `KIND:TOKEN`."""
        kind, _, token = text.partition(":")
        if kind not in get_args(Kind) or not token.isdecimal():
            kinds = ", ".join(get_args(Kind))
            raise ValueError(f"{VARIABLE} lists one of {kinds}, then a colon and a number; got {text!r}")
        return cls(cast(Kind, kind), int(token))

    def before(self, groups: Sequence[Group]) -> None:
        """Strike before the forward, if the token is in the batch, or the batch too large."""
        if self.kind == "oom_over_tokens" and sum(group.tokens for group in groups) > self.token:
            raise torch.OutOfMemoryError(f"{VARIABLE}: more than {self.token} tokens")
        if not any(self._hit(group).any() for group in groups):
            return
        if self.kind == "exit_on_token":
            os._exit(70)
        if self.kind == "hang_on_token":
            time.sleep(1e9)
        if self.kind == "raise_on_token":
            raise RuntimeError(f"{VARIABLE}: token {self.token} came by")

    def after(self, groups: Sequence[Group], attributes: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scores (N, A), NaN where the fault says so."""
        if self.kind != "nan_on_token":
            return attributes
        struck = np.concatenate([self._hit(group) for group in groups])
        return np.where(struck[:, None], np.float32("nan"), attributes)

    def _hit(self, group: Group) -> NDArray[np.bool_]:
        """(n,): which sequences of the group hold the token."""
        everyone = bool((group.prefix == self.token).any())
        return np.array([everyone or bool((suffix == self.token).any()) for suffix in group.suffixes])


def read(environment: Mapping[str, str]) -> tuple[Fault, ...]:
    """The faults that the environment asks for. Raises ValueError for what is none."""
    text = environment.get(VARIABLE)
    return tuple(Fault.of(part) for part in text.split(",")) if text else ()
