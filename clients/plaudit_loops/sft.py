"""Supervised fine-tuning: imitate responses. The loss is the mean negative log-likelihood of response tokens alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch

from plaudit_model.checkpoint import Tensors
from plaudit_model.interrupt import StopRequest

from .config import DpoConfig, SftConfig
from .data import Encoded, fingerprint, members
from .loop import Done
from .masked import masked_sum
from .optim import Trainable
from .policy import Policy

T = TypeVar("T")
C = TypeVar("C", SftConfig, DpoConfig)


class Supervised(Generic[C]):
    """A stage that goes through the rows of its data, epoch by epoch. It has no state beside weights and optimiser."""

    stopped = ""

    def __init__(self, policy: Policy, trainable: Trainable, rows: Sequence[Encoded], config: C) -> None:
        self.policy, self.trainable, self._rows = policy, trainable, rows
        self._config: C = config
        self.total = -(-len(rows) // config.batch_size) * config.epochs
        self.identity: Mapping[str, Any] = {
            "data": fingerprint(rows), "batch_size": config.batch_size, "policy": dict(policy.origin),
        }  # fmt: skip

    def state(self) -> tuple[Mapping[str, Any], Mapping[str, Tensors]]:
        return {}, {}

    def put_back(self, state: Mapping[str, Any], tensors: Mapping[str, Tensors]) -> None:
        pass

    def _chosen(self, step: int) -> list[Encoded]:
        """The rows of a step."""
        chosen = members(len(self._rows), self._config.batch_size, self._config.run.seed, step)
        return [self._rows[i] for i in chosen]


class Sft(Supervised[SftConfig]):
    """The stage of `plaudit sft`."""

    def take(self, step: int, stop: StopRequest) -> Done:
        pairs = [(row.prompt_ids, row.responses[0]) for row in self._chosen(step)]
        total, loss = sum(len(response) for _, response in pairs), 0.0
        for part in batches(self.trainable.world.share(pairs), self._config.optim.micro_batch):
            said = self.policy.say(part, temperature=1.0)
            part_loss = -masked_sum(said.logprobs_BR, said.mask_BR) / total
            torch.autograd.backward(part_loss)
            loss += float(part_loss.detach())
        norm = self.trainable.update()
        loss = sum(self.trainable.world.gather([loss]))
        return Done({"loss": loss, "tokens": float(total), "grad_norm": norm})


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive slices of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))
