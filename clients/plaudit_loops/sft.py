"""Supervised fine-tuning: imitate responses. The loss is the mean negative log-likelihood of response tokens alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from plaudit_model.checkpoint import Tensors
from plaudit_model.interrupt import StopRequest

from .config import SftConfig
from .data import Encoded, fingerprint, members
from .loop import Done
from .masked import masked_sum
from .optim import Trainable
from .policy import Policy

T = TypeVar("T")


class Sft:
    """The stage of `plaudit sft`."""

    stopped = ""

    def __init__(self, policy: Policy, trainable: Trainable, rows: Sequence[Encoded], config: SftConfig) -> None:
        self.policy, self.trainable, self._rows, self._config = policy, trainable, rows, config
        self.total = -(-len(rows) // config.batch_size) * config.epochs
        self.identity: Mapping[str, Any] = {
            "data": fingerprint(rows), "batch_size": config.batch_size, "policy": dict(policy.origin),
        }  # fmt: skip

    def take(self, step: int, stop: StopRequest) -> Done:
        chosen = members(len(self._rows), self._config.batch_size, self._config.run.seed, step)
        pairs = [(self._rows[i].prompt_ids, self._rows[i].responses[0]) for i in chosen]
        total, loss = sum(len(response) for _, response in pairs), 0.0
        for part in batches(self.trainable.world.share(pairs), self._config.optim.micro_batch):
            said = self.policy.say(part, temperature=1.0)
            part_loss = -masked_sum(said.logprobs_BR, said.mask_BR) / total
            torch.autograd.backward(part_loss)
            loss += float(part_loss.detach())
        norm = self.trainable.update()
        loss = sum(self.trainable.world.gather([loss]))
        return Done({"loss": loss, "tokens": float(total), "grad_norm": norm})

    def state(self) -> tuple[Mapping[str, Any], Mapping[str, Tensors]]:
        return {}, {}

    def put_back(self, state: Mapping[str, Any], tensors: Mapping[str, Tensors]) -> None:
        pass


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive slices of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))
